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
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from steersman.errors import ArtifactError, PlanError
from steersman.experts.contrast import RoutingContrast
from steersman.experts.risk_difference import ClusterSums
from steersman.limits import Router
from steersman.steering import Architecture, ExpertEdit, Steering, canonical_json, sha256_of

FORMAT = "steersman"
FORMAT_VERSION = 1
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
_KEYS = {
    "steering": _COMMON | {"edits", "on_conflict", "fingerprint"},
    "routing_contrast": _COMMON | {"weighting", "pairs", "skipped", "clusters", "sums"},
}
_LIMB = 1 << 62
_MOST_EXPERTS = 1 << 20
"""Far above any router there is: what a manifest says must not make the reader allocate without bound."""

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
    tensors: Tensors = {
        "activations": contrast.activations,
        "tokens": contrast.tokens,
        "cluster_ids": contrast.cluster_ids,
    }
    if contrast.order is not None:
        tensors["order"] = contrast.order
    scalars: dict[str, str] = {}
    for name, value in _sums(contrast.sums):
        if isinstance(value, np.ndarray):
            tensors[f"sums.{name}"] = _as_limbs(value)
        else:
            scalars[name] = str(value)  # of any size: JSON numbers are not
    manifest = {
        **_manifest("routing_contrast", contrast, {"from": [dict(source) for source in contrast.made_from]}),
        "weighting": contrast.weighting,
        "pairs": contrast.pairs,
        "skipped": contrast.skipped,
        "clusters": contrast.clusters,
        "sums": scalars,
    }
    _write(folder, manifest, tensors, force)


def load_contrast(source: str | Path, *, revision: str | None = None) -> RoutingContrast:
    """Read a routing contrast from a folder or the Hub.

    Raises `ArtifactError` for anything damaged, foreign or newer.
    """
    path, manifest, tensors = _read(source, "routing_contrast", revision)
    with _blaming(path):
        architecture = _read_architecture(manifest)
        routers = [router for router in architecture.routers if router.steerable]
        shape = (len(routers), max((router.experts for router in routers), default=0))
        activations = _take(tensors, "activations", np.int64, 3)
        tokens = _take(tensors, "tokens", np.int64, 1)
        cluster_ids = _take(tensors, "cluster_ids", np.int64, 1)
        order = _take(tensors, "order", np.int64, 1) if "order" in tensors else None
        sums = _read_sums(manifest, tensors, shape)
        if tensors:
            raise ArtifactError(f"unknown tensor {min(tensors)!r} in {TENSORS}")
        if activations.shape != (2, *shape) or tokens.shape != (2,):
            raise ArtifactError(
                f"activations {activations.shape} do not fit the model's routers {(2, *shape)}"
            )
        known = ("token", "pair") if order is None else ("token",)
        weighting = _one_of(manifest["weighting"], "weighting", known)
        pairs, clusters = _whole(manifest["pairs"], "pairs"), _whole(manifest["clusters"], "clusters")
        fewest = 1 if order is None else 0
        most = tokens.min() if order is None else 0
        if not fewest <= len(cluster_ids) == sums.clusters == clusters <= pairs <= most:
            raise ArtifactError(
                f"{len(cluster_ids)} cluster ids, {clusters} clusters, {pairs} pairs and "
                f"{tokens.tolist()} tokens do not go together"
            )
        if (cluster_ids[:-1] >= cluster_ids[1:]).any():
            raise ArtifactError("the cluster ids do not ascend: a cluster may be in them twice")
        _check_counts(activations, tokens, routers)
        if order is not None:
            _check_order(order, activations)
        _check_sums(sums, activations, tokens, weighting, pairs)
        made_from = _mapping(manifest["made_from"], "made_from")
        _exact_keys(made_from, {"from"}, "made_from")
        if not isinstance(made_from["from"], list):
            raise ArtifactError("made_from.from is not a list")
        return RoutingContrast(
            activations=activations,
            tokens=tokens,
            sums=sums,
            architecture=architecture,
            weights_id=manifest["model"]["weights_id"],
            cluster_ids=cluster_ids,
            pairs=pairs,
            skipped=_whole(manifest["skipped"], "skipped"),
            weighting=weighting,
            model=manifest["model"]["name"],
            revision=manifest["model"]["revision"],
            made_from=tuple(_mapping(source, "made_from.from") for source in made_from["from"]),
            order=order,
        )


def _check_order(order: np.ndarray[Any, Any], activations: np.ndarray[Any, Any]) -> None:
    if not np.array_equal(np.sort(order), np.flatnonzero(activations[0] >= 0)):
        raise ArtifactError("the order of an imported ranking does not name every expert once")


def _check_counts(
    activations: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any], routers: list[Router]
) -> None:
    for row, router in enumerate(routers):
        counts, padding = activations[:, row, : router.experts], activations[:, row, router.experts :]
        if (padding != -1).any() or (counts < 0).any() or (counts > tokens[:, None]).any():
            raise ArtifactError(f"layer {router.layer}: impossible activation counts")
        # As Python integers: a sum that leaves 64 bits could come round to the right number.
        if (counts.astype(object).sum(axis=1) != tokens.astype(object) * router.top_k).any():
            raise ArtifactError(
                f"layer {router.layer}: counts do not add up to {router.top_k} experts a token"
            )


