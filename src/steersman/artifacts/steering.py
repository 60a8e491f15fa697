"""Steerings on disk: the edits of a plan, in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from steersman.artifacts.content import read_artifact, write_artifact
from steersman.artifacts.fields import (
    Tensors,
    blaming,
    exact_keys,
    mapping,
    nothing_left,
    one_of,
    take,
)
from steersman.artifacts.kinds import register
from steersman.artifacts.manifest import manifest_of, read_model
from steersman.edits import Edit, ExpertEdit, ResidualEdit
from steersman.errors import ArtifactError
from steersman.steering import Steering, canonical_json

_KEYS = {"edits", "on_conflict", "fingerprint"}
STEERING = register("steering", "a steering", {1: _KEYS, 2: _KEYS, 3: _KEYS, 4: _KEYS})
"""Version 1 knows edits of routers alone, version 2 evidence by its hash alone."""


def save_steering(steering: Steering, folder: str | Path, *, force: bool = False) -> None:
    """Write a steering.

    Raises `ArtifactError` where the folder is occupied (unless `force`) or cannot be written.
    """
    tensors: Tensors = {}
    edits: list[dict[str, Any]] = []
    for number, edit in enumerate(steering.edits):
        facts: dict[str, Any] = {
            "site": {"point": edit.point, "layers": list(edit.layers)},
            "operation": edit.operation,
            "scope": edit.scope,
            "when": edit.when,
        }
        if isinstance(edit, ExpertEdit):
            of_edit = _expert_tensors(edit)
        else:
            of_edit = _vector_tensors(edit)
            facts["strength"] = edit.strength
        tensors |= {f"edits.{number}.{name}": tensor for name, tensor in of_edit.items()}
        edits.append(facts)
    manifest = {
        **manifest_of(STEERING, steering, steering.provenance),
        "edits": edits,
        "on_conflict": steering.on_conflict,
        "fingerprint": steering.fingerprint,
        "evidence": list(steering.evidence),
    }
    write_artifact(folder, manifest, tensors, force)


def _expert_tensors(edit: ExpertEdit) -> Tensors:
    entries = edit.entries()
    return {
        "layers": np.array([entry[0] for entry in entries], np.int64),
        "experts": np.array([entry[1] for entry in entries], np.int64),
        "strengths": np.array([entry[2] for entry in entries], np.float64),
    }


def _vector_tensors(edit: ResidualEdit) -> Tensors:
    return {
        "layers": np.array(edit.layers, np.int64),
        "vectors": np.stack([vector.numpy() for vector in edit.vectors.values()]),
    }


def load_steering(source: str | Path, *, revision: str | None = None) -> Steering:
    """Read a steering from a folder or the Hub.

    Raises `ArtifactError` for anything damaged, foreign or newer.
    """
    path, manifest, tensors = read_artifact(source, STEERING, revision)
    with blaming(path):
        version = manifest["format_version"]
        edits = tuple(_read_edit(entry, n, tensors, version) for n, entry in enumerate(manifest["edits"]))
        nothing_left(tensors)
        steering = Steering(
            edits=edits,
            **read_model(manifest, STEERING, version),
            on_conflict=one_of(manifest["on_conflict"], "on_conflict", ("error", "sum")),
            provenance=mapping(manifest["made_from"], "made_from"),
            evidence=tuple(manifest["evidence"]),
        )
        if steering.fingerprint != manifest["fingerprint"]:
            raise ArtifactError("the fingerprint does not fit the edits")
    return steering


def _read_edit(entry: Any, number: int, tensors: Tensors, version: int) -> Edit:
    name = f"edits[{number}]"
    site = mapping(mapping(entry, name).get("site"), f"{name}.site")
    exact_keys(site, {"point", "layers"}, f"{name}.site")
    readers: dict[str, Callable[..., Edit]] = {"router": _read_experts}
    if version > 1:
        readers["block_output"] = _read_vectors
    point = one_of(site["point"], f"{name}.site.point", tuple(readers))
    edit = readers[point](entry, number, tensors)
    if canonical_json(list(edit.layers)) != canonical_json(site["layers"]):  # True is not 1 there
        raise ArtifactError(f"{name}: the layers in the manifest are not those of its tensors")
    return edit


def _read_experts(entry: Any, number: int, tensors: Tensors) -> ExpertEdit:
    name = f"edits[{number}]"
    exact_keys(entry, {"site", "operation", "scope", "when"}, name)
    layers = take(tensors, f"edits.{number}.layers", np.int64, 1)
    experts = take(tensors, f"edits.{number}.experts", np.int64, 1)
    values = take(tensors, f"edits.{number}.strengths", np.float64, 1)
    if not len(layers) == len(experts) == len(values):
        raise ArtifactError(f"{name}: its tensors have different lengths")
    strengths: dict[int, dict[int, float]] = {}
    for layer, expert, strength in zip(layers.tolist(), experts.tolist(), values.tolist(), strict=True):
        if expert in strengths.setdefault(layer, {}):
            raise ArtifactError(f"{name}: expert {expert} of layer {layer} is given twice")
        strengths[layer][expert] = strength
    return ExpertEdit(strengths, entry["scope"], entry["operation"], entry["when"])


def _read_vectors(entry: Any, number: int, tensors: Tensors) -> ResidualEdit:
    name = f"edits[{number}]"
    exact_keys(entry, {"site", "operation", "scope", "when", "strength"}, name)
    layers = take(tensors, f"edits.{number}.layers", np.int64, 1).tolist()
    vectors = take(tensors, f"edits.{number}.vectors", np.float32, 2)
    if len(layers) != len(vectors) or len(set(layers)) != len(layers):
        raise ArtifactError(f"{name}: its tensors do not name one layer a vector")
    if isinstance(entry["strength"], bool) or not isinstance(entry["strength"], int | float):
        raise ArtifactError(f"{name}.strength is not a number")
    return ResidualEdit(
        dict(zip(layers, vectors, strict=True)),
        entry["strength"],
        entry["scope"],
        entry["operation"],
        entry["when"],
    )
