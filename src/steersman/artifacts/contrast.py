"""Routing contrasts on disk: counts, their sums and strata, replicates and nuisance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
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
    whole,
)
from steersman.artifacts.kinds import register
from steersman.artifacts.manifest import manifest_of, read_model
from steersman.errors import ArtifactError
from steersman.experts.bootstrap import Replicates
from steersman.experts.contrast import RoutingContrast
from steersman.experts.moments import STORED_LIMB
from steersman.experts.plausibility import check_counts, check_replicates, check_strata, check_sums
from steersman.experts.risk_difference import ClusterSums
from steersman.experts.strata import StratumSums
from steersman.steering import Architecture

_COUNTS = {"pairs", "skipped", "clusters", "sums"}
_NEW_IN_2 = {"counted", "new_tokens", "strata", "replicates", "nuisance"}
_NEW_IN_3 = {"alike"}
CONTRAST = register(
    "routing_contrast",
    "a routing contrast",
    {
        1: _COUNTS | {"weighting"},
        2: _COUNTS | {"weighting"} | _NEW_IN_2,
        3: _COUNTS | {"weighting"} | _NEW_IN_2 | _NEW_IN_3,
    },
    chats=3,
)
_MOST_REPLICATES = 1 << 20
_MOST_STRATA = 64


def save_contrast(contrast: RoutingContrast, folder: str | Path, *, force: bool = False) -> None:
    """Write a routing contrast. Raises `ArtifactError` as `save_steering` does."""
    tensors, counts = _counts(contrast)
    if contrast.order is not None:
        tensors["order"] = contrast.order
    nuisance = None
    if contrast.nuisance is not None:
        of_nuisance, nuisance = _counts(contrast.nuisance)
        tensors |= {f"nuisance.{name}": tensor for name, tensor in of_nuisance.items()}
        nuisance["from"] = [dict(source) for source in contrast.nuisance.made_from]
    manifest = {
        **manifest_of(CONTRAST, contrast, {"from": [dict(source) for source in contrast.made_from]}),
        **counts,
        "weighting": contrast.weighting,
        "counted": contrast.counted,
        "new_tokens": contrast.new_tokens,
        "replicates": 0 if contrast.replicates is None else contrast.replicates.number,
        "nuisance": nuisance,
    }
    write_artifact(folder, manifest, tensors, force)


def _counts(contrast: RoutingContrast) -> tuple[Tensors, dict[str, Any]]:
    """What was counted of one set of pairs: tensors, and their part of the manifest."""
    tensors: Tensors = {
        "activations": contrast.activations,
        "tokens": contrast.tokens,
        "cluster_ids": contrast.cluster_ids,
    }
    facts: dict[str, Any] = {
        "pairs": contrast.pairs,
        "skipped": contrast.skipped,
        "alike": contrast.alike,
        "clusters": contrast.clusters,
        "strata": None,
    }
    parts: list[tuple[str, ClusterSums | StratumSums]] = [("sums", contrast.sums)]
    if contrast.strata is not None:
        parts.append(("strata", contrast.strata))
    for name, part in parts:
        tables, facts[name] = part.to_tensors()
        tensors |= {f"{name}.{key}": table for key, table in tables.items()}
    if contrast.replicates is not None:
        tables, _ = contrast.replicates.to_tensors()
        tensors |= {f"replicates.{key}": table for key, table in tables.items()}
    return tensors, facts


def load_contrast(source: str | Path, *, revision: str | None = None) -> RoutingContrast:
    """Read a routing contrast from a folder or the Hub, also one of an older format.

    Raises `ArtifactError` for anything damaged, foreign or newer.
    """
    path, manifest, tensors = read_artifact(source, CONTRAST, revision)
    with blaming(path):
        made_from = mapping(manifest["made_from"], "made_from")
        exact_keys(made_from, {"from"}, "made_from")
        order = take(tensors, "order", np.int64, 1) if "order" in tensors else None
        known = ("token", "pair") if order is None else ("token",)
        how = _How(manifest, one_of(manifest["weighting"], "weighting", known))
        if order is not None and (how.replicates, manifest.get("strata"), manifest.get("nuisance")) != (
            0,
            None,
            None,
        ):
            raise ArtifactError("an imported ranking has neither strata nor replicates nor a nuisance")
        contrast = _read_counts(manifest, tensors, "", made_from["from"], how, order)
        nuisance = None
        if manifest.get("nuisance") is not None:
            facts = manifest["nuisance"]
            new = _NEW_IN_3 if manifest["format_version"] > 2 else set()
            exact_keys(facts, _COUNTS | new | {"strata", "from"}, "nuisance")
            if (facts["strata"] is None) != (contrast.strata is None):
                raise ArtifactError("nuisance: it and the contrast were not counted alike")
            nuisance = _read_counts(facts, tensors, "nuisance.", facts["from"], how)
        nothing_left(tensors)
        return contrast.adjusted_by(nuisance)


class _How:
    """How a stored contrast was counted; a nuisance is counted as what it is regressed out of."""

    def __init__(self, manifest: Mapping[str, Any], weighting: Any) -> None:
        known = ("target", "prompt", "answer", "generated")
        self.of_model = read_model(manifest, CONTRAST, manifest["format_version"])
        self.weighting = weighting
        architecture: Architecture = self.of_model["architecture"]
        self.routers = [router for router in architecture.routers if router.steerable]
        experts = max((router.experts for router in self.routers), default=0)
        self.shape = (len(self.routers), experts)
        # Version 1 has none of these.
        self.counted = one_of(manifest.get("counted", "target"), "counted", known)
        self.new_tokens = whole(manifest.get("new_tokens", 0), "new_tokens")
        self.replicates = whole(manifest.get("replicates", 0), "replicates", most=_MOST_REPLICATES)
        if (self.counted == "generated") != (self.new_tokens > 0):
            raise ArtifactError(f"new_tokens is {self.new_tokens}, but what was counted is {self.counted}")


def _read_counts(
    facts: Mapping[str, Any],
    tensors: Tensors,
    prefix: str,
    sources: Any,
    how: _How,
    order: np.ndarray[Any, Any] | None = None,
) -> RoutingContrast:
    """One set of pairs' counts, checked; their tensors, whose names begin with the prefix, are taken."""
    activations = take(tensors, f"{prefix}activations", np.int64, 3)
    tokens = take(tensors, f"{prefix}tokens", np.int64, 1)
    cluster_ids = take(tensors, f"{prefix}cluster_ids", np.int64, 1)
    sums = _read_sums(facts, tensors, prefix, how.shape)
    if activations.shape != (2, *how.shape) or tokens.shape != (2,):
        raise ArtifactError(
            f"activations {activations.shape} do not fit the model's routers {(2, *how.shape)}"
        )
    pairs, clusters = whole(facts["pairs"], "pairs"), whole(facts["clusters"], "clusters")
    fewest = 1 if order is None else 0
    most = tokens.min() if order is None else 0
    if not fewest <= len(cluster_ids) == sums.clusters == clusters <= pairs <= most:
        raise ArtifactError(
            f"{len(cluster_ids)} cluster ids, {clusters} clusters, {pairs} pairs and "
            f"{tokens.tolist()} tokens do not go together"
        )
    if (cluster_ids[:-1] >= cluster_ids[1:]).any():
        raise ArtifactError("the cluster ids do not ascend: a cluster may be in them twice")
    check_counts(activations, tokens, how.routers)
    if order is not None:
        _check_order(order, activations)
    check_sums(sums, activations, tokens, how.weighting, pairs)
    if not isinstance(sources, list):
        raise ArtifactError("made_from.from is not a list")
    strata = (
        None if facts.get("strata") is None else _read_strata(facts["strata"], tensors, prefix, sums, how)
    )
    columns = 2 if strata is None else strata.columns
    return RoutingContrast(
        activations=activations,
        tokens=tokens,
        sums=sums,
        cluster_ids=cluster_ids,
        pairs=pairs,
        skipped=whole(facts["skipped"], "skipped"),
        alike=whole(facts.get("alike", 0), "alike"),
        weighting=how.weighting,
        **how.of_model,
        made_from=tuple(mapping(source, "made_from.from") for source in sources),
        order=order,
        counted=how.counted,
        new_tokens=how.new_tokens,
        strata=strata,
        replicates=_read_replicates(tensors, prefix, columns, sums, cluster_ids, how),
    )


