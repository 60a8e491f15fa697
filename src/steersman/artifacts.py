"""Artifacts on disk: a folder with manifest.json and tensors.safetensors, written atomically, read strictly.
Never a pickle.

docs/artifacts.md describes the format. A reader rejects whatever it does not know: a wrong hash, unknown
keys, wrong shapes, NaN, a newer version; each with one line that names the file.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from steersman.errors import ArtifactError, PlanError
from steersman.experts.bootstrap import Replicates
from steersman.experts.contrast import RoutingContrast
from steersman.experts.moments import STORED_LIMB
from steersman.experts.plausibility import (
    check_counts,
    check_profile,
    check_replicates,
    check_strata,
    check_sums,
)
from steersman.experts.profile import ExpertProfile
from steersman.experts.risk_difference import ClusterSums
from steersman.experts.strata import StratumSums
from steersman.limits import Router
from steersman.steering import Architecture, ExpertEdit, Steering, canonical_json, sha256_of

FORMAT = "steersman"
FORMAT_VERSIONS = {"steering": 1, "routing_contrast": 2, "expert_profile": 1}
"""What is written of each kind; older versions are read."""
_KINDS = {
    "steering": "a steering",
    "routing_contrast": "a routing contrast",
    "expert_profile": "an expert profile",
}
"""Each kind in words."""
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"

_COMMON = {
    "format",
    "format_version",
    "kind",
    "tool_version",
    "model",
    "architecture",
    "made_from",
    "evidence",
    "tensors_sha256",
    "manifest_sha256",
}
_COUNTS = {"pairs", "skipped", "clusters", "sums"}
_KEYS = {
    ("steering", 1): _COMMON | {"edits", "on_conflict", "fingerprint"},
    ("routing_contrast", 1): _COMMON | _COUNTS | {"weighting"},
    ("routing_contrast", 2): _COMMON
    | _COUNTS
    | {"weighting", "counted", "new_tokens", "strata", "replicates", "nuisance"},
    ("expert_profile", 1): _COMMON | {"tokens", "texts", "words", "snippets"},
}
_MOST_EXPERTS = 1 << 20
"""Far above any router there is: what a manifest says must not make the reader allocate without bound."""

_MOST_REPLICATES = 1 << 20
_MOST_STRATA = 64

_CANNOT_WRITE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "EIO", "EBUSY", "ENOTEMPTY")
}

Tensors = dict[str, np.ndarray[Any, Any]]


# ---------------------------------------------------------------- steering


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
        **_manifest("steering", steering, steering.provenance),
        "edits": edits,
        "on_conflict": steering.on_conflict,
        "fingerprint": steering.fingerprint,
        "evidence": list(steering.evidence),
    }
    _write(folder, manifest, tensors, force)


def load_steering(source: str | Path, *, revision: str | None = None) -> Steering:
    """Read a steering from a folder or the Hub.

    Raises `ArtifactError` for anything damaged, foreign or newer.
    """
    path, manifest, tensors = _read(source, "steering", revision)
    with _blaming(path):
        edits = tuple(_read_edit(entry, number, tensors) for number, entry in enumerate(manifest["edits"]))
        if tensors:
            raise ArtifactError(f"unknown tensor {min(tensors)!r} in {TENSORS}")
        steering = Steering(
            edits=edits,
            architecture=_read_architecture(manifest),
            weights_id=manifest["model"]["weights_id"],
            model=manifest["model"]["name"],
            revision=manifest["model"]["revision"],
            on_conflict=_one_of(manifest["on_conflict"], "on_conflict", ("error", "sum")),
            provenance=_mapping(manifest["made_from"], "made_from"),
            evidence=tuple(_strings(manifest["evidence"], "evidence")),
        )
        if steering.fingerprint != manifest["fingerprint"]:
            raise ArtifactError("the fingerprint does not fit the edits")
    return steering


def _read_edit(entry: Any, number: int, tensors: Tensors) -> ExpertEdit:
    name = f"edits[{number}]"
    _exact_keys(entry, {"site", "operation", "scope", "when"}, name)
    _exact_keys(entry["site"], {"point", "layers"}, f"{name}.site")
    if entry["site"]["point"] != "router":
        raise ArtifactError(f"{name}: edits at {entry['site']['point']!r} are not known to this version")
    layers = _take(tensors, f"edits.{number}.layers", np.int64, 1)
    experts = _take(tensors, f"edits.{number}.experts", np.int64, 1)
    values = _take(tensors, f"edits.{number}.strengths", np.float64, 1)
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


# ---------------------------------------------------------------- contrasts


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
        **_manifest("routing_contrast", contrast, {"from": [dict(source) for source in contrast.made_from]}),
        **counts,
        "weighting": contrast.weighting,
        "counted": contrast.counted,
        "new_tokens": contrast.new_tokens,
        "replicates": 0 if contrast.replicates is None else contrast.replicates.number,
        "nuisance": nuisance,
    }
    _write(folder, manifest, tensors, force)


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
    path, manifest, tensors = _read(source, "routing_contrast", revision)
    with _blaming(path):
        architecture = _read_architecture(manifest)
        made_from = _mapping(manifest["made_from"], "made_from")
        _exact_keys(made_from, {"from"}, "made_from")
        order = _take(tensors, "order", np.int64, 1) if "order" in tensors else None
        known = ("token", "pair") if order is None else ("token",)
        how = _How(architecture, manifest, _one_of(manifest["weighting"], "weighting", known))
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
            _exact_keys(facts, _COUNTS | {"strata", "from"}, "nuisance")
            if (facts["strata"] is None) != (contrast.strata is None):
                raise ArtifactError("nuisance: it and the contrast were not counted alike")
            nuisance = _read_counts(facts, tensors, "nuisance.", facts["from"], how)
        if tensors:
            raise ArtifactError(f"unknown tensor {min(tensors)!r} in {TENSORS}")
        return contrast.adjusted_by(nuisance)


class _How:
    """How a stored contrast was counted; a nuisance is counted as what it is regressed out of."""

    def __init__(self, architecture: Architecture, manifest: Mapping[str, Any], weighting: Any) -> None:
        known = ("target", "prompt", "answer", "generated")
        self.architecture, self.model, self.weighting = architecture, manifest["model"], weighting
        self.routers = [router for router in architecture.routers if router.steerable]
        experts = max((router.experts for router in self.routers), default=0)
        self.shape = (len(self.routers), experts)
        # Version 1 has none of these.
        self.counted = _one_of(manifest.get("counted", "target"), "counted", known)
        self.new_tokens = _whole(manifest.get("new_tokens", 0), "new_tokens")
        self.replicates = _whole(manifest.get("replicates", 0), "replicates", most=_MOST_REPLICATES)
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
    activations = _take(tensors, f"{prefix}activations", np.int64, 3)
    tokens = _take(tensors, f"{prefix}tokens", np.int64, 1)
    cluster_ids = _take(tensors, f"{prefix}cluster_ids", np.int64, 1)
    sums = _read_sums(facts, tensors, prefix, how.shape)
    if activations.shape != (2, *how.shape) or tokens.shape != (2,):
        raise ArtifactError(
            f"activations {activations.shape} do not fit the model's routers {(2, *how.shape)}"
        )
    pairs, clusters = _whole(facts["pairs"], "pairs"), _whole(facts["clusters"], "clusters")
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
        architecture=how.architecture,
        weights_id=how.model["weights_id"],
        cluster_ids=cluster_ids,
        pairs=pairs,
        skipped=_whole(facts["skipped"], "skipped"),
        weighting=how.weighting,
        model=how.model["name"],
        revision=how.model["revision"],
        made_from=tuple(_mapping(source, "made_from.from") for source in sources),
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
    given = _mapping(facts["sums"], "sums")
    _exact_keys(given, set(scalars), "sums")
    for name in scalars:
        _digits(given[name], f"sums.{name}")
    tables = {name: _take_sums(tensors, f"{prefix}sums.{name}", shape) for name in zeros}
    return ClusterSums.from_tensors(tables, given)


def _read_strata(facts: Any, tensors: Tensors, prefix: str, sums: ClusterSums, how: _How) -> StratumSums:
    _exact_keys(facts, {"starts", "n", "nn", "clusters"}, "strata")
    if how.weighting != "token":
        raise ArtifactError("strata weigh tokens: the weighting is by pair")
    starts = facts["starts"]
    if not isinstance(starts, list) or not 1 <= len(starts) <= _MOST_STRATA:
        raise ArtifactError("strata.starts is not a list of positions")
    for start in starts:
        _whole(start, "strata.starts")
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
    activations = _take(tensors, f"{prefix}replicates.activations", np.int64, 4)
    tokens = _take(tensors, f"{prefix}replicates.tokens", np.int64, 2)
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
    array = _take(tensors, name, np.int64, len(shape) + limbs)
    if array.shape != ((2, *shape) if limbs else shape):
        raise ArtifactError(f"{name} has shape {array.shape}, where {shape} fits the model's routers")
    if (array < 0).any() or (limbs and (array[0] >= STORED_LIMB).any()):
        raise ArtifactError(f"{name} holds what is not a sum")
    return array


def _digits(text: Any, name: str) -> None:
    if not isinstance(text, str) or not (text.isascii() and text.isdecimal()):
        raise ArtifactError(f"{name} is not a whole number")
    int(text)  # a ValueError where it has too many


# ---------------------------------------------------------------- profiles


def save_profile(profile: ExpertProfile, folder: str | Path, *, force: bool = False) -> None:
    """Write what experts are for. Raises `ArtifactError` as `save_steering` does."""
    manifest = {
        **_manifest("expert_profile", profile, {"from": [dict(source) for source in profile.made_from]}),
        "tokens": profile.tokens,
        "texts": profile.texts,
        "words": list(profile.words),
        "snippets": [list(snippet) for snippet in profile.snippets],
    }
    _write(folder, manifest, {name: getattr(profile, name) for name in _PROFILE_TENSORS}, force)


_PROFILE_TENSORS: dict[str, tuple[type[Any], int]] = {
    "uses": (np.int64, 2),
    "token_places": (np.int64, 3),
    "token_uses": (np.int64, 3),
    "word_seen": (np.int64, 1),
    "context_places": (np.int64, 3),
    "context_weights": (np.float64, 3),
}


def load_profile(source: str | Path, *, revision: str | None = None) -> ExpertProfile:
    """Read what experts are for from a folder or the Hub.

    Raises `ArtifactError` for anything damaged, foreign or newer.
    """
    path, manifest, tensors = _read(source, "expert_profile", revision)
    with _blaming(path):
        arrays = {name: _take(tensors, name, *form) for name, form in _PROFILE_TENSORS.items()}
        if tensors:
            raise ArtifactError(f"unknown tensor {min(tensors)!r} in {TENSORS}")
        made_from = _mapping(manifest["made_from"], "made_from")
        _exact_keys(made_from, {"from"}, "made_from")
        snippets = manifest["snippets"]
        if not isinstance(snippets, list) or not all(len(_strings(s, "a snippet")) == 3 for s in snippets):
            raise ArtifactError("snippets is not a list of [before, token, after]")
        profile = ExpertProfile(
            **arrays,
            tokens=_whole(manifest["tokens"], "tokens"),
            texts=_whole(manifest["texts"], "texts"),
            words=tuple(_strings(manifest["words"], "words")),
            snippets=tuple((before, token, after) for before, token, after in snippets),
            architecture=_read_architecture(manifest),
            weights_id=manifest["model"]["weights_id"],
            model=manifest["model"]["name"],
            revision=manifest["model"]["revision"],
            made_from=tuple(_mapping(entry, "made_from.from") for entry in made_from["from"]),
        )
        check_profile(profile)
        return profile


# ---------------------------------------------------------------- manifests


def read_manifest(source: str | Path) -> dict[str, Any]:
    """The manifest of an artifact of any kind, in a folder or on the Hub, checked by its own hash.

    Raises `ArtifactError`.
    """
    path = _resolve(source, None) / MANIFEST
    manifest = _parse(path)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f'{path}: not a Steersman artifact ("format" is not "{FORMAT}")')
    with _blaming(path):
        version_ = _whole(manifest.get("format_version"), "format_version")
        # A kind that only a newer tool knows may come with a newer version: that is the news then.
        newest = FORMAT_VERSIONS.get(str(manifest.get("kind")), max(FORMAT_VERSIONS.values()))
        if version_ > newest:
            raise ArtifactError(
                f"format version {version_} is newer than this tool reads ({newest}): upgrade steersman"
            )
        if version_ < 1:
            raise ArtifactError("format_version is 0; the first is 1")
        kind = _one_of(manifest.get("kind"), "kind", tuple(FORMAT_VERSIONS))
        _exact_keys(manifest, _KEYS[kind, version_], "the manifest")
        claimed = manifest["manifest_sha256"]
        content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
        if sha256_of(content) != claimed:
            raise ArtifactError("the manifest does not match its own sha256: it was changed or damaged")
        _text(manifest["tool_version"], "tool_version")
        _strings(manifest["evidence"], "evidence")
    return manifest


def _manifest(
    kind: str, artifact: Steering | RoutingContrast | ExpertProfile, made_from: Mapping[str, Any]
) -> dict[str, Any]:
    architecture = artifact.architecture
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSIONS[kind],
        "kind": kind,
        "tool_version": version("steersman"),
        "model": {
            "name": artifact.model,
            "revision": artifact.revision,
            "architecture_id": architecture.id,
            "weights_id": artifact.weights_id,
        },
        "architecture": {
            "model_type": architecture.model_type,
            "hidden_size": architecture.hidden_size,
            "layers": [None if router is None else _router_json(router) for router in architecture.layers],
        },
        "made_from": dict(made_from),
        "evidence": [],
    }


def _router_json(router: Router) -> dict[str, Any]:
    return {
        "rule": router.rule,
        "experts": router.experts,
        "top_k": router.top_k,
        "groups": None if router.groups is None else list(router.groups),
        "shared_experts": router.shared_experts,
        "reason": router.reason,
    }


def _read_architecture(manifest: Mapping[str, Any]) -> Architecture:
    facts, model = manifest["architecture"], manifest["model"]
    _exact_keys(model, {"name", "revision", "architecture_id", "weights_id"}, "model")
    _exact_keys(facts, {"model_type", "hidden_size", "layers"}, "architecture")
    for key in ("name", "architecture_id", "weights_id"):
        _text(model[key], f"model.{key}")
    if model["revision"] is not None:
        _text(model["revision"], "model.revision")
    if not isinstance(facts["layers"], list):
        raise ArtifactError("architecture.layers is not a list")
    architecture = Architecture(
        model_type=_text(facts["model_type"], "architecture.model_type"),
        hidden_size=_whole(facts["hidden_size"], "architecture.hidden_size"),
        layers=tuple(
            None if entry is None else _read_router(layer, entry)
            for layer, entry in enumerate(facts["layers"])
        ),
    )
    if architecture.id != model["architecture_id"]:
        raise ArtifactError("the architecture id does not fit the architecture")
    return architecture


def _read_router(layer: int, entry: Any) -> Router:
    name = f"architecture.layers[{layer}]"
    _exact_keys(entry, {"rule", "experts", "top_k", "groups", "shared_experts", "reason"}, name)
    experts = _whole(entry["experts"], f"{name}.experts", most=_MOST_EXPERTS)
    top_k = _whole(entry["top_k"], f"{name}.top_k", most=experts)
    groups = entry["groups"]
    if groups is not None:
        if not isinstance(groups, list) or len(groups) != 2:
            raise ArtifactError(f"{name}.groups is not a pair of whole numbers")
        groups = (_whole(groups[0], f"{name}.groups"), _whole(groups[1], f"{name}.groups"))
    reason = None if entry["reason"] is None else _text(entry["reason"], f"{name}.reason")
    if reason is None:
        if top_k < 1:
            raise ArtifactError(f"{name}.top_k is 0")
        if groups is not None and (not 0 < groups[1] <= groups[0] or experts % groups[0]):
            raise ArtifactError(f"{name}.groups does not divide its experts")
    return Router(
        layer=layer,
        experts=experts,
        top_k=top_k,
        rule=_text(entry["rule"], f"{name}.rule"),
        groups=groups,
        shared_experts=_whole(entry["shared_experts"], f"{name}.shared_experts"),
        reason=reason,
    )


# ---------------------------------------------------------------- reading


def _read(source: str | Path, kind: str, revision: str | None) -> tuple[Path, dict[str, Any], Tensors]:
    folder = _resolve(source, revision)
    manifest = read_manifest(folder)
    path = folder / MANIFEST
    if manifest["kind"] != kind:
        raise ArtifactError(f"{path}: this is {_KINDS[manifest['kind']]}, {_KINDS[kind]} is needed")
    file = folder / TENSORS
    try:
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
        raise ArtifactError(f"{file}: not a safetensors file of known numbers ({_one_line(error)})") from None
    return path, manifest, tensors


def _resolve(source: str | Path, revision: str | None) -> Path:
    """The local folder of an artifact: given, or downloaded from the Hub (only the two files)."""
    folder = Path(source)
    name = str(source)
    try:
        here = folder.exists()
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise ArtifactError(f"{name}: cannot be a folder ({getattr(error, 'strerror', error)})") from None
    if here or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[MANIFEST, TENSORS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        raise ArtifactError(
            f"{name}: neither a folder here nor an artifact that can be had from the Hub"
        ) from None


def _parse(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ArtifactError(f"{path.parent}: no artifact there (a folder with {MANIFEST} is expected)")
        value = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Let every complaint about an artifact's content name its file."""
    try:
        yield
    except (ArtifactError, PlanError) as error:
        raise ArtifactError(f"{path}: {_one_line(error)}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ArtifactError(f"{path}: not of the expected form ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    """What an error says, on one line that a hostile artifact cannot make long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} …"


def _take(tensors: Tensors, name: str, dtype: Any, dimensions: int) -> np.ndarray[Any, Any]:
    array = tensors.pop(name, None)
    if array is None:
        raise ArtifactError(f"tensor {name!r} is missing from {TENSORS}")
    if array.dtype != dtype or array.ndim != dimensions:
        raise ArtifactError(f"tensor {name!r} is {array.dtype} with {array.ndim} dimensions")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ArtifactError(f"tensor {name!r} holds NaN or infinity")
    return array


def _exact_keys(value: Any, keys: set[str], name: str) -> None:
    if not isinstance(value, Mapping):
        raise ArtifactError(f"{name} is not an object")
    unknown, missing = sorted(value.keys() - keys), sorted(keys - value.keys())
    if unknown or missing:
        what = f"unknown key {unknown[0]!r}" if unknown else f"key {missing[0]!r} is missing"
        raise ArtifactError(f"{name}: {what}")


def _whole(value: Any, name: str, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ArtifactError(f"{name} is not a whole number")
    if most is not None and value > most:
        raise ArtifactError(f"{name} is larger than {most}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ArtifactError(f"{name} is not a string")
    return value


def _one_of(value: Any, name: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise ArtifactError(f"{name} is {value!r}, not one of {', '.join(known)}")
    return value


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"{name} is not an object")
    return value


def _strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ArtifactError(f"{name} is not a list of strings")
    return value


# ---------------------------------------------------------------- writing


def _write(folder: str | Path, manifest: dict[str, Any], tensors: Tensors, force: bool) -> None:
    content = save_tensors({name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())})
    try:
        # As a reader will see it: keys that are numbers become strings, and sort as strings.
        manifest = json.loads(canonical_json(manifest), object_pairs_hook=_unique)
        manifest["tensors_sha256"] = hashlib.sha256(content).hexdigest()
        manifest["manifest_sha256"] = sha256_of(manifest)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{folder}: its manifest cannot be written as JSON ({_one_line(error)})"
        ) from None
    with new_folder(folder, force=force, ours={MANIFEST, TENSORS}) as place:
        (place / TENSORS).write_bytes(content)
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (place / MANIFEST).write_text(text + "\n", encoding="utf-8")


def check_free(folder: str | Path, *, force: bool = False, ours: set[str]) -> None:
    """Raise `ArtifactError` where a folder cannot be written: occupied without `force`, or holding others'
    files.
    """
    target = Path(folder)
    try:
        if target.is_symlink():
            raise ArtifactError(f"{target}: is a link; give the folder that it leads to")
        if not target.is_dir():
            if target.exists():
                raise ArtifactError(f"{target}: is not a folder")
            _check_above(target)
            return
        present = list(target.iterdir())
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written ({error.strerror})") from None
    if present and not force:
        raise ArtifactError(f"{target}: the folder is not empty; give another one, or --force to replace it")
    if foreign := sorted(entry.name for entry in present if not _is_ours(entry, ours)):
        raise ArtifactError(
            f"{target}: holds other files ({foreign[0]}); it is not replaced even with --force"
        )


def _check_above(target: Path) -> None:
    """Raise `ArtifactError` where a path goes on below what is not a folder."""
    above = next((path for path in target.absolute().parents if os.path.lexists(path)), None)
    if above is not None and not above.is_dir():
        raise ArtifactError(f"{target}: cannot be written ({above} is not a folder)")


def _is_ours(entry: Path, ours: set[str]) -> bool:
    """Whether a folder's entry is one that we wrote, by its name; a folder named as our files are is not."""
    return entry.name in ours and not (entry.is_dir() and entry.name in (MANIFEST, TENSORS))


@contextmanager
def new_folder(folder: str | Path, *, force: bool = False, ours: set[str]) -> Iterator[Path]:
    """A folder to fill, which takes its place all at once when the block ends well, and leaves nothing when
    it does not.

    Args:
        folder: Where it shall be. An occupied one is an error, unless `force`.
        force: Replace an occupied folder, if it holds nothing but `ours`.
        ours: Names of entries that such a folder has.

    Raises:
        ArtifactError: the place is occupied or cannot be written (no space, no permission).
    """
    target = Path(folder)
    if target.name in ("", ".."):
        target = target.resolve()  # "." has no name to put a folder beside
    check_free(target, force=force, ours=ours)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        yield place
        place.chmod(0o777 & ~_umask())
        _sync(place)
        check_free(target, force=force, ours=ours)
        _take_place(place, target)
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            raise ArtifactError(f"{target}: cannot be written ({error.strerror})") from None
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _take_place(place: Path, target: Path) -> None:
    if not target.exists():
        place.replace(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.replace(old)
        place.replace(target)
    finally:
        if not target.exists():  # whatever came in between, also Ctrl-C: the old one comes back
            old.replace(target)
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    """Make sure the files have reached the disk before they take their place."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


# ---------------------------------------------------------------- the Hub


def push_folder(save: Callable[[Path], None], repo_id: str, **options: Any) -> str:
    """Save an artifact into a temporary folder and upload it to the Hub; returns the commit's address."""
    from huggingface_hub import HfApi

    token, private = options.pop("token", None), options.pop("private", None)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "artifact"
        save(folder)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
        except Exception as error:
            # Whatever the Hub's client and the library below it raise for names, tokens and networks.
            library = type(error).__module__.partition(".")[0]
            if isinstance(error, OSError) or library.startswith(("huggingface_hub", "httpx")):
                raise ArtifactError(
                    f"{repo_id}: cannot be uploaded to the Hub ({_one_line(error)})"
                ) from None
            raise
