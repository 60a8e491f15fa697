"""Causal screens on disk: effects of single experts, and the sets chosen."""

from __future__ import annotations

import math
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
    strings,
    take,
    text_in,
    whole,
)
from steersman.artifacts.kinds import register
from steersman.artifacts.manifest import manifest_of, read_model
from steersman.edits import SCOPES
from steersman.errors import ArtifactError
from steersman.experts.causal import CausalScreen
from steersman.experts.causal_effects import DIRECTIONS, SIGNS, ChosenSet, Effects, Gate, Pick
from steersman.limits import broken_limit
from steersman.steering import Architecture

_FACTS = {
    "items",
    "clusters",
    "choosing_items",
    "method",
    "scope",
    "gate",
    "sets",
    "subsets",
    "harm",
    "notes",
    "risk_difference",
}
SCREEN = register("causal_screen", "a causal screen", {1: _FACTS, 2: _FACTS}, chats=2)
METHODS = ("exact", "estimate", "auto")


def save_screen(screen: CausalScreen, folder: str | Path, *, force: bool = False) -> None:
    """Write a causal screen. Raises `ArtifactError` as `save_steering` does."""
    tensors = {"exact": screen.exact.astype(np.int64), **_tensors_of(screen.effects, "effects")}
    if screen.subsets is not None:
        tensors |= _tensors_of(screen.subsets, "subsets")
    if screen.risk_difference is not None:
        tensors["risk_difference"] = np.nan_to_num(screen.risk_difference, nan=0.0)
    manifest = {
        **manifest_of(SCREEN, screen, {"from": [dict(source) for source in screen.made_from]}),
        "items": screen.items,
        "clusters": screen.clusters,
        "choosing_items": screen.choosing_items,
        "method": screen.method,
        "scope": screen.scope,
        "gate": vars(screen.gate),
        "sets": {direction: _set_to_json(chosen) for direction, chosen in screen.sets.items()},
        "subsets": screen.subsets is not None,
        "risk_difference": screen.risk_difference is not None,
        "harm": [dict(entry) for entry in screen.harm],
        "notes": list(screen.notes),
    }
    write_artifact(folder, manifest, tensors, force)


def load_screen(source: str | Path, *, revision: str | None = None) -> CausalScreen:
    """Read a causal screen from a folder or the Hub.

    Raises `ArtifactError` for anything damaged, foreign or newer.
    """
    path, manifest, tensors = read_artifact(source, SCREEN, revision)
    with blaming(path):
        of_model = read_model(manifest, SCREEN, manifest["format_version"])
        architecture: Architecture = of_model["architecture"]
        routers = [router for router in architecture.routers if router.steerable]
        shape = (len(routers), max((router.experts for router in routers), default=0))
        there = np.array([[expert < router.experts for expert in range(shape[1])] for router in routers])
        effects = _effects_of(tensors, "effects", there)
        subsets = _effects_of(tensors, "subsets", there) if _flag(manifest, "subsets") else None
        exact = _bits(take(tensors, "exact", np.int64, 3), "exact", effects.measured)
        difference = None
        if _flag(manifest, "risk_difference"):
            difference = take(tensors, "risk_difference", np.float64, 2)
            if difference.shape != shape or (np.abs(difference) > 1).any():
                raise ArtifactError("risk_difference holds what is no difference of two rates")
            difference = np.where(there, difference, np.nan)
        nothing_left(tensors)
        made_from = mapping(manifest["made_from"], "made_from")
        exact_keys(made_from, {"from"}, "made_from")
        sets = mapping(manifest["sets"], "sets")
        if not set(sets) <= set(DIRECTIONS) or not isinstance(manifest["harm"], list):
            raise ArtifactError(f"sets has other directions than {', '.join(DIRECTIONS)}, or harm is no list")
        clusters, items = whole(manifest["clusters"], "clusters"), whole(manifest["items"], "items")
        if clusters > items:
            raise ArtifactError(f"{clusters} clusters of {items} items do not go together")
        return CausalScreen(
            effects=effects,
            exact=exact,
            gate=_gate(manifest["gate"]),
            sets={
                direction: _read_set(sets[direction], architecture)
                for direction in DIRECTIONS
                if direction in sets
            },
            items=items,
            clusters=clusters,
            choosing_items=whole(manifest["choosing_items"], "choosing_items"),
            method=one_of(manifest["method"], "method", METHODS),
            scope=one_of(manifest["scope"], "scope", tuple(SCOPES)),
            **of_model,
            made_from=tuple(mapping(entry, "made_from.from") for entry in made_from["from"]),
            subsets=subsets,
            risk_difference=difference,
            harm=tuple(mapping(entry, "harm") for entry in manifest["harm"]),
            notes=tuple(strings(manifest["notes"], "notes")),
        )