def _check_order(order: np.ndarray[Any, Any], activations: np.ndarray[Any, Any]) -> None:
    if not np.array_equal(np.sort(order), np.flatnonzero(activations[0] >= 0)):
        raise ArtifactError("the order of an imported ranking does not name every expert once")


def _read_sums(
    facts: Mapping[str, Any], tensors: Tensors, prefix: str, shape: tuple[int, int]
) -> ClusterSums:
    zeros, scalars = ClusterSums.zeros(0, 0).to_tensors()
    given = mapping(facts["sums"], "sums")
    exact_keys(given, set(scalars), "sums")
    for name in scalars:
        _digits(given[name], f"sums.{name}")
    tables = {name: _take_sums(tensors, f"{prefix}sums.{name}", shape) for name in zeros}
    return ClusterSums.from_tensors(tables, given)


def _read_strata(facts: Any, tensors: Tensors, prefix: str, sums: ClusterSums, how: _How) -> StratumSums:
    exact_keys(facts, {"starts", "n", "nn", "clusters"}, "strata")
    if how.weighting != "token":
        raise ArtifactError("strata weigh tokens: the weighting is by pair")
    starts = facts["starts"]
    if not isinstance(starts, list) or not 1 <= len(starts) <= _MOST_STRATA:
        raise ArtifactError("strata.starts is not a list of positions")
    for start in starts:
        whole(start, "strata.starts")
    if starts[0] != 0 or any(one >= other for one, other in itertools.pairwise(starts)):
        raise ArtifactError("strata.starts do not ascend from 0")
    columns = 2 * len(starts)
    half = columns * (columns + 1) // 2
    for name, length in (("n", columns), ("nn", half)):
        if not isinstance(facts[name], list) or len(facts[name]) != length:
            raise ArtifactError(f"strata.{name} is not a list of {length} numbers")
        for value in facts[name]:
            _digits(value, f"strata.{name}")
    _digits(facts["clusters"], "strata.clusters")
    shapes: dict[str, tuple[int, ...]] = {"a": (columns,), "aa": (half,), "an": (columns, columns)}
    tables = {
        name: _take_sums(tensors, f"{prefix}strata.{name}", (*first, *how.shape))
        for name, first in shapes.items()
    }
    strata = StratumSums.from_tensors(tables, facts)
    check_strata(strata, sums)
    return strata


