"""A plan as it comes over the network: the content of its files, never a path."""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Mapping
from pathlib import Path

from steersman.artifacts import MANIFEST, TENSORS, load_steering
from steersman.errors import RequestError, SteersmanError
from steersman.steering import Steering

FIELDS = {"manifest": MANIFEST, "tensors": TENSORS}
"""{field of a body: file of a plan's folder}"""
LARGEST = 128 * 2**20
"""Bytes of a body that brings a plan, at most."""

Files = dict[str, bytes]


def read_files(body: Mapping[str, object]) -> Files:
    """The files in a body's fields, which hold them in base64. Raises `RequestError`."""
    files: Files = {}
    for field, name in FIELDS.items():
        value = body.get(field)
        if not isinstance(value, str):
            raise RequestError(f"{field}: right is the content of the plan's {name}, in base64")
        try:
            files[name] = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(f"{field}: this is no base64; right is that of the plan's {name}") from None
    return files


def open_files(files: Mapping[str, bytes]) -> Steering:
    """Open a plan, with all that the reader of artifacts checks.

    Raises:
        RequestError: it cannot be opened, with the reason.
    """
    with tempfile.TemporaryDirectory(prefix="steersman-") as folder:
        for name in FIELDS.values():
            (Path(folder) / name).write_bytes(files[name])
        try:
            return load_steering(folder)
        except SteersmanError as error:
            raise RequestError(str(error).replace(f"{folder}/", "").replace(folder, "the plan")) from None


def encoded(folder: Path) -> dict[str, str]:
    """A saved plan as the fields of a body."""
    return {
        field: base64.b64encode((folder / name).read_bytes()).decode("ascii")
        for field, name in FIELDS.items()
    }
