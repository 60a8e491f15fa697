"""The sha256 of each tensor of a checkpoint's file, kept in the user's cache for as long as the file is as it
was: one small JSON file for each, written whole or not at all. One that is damaged is as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from steersman.cache import cache_directory
from steersman.steering import sha256_of

SETTLED_NS = 2_000_000_000
"""A file that changed less than this ago may change again under the same times: it is not kept."""


LEAST_BYTES = 16 << 20
"""A smaller file is read again as fast as what is kept of it."""


class Stamp(NamedTuple):
    """What changes with a file: a copy, a touch or another write gives another one."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int


def stamp(file: Path) -> Stamp:
    """A file's stamp, of what a link leads to."""
    found = file.stat()
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)


def read(file: Path, now: Stamp) -> dict[str, str] | None:
    """{tensor: hex sha256} of a file that has this stamp; None where that is not known."""
    try:
        kept = json.loads(_place(file).read_bytes())
        claimed = kept.pop("sha256")
        if sha256_of(kept) != claimed or kept["stamp"] != list(now) or kept["file"] != _name(file):
            return None
        return dict(kept["tensors"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def write(file: Path, before: Stamp, tensors: Mapping[str, str]) -> None:
    """Keep a file's digests. Where they cannot be kept they are made again the next time."""
    settled = time.time_ns() - max(before.mtime_ns, before.ctime_ns) >= SETTLED_NS
    if before.size < LEAST_BYTES or not settled:
        return
    kept = {"file": _name(file), "stamp": list(before), "tensors": dict(tensors)}
    place, temporary = _place(file), None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=".")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump({**kept, "sha256": sha256_of(kept)}, stream)
        Path(temporary).replace(place)
    except (OSError, ValueError):
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()


def _name(file: Path) -> str:
    return str(file.resolve())


def _place(file: Path) -> Path:
    return cache_directory() / "weights" / f"{hashlib.sha256(_name(file).encode()).hexdigest()}.json"