def _tensors_of(effects: Effects, name: str) -> Tensors:
    measured = effects.measured
    return {
        f"{name}.measured": measured.astype(np.int64),
        **{
            f"{name}.{key}": np.where(measured, getattr(effects, key), 0.0)
            for key in ("mean", "standard_error", "p_values")
        },
    }


def _effects_of(tensors: Tensors, name: str, there: np.ndarray[Any, Any]) -> Effects:
    whole_shape = (len(SIGNS), *there.shape)
    allowed = np.broadcast_to(there, whole_shape)
    measured = _bits(take(tensors, f"{name}.measured", np.int64, 3), f"{name}.measured", allowed)
    values = {}
    for key in ("mean", "standard_error", "p_values"):
        array = take(tensors, f"{name}.{key}", np.float64, 3)
        if array.shape != whole_shape or array[~measured].any():
            raise ArtifactError(f"{name}.{key} does not fit the experts that were measured")
        values[key] = np.where(measured, array, np.nan)
    if (values["standard_error"][measured] < 0).any():
        raise ArtifactError(f"{name}.standard_error holds what is no error")
    if ((values["p_values"][measured] < 0) | (values["p_values"][measured] > 1)).any():
        raise ArtifactError(f"{name}.p_values holds what is no probability")
    return Effects(**values, measured=measured)


def _bits(
    array: np.ndarray[Any, Any], name: str, allowed: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if array.shape != allowed.shape or not np.isin(array, (0, 1)).all() or (array[~allowed] != 0).any():
        raise ArtifactError(f"{name} does not say yes or no of the model's experts")
    return array.astype(bool)


def _flag(manifest: Mapping[str, Any], name: str) -> bool:
    if not isinstance(manifest[name], bool):
        raise ArtifactError(f"{name} is neither true nor false")
    return bool(manifest[name])


def _gate(value: Any) -> Gate:
    exact_keys(value, {"q", "effect"}, "gate")
    q, effect = _number(value["q"], "gate.q"), _number(value["effect"], "gate.effect")
    if not (0 < q <= 1 and effect >= 0):
        raise ArtifactError("gate holds what is no gate")
    return Gate(q, effect)


def _set_to_json(chosen: ChosenSet) -> dict[str, Any]:
    return {
        "picks": [vars(pick) for pick in chosen.picks],
        "reason": chosen.reason,
        "candidates": chosen.candidates,
        "shift": chosen.shift,
        "shift_error": chosen.shift_error,
    }


def _read_set(value: Any, architecture: Architecture) -> ChosenSet:
    exact_keys(value, {"picks", "reason", "candidates", "shift", "shift_error"}, "sets")
    if not isinstance(value["picks"], list):
        raise ArtifactError("sets.picks is not a list")
    chosen = ChosenSet(
        tuple(_read_pick(pick, architecture) for pick in value["picks"]),
        text_in(value["reason"], "sets.reason"),
        whole(value["candidates"], "sets.candidates"),
        _number(value["shift"], "sets.shift"),
        _number(value["shift_error"], "sets.shift_error"),
    )
    if len({(pick.layer, pick.expert) for pick in chosen.picks}) < len(chosen.picks):
        raise ArtifactError("sets name an expert twice")
    for layer, strengths in chosen.strengths.items():
        if broken := broken_limit(architecture.router(layer), strengths):
            raise ArtifactError(f"sets break a limit of layer {layer}: {broken}")
    return chosen


def _read_pick(value: Any, architecture: Architecture) -> Pick:
    exact_keys(value, {"layer", "expert", "strength", "gain", "standard_error"}, "sets.picks")
    layer, expert = whole(value["layer"], "layer"), whole(value["expert"], "expert")
    if expert >= architecture.router(layer).experts:
        raise ArtifactError(f"sets name expert {expert} of layer {layer}, which has fewer")
    strength = _number(value["strength"], "strength")
    if strength not in (-1.0, 1.0):
        raise ArtifactError(f"sets hold the strength {strength:g}, where −1 and 1 are screened")
    return Pick(
        layer, expert, strength, _number(value["gain"], "gain"), _number(value["standard_error"], "error")
    )


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArtifactError(f"{name} is not a number")
    return float(value)
