"""Concept vectors on disk: directions, those of folds, sums of differences by unit, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steersman.artifacts.content import read_artifact, write_artifact
from steersman.artifacts.fields import (
    Tensors,
    blaming,
    exact_keys,
    mapping,
    nothing_left,
    one_of,
    take,
    whole,
)
from steersman.artifacts.kinds import register
from steersman.artifacts.manifest import manifest_of, read_model
from steersman.concepts.concept import METHODS, ConceptVector
from steersman.concepts.directions import FOLDS
from steersman.concepts.norms import BINS, NormHistogram
from steersman.concepts.positions import POSITIONS
from steersman.concepts.separation import Separation
from steersman.errors import ArtifactError

_OLD_KEYS = {"method", "position", "pairs", "clusters", "skipped", "separation"}
_KEYS = _OLD_KEYS | {"alike"}
CONCEPT = register("concept_vector", "a concept vector", {1: _OLD_KEYS, 2: _KEYS, 3: _KEYS}, chats=2)
UNITS_SINCE = 3
"""Before, labels were shuffled when a concept was refined, and its units are not known: it steers as ever,
and no gate can judge it.
"""


def save_concept(concept: ConceptVector, folder: str | Path, *, force: bool = False) -> None:
    """Write a concept vector. Raises `ArtifactError` as `save_steering` does."""
    layers = concept.layers
    tensors: Tensors = {
        "layers": np.array(layers, np.int64),
        "vectors": torch.stack([concept.vectors[layer] for layer in layers]).numpy(),
        "fold_vectors": concept.fold_vectors.numpy(),
        "fold_clusters": concept.fold_clusters.numpy(),
        "cluster_units": concept.cluster_units.numpy(),
        "unit_sums": concept.unit_sums.numpy(),
        "unit_sizes": concept.unit_sizes.numpy(),
        "norms": torch.stack([concept.norms[layer].to_tensor() for layer in layers]).numpy(),
    }
    found = [concept.separation[layer] for layer in layers]
    manifest = {
        **manifest_of(CONCEPT, concept, {"from": [dict(source) for source in concept.made_from]}),
        "method": concept.method,
        "position": concept.position,
        "pairs": concept.pairs,
        "clusters": concept.clusters,
        "skipped": concept.skipped,
        "alike": concept.alike,
        "separation": [None if one is None else [one.auroc, one.low, one.high] for one in found],
    }
    write_artifact(folder, manifest, tensors, force)


OLD = METHODS[:2]
"""The methods of version 1."""


def load_concept(source: str | Path, *, revision: str | None = None) -> ConceptVector:
    """Read a concept vector from a folder or the Hub.

    Raises `ArtifactError` for anything damaged, foreign or newer.
    """
    path, manifest, tensors = read_artifact(source, CONCEPT, revision)
    with blaming(path):
        of_model = read_model(manifest, CONCEPT, manifest["format_version"])
        architecture = of_model["architecture"]
        layers = _layers(take(tensors, "layers", np.int64, 1), architecture.layer_count)
        made_from = mapping(manifest["made_from"], "made_from")
        exact_keys(made_from, {"from"}, "made_from")
        pairs, clusters = whole(manifest["pairs"], "pairs"), whole(manifest["clusters"], "clusters")
        if not 1 <= clusters <= pairs:
            raise ArtifactError(f"{clusters} clusters and {pairs} pairs do not go together")
        shape = (len(layers), architecture.hidden_size)
        vectors = _floats(tensors, "vectors", shape)
        folds = _floats(tensors, "fold_vectors", (None, *shape))
        known = manifest["format_version"] >= UNITS_SINCE
        sums = _floats(tensors, "unit_sums" if known else "shuffled", (None, *shape))
        ids, units = _units(tensors, "cluster_units" if known else "fold_numbers", clusters, len(folds))
        sizes = _sizes(tensors, units, sums, pairs) if known else np.zeros(0, np.int64)
        norms = _norms(take(tensors, "norms", np.int64, 2), len(layers))
        nothing_left(tensors)
        return ConceptVector(
            vectors=dict(zip(layers, torch.from_numpy(vectors), strict=True)),
            separation=_separation(manifest["separation"], layers, measured=len(folds) > 0),
            fold_vectors=torch.from_numpy(folds),
            fold_clusters=torch.from_numpy(ids),
            cluster_units=torch.from_numpy(units),
            unit_sums=torch.from_numpy(sums if known else sums[:0]),
            unit_sizes=torch.from_numpy(sizes),
            norms=dict(zip(layers, norms, strict=True)),
            method=one_of(manifest["method"], "method", METHODS if manifest["format_version"] > 1 else OLD),
            position=one_of(manifest["position"], "position", POSITIONS),
            pairs=pairs,
            clusters=clusters,
            skipped=whole(manifest["skipped"], "skipped"),
            alike=whole(manifest.get("alike", 0), "alike"),
            made_from=_sources(made_from["from"]),
            **of_model,
        )


def _layers(given: np.ndarray[Any, Any], count: int) -> list[int]:
    layers: list[int] = given.tolist()
    if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < count:
        raise ArtifactError(f"layers {layers} do not ascend within the model's 0 to {count - 1}")
    return layers


def _floats(tensors: Tensors, name: str, shape: tuple[int | None, ...]) -> np.ndarray[Any, Any]:
    """A float32 tensor of a shape, None standing for any length; its own, as tensors are not read-only."""
    array = take(tensors, name, np.float32, len(shape))
    if any(size is not None and size != here for size, here in zip(shape, array.shape, strict=True)):
        expected = [size if size is not None else "any" for size in shape]
        raise ArtifactError(f"tensor {name!r} has shape {list(array.shape)}, not {expected}")
    return array.copy()


def _units(
    tensors: Tensors, name: str, clusters: int, folds: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The clusters' ids, and the unit of each; of old concepts the fold, as if it were one unit."""
    ids = take(tensors, "fold_clusters", np.int64, 1).copy()
    units = take(tensors, name, np.int64, 1).copy()
    if not len(ids) == len(units) == clusters:
        raise ArtifactError(f"{len(ids)} cluster ids and {len(units)} folds for {clusters} clusters")
    if (ids[:-1] >= ids[1:]).any():
        raise ArtifactError("the cluster ids do not ascend: a cluster may be in them twice")
    if not folds:
        units = np.maximum(units, 0)
    if set(units.tolist()) != set(range(int(units.max()) + 1)):
        raise ArtifactError("the units of the clusters are not numbered from 0")
    if folds != (min(FOLDS, int(units.max()) + 1) if clusters > 1 else 0):
        raise ArtifactError(f"the clusters do not lie in the {folds} folds")
    return ids, units


