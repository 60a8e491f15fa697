"""Whole artifacts: a manifest and its tensors, bound to each other by sha256. Never a pickle.

docs/artifacts.md describes the format. A reader rejects whatever it does not know: a wrong hash, unknown
keys, wrong shapes, NaN, a newer version; each with one line that names the file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from steersman.artifacts.fields import Tensors, one_line
from steersman.artifacts.folder import MANIFEST, TENSORS, new_folder
from steersman.artifacts.hub import resolve
from steersman.artifacts.kinds import KINDS, Kind
from steersman.artifacts.manifest import read_manifest, unique
from steersman.errors import ArtifactError
from steersman.stand_ins import stand_in_at
from steersman.steering import canonical_json, sha256_of


def read_artifact(
    source: str | Path, kind: Kind, revision: str | None
) -> tuple[Path, dict[str, Any], Tensors]:
    folder = resolve(source, revision)
    manifest = read_manifest(folder)
    path = folder / MANIFEST
    if manifest["kind"] != kind.name:
        raise ArtifactError(f"{path}: this is {KINDS[manifest['kind']].words}, {kind.words} is needed")
    file = folder / TENSORS
    try:
        if (instead := stand_in_at(file)) is not None:
            raise ArtifactError(f"{file}: {instead}")
        if not file.is_file():
            raise ArtifactError(f"{file}: missing")
        content = file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != manifest["tensors_sha256"]:
        raise ArtifactError(f"{file}: does not match its sha256 in the manifest: it was changed or damaged")
    try:
        tensors = load_tensors(content)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file}: not a safetensors file of known numbers ({one_line(error)})") from None
    return path, manifest, tensors


def write_artifact(folder: str | Path, manifest: dict[str, Any], tensors: Tensors, force: bool) -> None:
    content = save_tensors({name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())})
    try:
        # As a reader will see it: keys that are numbers become strings, and sort as strings.
        manifest = json.loads(canonical_json(manifest), object_pairs_hook=unique)
        manifest["tensors_sha256"] = hashlib.sha256(content).hexdigest()
        manifest["manifest_sha256"] = sha256_of(manifest)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder}: its manifest cannot be written as JSON ({one_line(error)})") from None
    with new_folder(folder, force=force, ours={MANIFEST, TENSORS}) as place:
        (place / TENSORS).write_bytes(content)
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (place / MANIFEST).write_text(text + "\n", encoding="utf-8")