def _check_sums(
    sums: ClusterSums,
    activations: np.ndarray[Any, Any],
    tokens: np.ndarray[Any, Any],
    weighting: str,
    pairs: int,
) -> None:
    """The sums are of these counts: in the weighting by tokens the same, by pairs of as many pairs."""
    for side, (uses, total) in enumerate(((sums.a1, sums.n1), (sums.a2, sums.n2))):
        used = np.maximum(activations[side], 0)
        if weighting == "token":
            fits = total == tokens[side] and np.array_equal(uses, used)
        else:
            fits = (
                total > 0
                and total % pairs == 0
                and bool(((uses <= total) & ((uses > 0) <= (used > 0))).all())
            )
        if not fits or total < 1:
            raise ArtifactError("the sums over clusters are not those of the activations")
    exact = {name: _exact(value) for name, value in _sums(sums)}
    if not sums.clusters:  # an imported ranking: counts, and nothing of how they spread
        if any(np.any(value) for name, value in exact.items() if name not in ("a1", "a2", "n1", "n2")):
            raise ArtifactError("an imported ranking has no sums of products over clusters")
        return
    for one, other in itertools.combinations_with_replacement(("a1", "a2", "n1", "n2"), 2):
        product = exact[one + other]
        if one == other:  # between all clusters alike and all in one
            possible = (product * sums.clusters >= exact[one] ** 2) & (product <= exact[one] ** 2)
            possible &= product <= exact[f"n{one[1]}" * 2]  # a ≤ n in each
        else:
            possible = (product**2 <= exact[one + one] * exact[other + other]) & (
                product <= exact[one] * exact[other]
            )
        if (one, other) == ("n1", "n2"):  # no cluster without a token on either side
            possible &= product >= max(sums.n1, sums.n2)
        if not np.all(possible):
            raise ArtifactError(f"sums.{one}{other} cannot be a sum of products over clusters")


def _exact(value: Any) -> Any:
    return value.astype(object) if isinstance(value, np.ndarray) else value


def _sums(sums: ClusterSums) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(sums, field.name)) for field in fields(sums))


def _as_limbs(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Integers as they are (int64), or of any size as two limbs of 62 bits, [2, …] low first."""
    if values.dtype == np.int64:
        return values
    high = values // _LIMB
    return np.stack([(values % _LIMB).astype(np.int64), high.astype(np.int64)])


def _read_sums(manifest: Mapping[str, Any], tensors: Tensors, shape: tuple[int, int]) -> ClusterSums:
    zeros = dict(_sums(ClusterSums.zeros(0, 0)))
    scalars = _mapping(manifest["sums"], "sums")
    _exact_keys(scalars, {name for name, value in zeros.items() if isinstance(value, int)}, "sums")
    values: dict[str, Any] = {}
    for name, value in zeros.items():
        if isinstance(value, int):
            text = scalars[name]
            if not isinstance(text, str) or not (text.isascii() and text.isdecimal()):
                raise ArtifactError(f"sums.{name} is not a whole number")
            values[name] = int(text)
            continue
        limbs = tensors.get(f"sums.{name}")
        array = _take(tensors, f"sums.{name}", np.int64, 2 if limbs is None else limbs.ndim)
        if (array < 0).any() or (array.ndim == 3 and (array[0] >= _LIMB).any()):
            raise ArtifactError(f"sums.{name} holds what is not a sum")
        if array.ndim == 3 and len(array) == 2:
            array = array[0].astype(object) + array[1].astype(object) * _LIMB
        if array.shape != shape:
            raise ArtifactError(f"sums.{name} has shape {array.shape}, the model's routers {shape}")
        values[name] = array
    return ClusterSums(**values)


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
        if _whole(manifest.get("format_version"), "format_version") > FORMAT_VERSION:
            raise ArtifactError(
                f"format version {manifest['format_version']} is newer than this tool reads "
                f"({FORMAT_VERSION}): upgrade steersman"
            )
        if manifest["format_version"] < 1:
            raise ArtifactError("format_version is 0; the first is 1")
        kind = _one_of(manifest.get("kind"), "kind", tuple(_KEYS))
        _exact_keys(manifest, _KEYS[kind], "the manifest")
        claimed = manifest["manifest_sha256"]
        content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
        if sha256_of(content) != claimed:
            raise ArtifactError("the manifest does not match its own sha256: it was changed or damaged")
        _text(manifest["tool_version"], "tool_version")
        _strings(manifest["evidence"], "evidence")
    return manifest


def _manifest(
    kind: str, artifact: Steering | RoutingContrast, made_from: Mapping[str, Any]
) -> dict[str, Any]:
    architecture = artifact.architecture
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
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
        raise ArtifactError(f"{path}: this is a {manifest['kind']}, a {kind} is needed")
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
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
