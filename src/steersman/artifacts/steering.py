"""Steerings on disk: the edits of a plan, in order."""

from __future__ import annotations

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
    strings,
    take,
)
from steersman.artifacts.kinds import register
from steersman.artifacts.manifest import manifest_of, read_architecture
from steersman.errors import ArtifactError
from steersman.steering import ExpertEdit, Steering, canonical_json

STEERING = register("steering", "a steering", {1: {"edits", "on_conflict", "fingerprint"}})


def save_steering(steering: Steering, folder: str | Path, *, force: bool = False) -> None:
    """Write a steering.

    Raises `ArtifactError` where the folder is occupied (unless `force`) or cannot be written.
    """
    tensors: Tensors = {}
    edits: list[dict[str, Any]] = []
    for number, edit in enumerate(steering.edits):
        entries = edit.entries()
        tensors[f"edits.{number}.layers"] = np.array([entry[0] for entry in entries], np.int64)
        tensors[f"edits.{number}.experts"] = np.array([entry[1] for entry in entries], np.int64)
        tensors[f"edits.{number}.strengths"] = np.array([entry[2] for entry in entries], np.float64)
        edits.append(
            {
                "site": {"point": edit.point, "layers": list(edit.layers)},
                "operation": edit.operation,
                "scope": edit.scope,
                "when": edit.when,
            }
        )
    manifest = {
        **manifest_of(STEERING, steering, steering.provenance),
        "edits": edits,
        "on_conflict": steering.on_conflict,
        "fingerprint": steering.fingerprint,
        "evidence": list(steering.evidence),
    }
    write_artifact(folder, manifest, tensors, force)


def load_steering(source: str | Path, *, revision: str | None = None) -> Steering:
    """Read a steering from a folder or the Hub.

    Raises `ArtifactError` for anything damaged, foreign or newer.
    """
    path, manifest, tensors = read_artifact(source, STEERING, revision)
    with blaming(path):
        edits = tuple(_read_edit(entry, number, tensors) for number, entry in enumerate(manifest["edits"]))
        nothing_left(tensors)
        steering = Steering(
            edits=edits,
            architecture=read_architecture(manifest),
            weights_id=manifest["model"]["weights_id"],
            model=manifest["model"]["name"],
            revision=manifest["model"]["revision"],
            on_conflict=one_of(manifest["on_conflict"], "on_conflict", ("error", "sum")),
            provenance=mapping(manifest["made_from"], "made_from"),
            evidence=tuple(strings(manifest["evidence"], "evidence")),
        )
        if steering.fingerprint != manifest["fingerprint"]:
            raise ArtifactError("the fingerprint does not fit the edits")
    return steering


def _read_edit(entry: Any, number: int, tensors: Tensors) -> ExpertEdit:
    name = f"edits[{number}]"
    exact_keys(entry, {"site", "operation", "scope", "when"}, name)
    exact_keys(entry["site"], {"point", "layers"}, f"{name}.site")
    if entry["site"]["point"] != "router":
        raise ArtifactError(f"{name}: edits at {entry['site']['point']!r} are not known to this version")
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
    edit = ExpertEdit(strengths, entry["scope"], entry["operation"], entry["when"])
    if canonical_json(list(edit.layers)) != canonical_json(entry["site"]["layers"]):  # True is not 1 there
        raise ArtifactError(f"{name}: the layers in the manifest are not those of its tensors")
    return edit