def _read_replicates(
    tensors: Tensors,
    prefix: str,
    columns: int,
    sums: ClusterSums,
    cluster_ids: np.ndarray[Any, Any],
    how: _How,
) -> Replicates | None:
    if not how.replicates:
        return None
    activations = take(tensors, f"{prefix}replicates.activations", np.int64, 4)
    tokens = take(tensors, f"{prefix}replicates.tokens", np.int64, 2)
    shape = (how.replicates, columns)
    if activations.shape != (*shape, *how.shape) or tokens.shape != shape:
        raise ArtifactError(f"replicates have the shape {activations.shape}, not {(*shape, *how.shape)}")
    replicates = Replicates(activations, tokens)
    check_replicates(replicates, cluster_ids, sums, how.routers, how.weighting)
    return replicates


def _take_sums(tensors: Tensors, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A tensor of sums: int64, or two limbs of 62 bits."""
    there = tensors.get(name)
    limbs = there is not None and there.ndim == len(shape) + 1
    array = take(tensors, name, np.int64, len(shape) + limbs)
    if array.shape != ((2, *shape) if limbs else shape):
        raise ArtifactError(f"{name} has shape {array.shape}, where {shape} fits the model's routers")
    if (array < 0).any() or (limbs and (array[0] >= STORED_LIMB).any()):
        raise ArtifactError(f"{name} holds what is not a sum")
    return array


def _digits(text: Any, name: str) -> None:
    if not isinstance(text, str) or not (text.isascii() and text.isdecimal()):
        raise ArtifactError(f"{name} is not a whole number")
    int(text)  # a ValueError where it has too many