def _sizes(
    tensors: Tensors, units: np.ndarray[Any, Any], sums: np.ndarray[Any, Any], pairs: int
) -> np.ndarray[Any, Any]:
    """How many pairs each unit has."""
    sizes = take(tensors, "unit_sizes", np.int64, 1).copy()
    if not len(sizes) and not len(sums):  # an old concept that was written anew
        return sizes
    if not len(sizes) == len(sums) == int(units.max()) + 1:
        raise ArtifactError(f"{len(sums)} sums and {len(sizes)} sizes for {int(units.max()) + 1} units")
    if (sizes < np.bincount(units)).any() or sizes.sum() != pairs:
        raise ArtifactError(f"the units' sizes are not those of {pairs} pairs in {len(units)} clusters")
    return sizes


def _norms(counts: np.ndarray[Any, Any], layers: int) -> list[NormHistogram]:
    if counts.shape != (layers, BINS):
        raise ArtifactError(f"tensor 'norms' has shape {list(counts.shape)}, not {[layers, BINS]}")
    norms = [NormHistogram.from_tensor(torch.from_numpy(row.copy())) for row in counts]
    if len({histogram.count for histogram in norms}) != 1 or not norms[0].count:
        raise ArtifactError("norms: every layer has one norm of each token in scope")
    return norms


def _separation(given: Any, layers: list[int], *, measured: bool) -> dict[int, Separation | None]:
    if not isinstance(given, list) or len(given) != len(layers):
        raise ArtifactError(f"separation is not a list of {len(layers)} layers")
    found: dict[int, Separation | None] = {}
    for layer, entry in zip(layers, given, strict=True):
        if (entry is not None) != measured:
            raise ArtifactError(f"separation of layer {layer}: folds and what was held out do not fit")
        found[layer] = None if entry is None else _interval(entry, layer)
    return found


def _interval(entry: Any, layer: int) -> Separation:
    numbers = isinstance(entry, list) and all(type(value) in (float, int) for value in entry)
    if not numbers or len(entry) != 3 or not 0 <= entry[1] <= entry[0] <= entry[2] <= 1:
        raise ArtifactError(f"separation of layer {layer} is not an AUROC with its interval")
    return Separation(*map(float, entry))


def _sources(given: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(given, list):
        raise ArtifactError("made_from.from is not a list")
    return tuple(mapping(source, "made_from.from") for source in given)
