"""Causal screens on disk: there and back, and everything that is no screen refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from scipy import stats

from steersman import ArtifactError, CausalScreen, PlanError
from steersman.certainty import CANNOT_TELL, NOT_SHOWN, SHOWN
from steersman.experts.causal_effects import ChosenSet, Effects, Gate, Pick
from steersman.limits import Router
from steersman.steering import Architecture, sha256_of

ROUTERS = (Router(0, 4, 2, "softmax-topk"), None, Router(2, 6, 2, "softmax-topk"))


def screen_of(seed: int = 0) -> CausalScreen:
    """A made-up screen of two layers of 4 and 6 experts; expert 5 of layer 2 causes something."""
    generator = np.random.default_rng(seed)
    measured = np.zeros((2, 2, 6), bool)
    measured[:, 0, :4] = measured[:, 1] = True
    mean = np.where(measured, generator.normal(0, 0.01, measured.shape), np.nan)
    mean[1, 1, 5], mean[0, 1, 2] = 0.9, -0.4
    error = np.where(measured, 0.02, np.nan)
    p = np.where(measured, 0.5, np.nan)
    p[1, 1, 5] = p[0, 1, 2] = 1e-9
    effects = Effects(mean, error, p, measured)
    return CausalScreen(
        effects=effects,
        exact=measured & (np.abs(np.nan_to_num(mean)) > 0.1),
        gate=Gate(),
        sets={
            "toward": ChosenSet((Pick(2, 5, 1.0, 0.8, 0.1),), "no candidate is left", 1, 0.9, 0.05),
            "reversed": ChosenSet((), "the best of 1 more adds 0.000 nats", 1),
        },
        items=40,
        clusters=30,
        choosing_items=41,
        method="auto",
        scope="answer",
        architecture=Architecture("olmoe", 8, ROUTERS),
        weights_id="a" * 64,
        model="made/up",
        made_from=({"kind": "items", "role": "items", "name": "t", "sha256": "b" * 64},),
        subsets=effects,
        risk_difference=np.where(measured[0], generator.uniform(-1, 1, (2, 6)), np.nan),
        harm=({"task": "t", "difference": {"difference": 0.0}},),
        notes=("run exactly, all of them",),
    )


def test_rounding_does_not_order_effects() -> None:
    for seed in range(6):
        screen = screen_of()
        noise = 1 + 1e-6 * np.random.default_rng(seed).normal(size=3)
        screen.effects.mean[1, 1, [1, 3, 5]] = 0.9 * noise
        screen.effects.p_values[1, 1, [1, 3]] = 1e-9
        assert [expert for _, expert, score in screen.ranking() if abs(score) > 0.8] == [1, 3, 5]
        first = screen.table().head(3)
        assert first["expert"].tolist() == [1, 3, 5]


def test_there_and_back(tmp_path: Path) -> None:
    screen = screen_of()
    screen.save_pretrained(tmp_path / "c")
    again = CausalScreen.from_pretrained(tmp_path / "c")
    for field in fields(screen):
        one, other = (getattr(each, field.name) for each in (screen, again))
        if isinstance(one, Effects):
            for name in ("mean", "standard_error", "p_values", "measured", "q_values"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        elif isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other, field.name
    assert again.sha256 == screen.sha256
    assert again.select().fingerprint == screen.select().fingerprint
    bare = replace(screen, subsets=None, risk_difference=None, sets={})
    bare.save_pretrained(tmp_path / "bare")
    again = CausalScreen.from_pretrained(tmp_path / "bare")
    assert again.subsets is None
    assert again.risk_difference is None
    assert again.agreement() is None


def test_what_passes_and_what_is_selected() -> None:
    screen = screen_of()
    assert screen.ranking() == [(2, 5, 0.9)]
    assert screen.ranking(reverse=True) == [(2, 2, -0.4)]
    assert screen.select().edits[0].scope == "answer"
    assert screen.select(deactivate=1, reverse=True).strengths == {2: {2: -1.0}}
    assert screen.activate.mean[1, 5] == 0.9
    assert screen.deactivate.mean[1, 2] == -0.4
    with pytest.raises(PlanError, match="chose no expert reversed: the best of 1 more"):
        screen.select(reverse=True)
    with pytest.raises(PlanError, match=r"\(--least-t\), or take single experts: up to 1 pass .* --top\)"):
        screen.select(reverse=True)
    with pytest.raises(PlanError, match="activate asks for 1 expert, but 0 pass"):
        screen.select(activate=1, reverse=True)


def test_significant_is_not_enough() -> None:
    screen = screen_of()
    small = replace(screen.effects, mean=screen.effects.mean / 10)
    nothing = replace(screen, effects=small, subsets=None)
    assert not nothing.found
    assert "the largest is 0.090 nats, 2 are significant but too small" in nothing.reason
    assert "no expert causes" not in nothing.reason


@pytest.mark.parametrize(
    ("scale", "error", "verdict"), [(1, 1, None), (0.0, 0.0, NOT_SHOWN), (0.0, 1e3, CANNOT_TELL)]
)
def test_what_may_be_said_of_experts(scale: float, error: float, verdict: str | None) -> None:
    """That an effect does not pass the gate says nothing by itself: it may have been measured too badly."""
    screen = screen_of()
    old = screen.effects
    effects = replace(
        old,
        mean=old.mean * scale,
        standard_error=old.standard_error * error,
        p_values=old.p_values if verdict is None else old.p_values * 0 + 1.0,
    )
    changed = replace(screen, effects=effects, subsets=None)
    measured = effects.measured.any(axis=0)
    assert ((changed.verdicts == SHOWN) == changed.passing.any(axis=0)).all()
    assert all(found is None for found in changed.verdicts[~measured])
    if verdict is not None:
        assert set(changed.verdicts[measured]) == {verdict}
        said = "experts none is shown" if verdict == NOT_SHOWN else "nobody can tell"
        assert f"of {measured.sum()} {said}" in changed.reason


def test_what_is_detectable_is_found_with_that_chance() -> None:
    """One effect of that size among 600 that are none, in many screens of 30 items."""
    found, generator = 0, np.random.default_rng(0)
    for _ in range(200):
        values = generator.normal(0, 1, (2, 1, 300, 30))
        none = screen_from(values)
        values[1, 0, 7] += none.detectable
        screen = screen_from(values)
        found += bool(screen.passing[1, 0, 7])
        assert 0.1 < none.detectable < 2
    assert 0.74 < found / 200 < 0.93
    sure = screen_from(values / 1000)
    assert sure.detectable == sure.gate.effect
    assert (sure.verdict, none.verdict) == (NOT_SHOWN, CANNOT_TELL)
    assert (
        f"Verdict: cannot tell; 30 items in 30 groups show an effect from {none.detectable:.2f} nats on"
        in (none.reason)
    )


def screen_from(values: np.ndarray) -> CausalScreen:
    """A screen of one layer in which effects have these changes of d: [signs, 1, experts, items]."""
    count = values.shape[-1]
    error = values.std(axis=-1, ddof=1) / math.sqrt(count)
    mean = values.mean(axis=-1)
    p = 2 * stats.t.sf(np.abs(mean / error), count - 1)
    effects = Effects(mean, error, p, np.ones(mean.shape, bool))
    old = screen_of()
    return replace(old, effects=effects, subsets=None, clusters=count, items=count, sets={})


def tampered(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change a saved screen and make its hashes right again."""
    tensors = load_file(folder / "tensors.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest, tensors)
    content = save(tensors)
    (folder / "tensors.safetensors").write_bytes(content)
    import hashlib

    manifest["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = sha256_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _put(name: str, place: tuple[int, ...], value: float) -> Callable[[Any, Any], None]:
    def change(_: Any, tensors: Any) -> None:
        tensors[name][place] = value

    return change


def _pick(**values: Any) -> Callable[[Any, Any], object]:
    return lambda manifest, _: manifest["sets"]["toward"]["picks"][0].update(values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_put("effects.p_values", (0, 0, 0), 1.5), "no probability"),
        (_put("effects.standard_error", (0, 0, 0), -1.0), "no error"),
        (_put("effects.mean", (0, 0, 5), 1.0), "does not fit the experts"),
        (_put("effects.mean", (0, 0, 0), float("nan")), "NaN or infinity"),
        (_put("effects.measured", (0, 0, 5), 1), "does not say yes or no"),
        (_put("exact", (0, 0, 0), 2), "does not say yes or no"),
        (_put("risk_difference", (0, 0), 1.5), "no difference of two rates"),
        (lambda _, tensors: tensors.update(more=np.zeros(1)), "unknown tensor 'more'"),
        (lambda _, tensors: tensors.pop("exact"), "'exact' is missing"),
        (_pick(strength=0.5), "strength 0.5"),
        (_pick(expert=6), "expert 6 of layer 2"),
        (_pick(layer=1), "layer 1 has no router"),
        (_pick(gain="much"), "gain is not a number"),
        (_pick(more=1), "unknown key 'more'"),
        (lambda m, _: m["sets"].update(sideways=m["sets"]["toward"]), "other directions"),
        (lambda m, _: m["sets"]["toward"]["picks"].extend(m["sets"]["toward"]["picks"]), "twice"),
        (lambda m, _: m.update(clusters=41), "41 clusters of 40 items"),
        (lambda m, _: m.update(method="guess"), "method is 'guess'"),
        (lambda m, _: m["gate"].update(q=0), "no gate"),
        (lambda m, _: m.update(harm={}), "harm is no list"),
        (lambda m, _: m.update(subsets=1), "neither true nor false"),
    ],
)
def test_what_is_no_screen_is_refused(
    tmp_path: Path, change: Callable[[Any, Any], object], reason: str
) -> None:
    screen_of().save_pretrained(tmp_path / "c")
    tampered(tmp_path / "c", change)
    with pytest.raises(ArtifactError, match=reason):
        CausalScreen.from_pretrained(tmp_path / "c")
