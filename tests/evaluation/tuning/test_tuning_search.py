"""What tuning chooses between, and how; and how often it finds what is not there."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from steersman import PlanError, Steering
from steersman.certainty import CANNOT_TELL, SHOWN
from steersman.concepts.norms import NormHistogram
from steersman.evaluation.screening.sizes import KINDS
from steersman.evaluation.statistics import clustered_mean
from steersman.evaluation.tuning.candidates import (
    DOSES,
    Candidate,
    ExpertCandidate,
    Experts,
    Lever,
    VectorCandidate,
    Vectors,
)
from steersman.evaluation.tuning.confirming import answers_moved, control_of, verdict_of
from steersman.evaluation.tuning.costs import COSTS, Cost, CostBound, _share, read_bounds
from steersman.evaluation.tuning.degenerate import is_degenerate, repeats, repetition
from steersman.evaluation.tuning.looks import count_look
from steersman.evaluation.tuning.result import Tuning
from steersman.evaluation.tuning.search import Searched, Tried, search
from steersman.models.architecture import read_architecture
from steersman.models.plan_rows import Floats

ARCHITECTURE = read_architecture(families.shared("qwen3_moe"))


def vectors(layers: Sequence[int], **changes: Any) -> Vectors:
    """A lever whose vectors nobody looks at."""
    norms = {layer: NormHistogram() for layer in layers}
    whole = Vectors(
        vectors={"": dict.fromkeys(layers, torch.ones(2))},
        norms=norms,
        shuffled={"": []},
        architecture=ARCHITECTURE,
        weights_id="w",
    )
    return replace(whole, **changes)


def experts(scores: Sequence[float], **changes: Any) -> Experts:
    """Experts 0, 1, 2 … of three layers in turn, with these scores."""
    ranking = [(number % 3, number // 3, score) for number, score in enumerate(scores)]
    return replace(Experts(ranking=ranking, architecture=ARCHITECTURE, weights_id="w"), **changes)


GROUPS = [f"g{number // 2}" for number in range(16)]


class World:
    """Effects and costs of candidates, drawn once for each; counts what was looked at."""

    def __init__(self, seed: int, *, kept: float = 0.5, grain: float = 0.0) -> None:
        self.seed, self.kept, self.grain = seed, kept, grain
        self.costed: list[Candidate] = []

    def _draw(self, lever: Lever, candidate: Candidate) -> np.random.Generator:
        words = f"{self.seed} {lever.name} {candidate.in_words()}"
        return np.random.default_rng(np.frombuffer(words.encode(), np.uint8))

    def effects(self, lever: Lever, candidates: Sequence[Candidate]) -> Floats:
        found = []
        for one in candidates:
            draw = self._draw(lever, one)
            mean = draw.normal()
            if self.grain:  # many candidates are equal
                mean = round(mean / self.grain) * self.grain
            found.append(np.full(16, mean) if self.grain else mean + draw.normal(size=16))
        return np.array(found)

    def costs(self, lever: Lever, candidate: Candidate) -> dict[str, Cost]:
        self.costed.append(candidate)
        kept = bool(self._draw(lever, candidate).random() < self.kept)
        return {"kl": Cost(0.1, 0.2, 16, kept)}


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([0.0, 0.5]))
def test_a_control_searched_lazily_finds_what_the_whole_search_does(
    seed: int, kept: float, grain: float
) -> None:
    for lever in (vectors(range(9), reverse=None, doses=(0.2, 0.4)), experts([3, -2, 1, 1, -1, 0.5, 0.1])):
        lazy, whole = World(seed, kept=kept, grain=grain), World(seed, kept=kept, grain=grain)
        one = search(lever, lazy.effects, lazy.costs, GROUPS, every=False)
        other = search(lever, whole.effects, whole.costs, GROUPS, every=True)
        assert [each.candidate for each in one.tried] == [each.candidate for each in other.tried]
        assert (one.best and one.best.candidate) == (other.best and other.best.candidate)
        assert len(lazy.costed) <= len(whole.costed) == len(other.tried)
        assert len(set(lazy.costed)) == len(lazy.costed)
        # The obvious version of the rule.
        passing = [each for each in other.tried if each.effect.mean > 0 and each.passes]
        if passing:
            assert other.best is not None
            assert other.best.effect.mean == pytest.approx(max(each.effect.mean for each in passing))
        else:
            assert other.best is None


def test_equal_effects_are_told_apart_by_what_steers_less() -> None:
    def effects(lever: Lever, candidates: Sequence[Candidate]) -> Floats:
        return np.array([np.full(16, 1 + 1e-9 * number) for number, _ in enumerate(candidates)])

    def costs(lever: Lever, candidate: Candidate) -> dict[str, Cost]:
        return {"kl": Cost(0, 0, 1, True)}

    best = search(vectors(range(4)), effects, costs, GROUPS, every=True, fine=False).best
    assert best is not None
    assert best.candidate == VectorCandidate("", (0,), DOSES[0], "answer")
    best = search(experts([3, -2, 1, 1, -1]), effects, costs, GROUPS, every=True, fine=False).best
    assert best is not None
    assert best.candidate == ExpertCandidate("activated", 1, "all")


# candidates -------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=20, unique=True),
    st.lists(st.floats(0.01, 3), min_size=1, max_size=4, unique=True),
    st.sampled_from([True, False, None]),
    st.data(),
)
def test_fine_grids_lie_within_the_layers_offered(
    layers: list[int], doses: list[float], reverse: bool | None, data: st.DataObject
) -> None:
    lever = vectors(layers, doses=tuple(doses), reverse=reverse)
    coarse = lever.coarse()
    assert {abs(one.dose) for one in coarse if isinstance(one, VectorCandidate)} == {*doses}
    assert len({*coarse}) == len(coarse)
    assert len({one.layers for one in coarse}) == min(len(layers), 12)
    best = data.draw(st.sampled_from(coarse))
    for one in lever.fine(best):
        assert isinstance(one, VectorCandidate)
        assert {*one.layers} <= {*layers}
        assert list(one.layers) == list(range(one.layers[0], one.layers[-1] + 1))  # contiguous
        assert one.dose * best.dose > 0
        assert 0.49 * min(doses) < abs(one.dose) <= 2.01 * max(doses)
        assert one.scope == best.scope


def test_every_layer_is_within_reach_of_the_grids() -> None:
    lever = vectors(range(30))
    coarse = lever.coarse()
    reached = {layer for one in coarse for near in [one, *lever.fine(one)] for layer in near.layers}
    assert len({one.layers for one in coarse}) == 12
    assert reached == {*range(30)}


def test_a_reduced_grid_keeps_the_doses_that_were_asked_for() -> None:
    assert vectors(range(30)).reduced().doses == (0.2, 0.4, 0.8)
    assert len({one.layers for one in vectors(range(30)).reduced().coarse()}) == 4
    assert vectors(range(30), doses=(0.33,)).reduced().doses == (0.33,)
    assert [one.to_json()["experts"] for one in experts([1.0] * 20).reduced().coarse()] == [1, 3]


def test_sizes_go_up_to_a_tenth_of_all_experts() -> None:
    lever = experts([3, -2, 1, 1, -1, 0.5])
    assert lever.largest == 3  # of 24
    found = {(one.kind, one.count) for one in lever.coarse() if isinstance(one, ExpertCandidate)}
    assert found == {
        *(("activated", size) for size in (1, 2, 3)),
        *(("deactivated", size) for size in (1, 2)),
        *(("both", size) for size in (1, 2, 3)),
    }
    assert {one.kind for one in experts([3, 2]).coarse()} == {"activated"}  # both would be the same again
    assert all(1 <= one.count <= 3 for one in lever.fine(ExpertCandidate("both", 2, "all")))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("matched", [True, False])
def test_controls_of_experts_keep_layers_kinds_and_counts(name: str, matched: bool) -> None:
    architecture = read_architecture(families.shared(name))
    layers = families.moe_layers(name)
    ranking = [(layers[n % len(layers)], n // 3, (-1) ** n / (n + 1)) for n in range(8)]
    rates = {layer: np.linspace(0, 1, 8) for layer in layers} if matched else None
    lever = Experts(ranking=ranking, architecture=architecture, weights_id="w", rates=rates)
    controls = lever.controls(6, seed=3)
    assert [control.name for control in controls] == [f"random experts {n}" for n in range(1, 7)]
    shapes = [shape(lever.plan(one)) for one in lever.coarse()]
    for control in controls:
        assert control.coarse() == lever.coarse()
        assert [shape(control.plan(one)) for one in control.coarse()] == shapes
    drawn = {json.dumps(control.ranking) for control in controls if isinstance(control, Experts)}
    assert len(drawn) > 1
    again = [control.ranking for control in lever.controls(6, seed=3) if isinstance(control, Experts)]
    assert {json.dumps(one) for one in again} == drawn


def shape(plan: Steering) -> dict[int, list[float]]:
    return {layer: sorted(of_layer.values()) for layer, of_layer in plan.strengths.items()}


def test_controls_of_vectors_are_the_label_shuffled_ones() -> None:
    draws = [{layer: torch.full((2,), float(n)) for layer in range(3)} for n in range(4)]
    lever = vectors(range(3), shuffled={"": draws})
    first, second = lever.controls(2, 0)
    assert (first.name, second.name) == ("label-shuffled 1", "label-shuffled 2")
    assert isinstance(second, Vectors)
    assert second.vectors[""][0].tolist() == [1.0, 1.0]
    assert len(second.coarse()) == 2 * len(lever.coarse())  # either way
    with pytest.raises(PlanError, match=r"keeps 4 label-shuffled concepts, and 5 controls.*--controls"):
        lever.controls(5, 0)


# costs ------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(COSTS)), st.floats(0, 1e3), st.sampled_from(["<=", "<", " <= ", "  <  "]))
def test_bounds_are_read_as_they_are_written(name: str, most: float, sign: str) -> None:
    assert read_bounds([f"{name}{sign}{most!r}"]) == (CostBound(name, most),)


@pytest.mark.parametrize(
    "text",
    ["kl", "kl >= 1", "kl = 1", "loss <= 1", "kl <= x", "kl <= -1", "kl <= inf", "kl <= nan", "<= 1", ""],
)
def test_a_bound_that_is_none_is_said(text: str) -> None:
    with pytest.raises(PlanError, match=r"right is NAME <= NUMBER, such as .*kl, lost, degenerate"):
        read_bounds([text])


def test_a_bound_given_twice_is_said() -> None:
    with pytest.raises(PlanError, match="kl is given twice"):
        read_bounds(["kl <= 1", "kl <= 2"])


def test_no_loss_in_32_still_allows_nine_percent() -> None:
    found = _share(np.zeros(32), np.zeros(32), list(range(32)), 0.05)
    assert found.value == 0
    assert found.upper == pytest.approx(1 - 0.05 ** (1 / 32))
    assert 0.089 < found.upper < 0.09
    assert not found.kept
    assert _share(np.zeros(200), np.zeros(200), list(range(200)), 0.02).kept


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(200, 400), st.floats(0, 0.2), st.floats(0, 0.2))
def test_a_share_s_bound_lies_above_what_was_seen(seed: int, items: int, lost: float, won: float) -> None:
    draw = np.random.default_rng(seed)
    before, after = draw.random(items) < won, draw.random(items) < lost
    found = _share(before, after, list(range(items)), 0.1)
    assert found.value == pytest.approx(after.mean() - before.mean())
    assert found.upper > found.value
    assert found.kept == (found.upper <= 0.1)


def test_the_bound_of_a_share_is_exceeded_by_the_truth_in_one_of_twenty() -> None:
    draw, beyond = np.random.default_rng(0), 0
    for _ in range(400):
        lost = draw.random(200) < 0.04
        beyond += _share(np.zeros(200), lost, list(range(200)), 0.1).upper < 0.04
    assert beyond <= 33  # 20 are expected; P(> 33) = .002


def test_texts_that_repeat_themselves_are_degenerate() -> None:
    good = "The river is long, and the town beside it is old; who wrote the book is not known to anyone."
    assert repetition(good) == 0
    assert repetition("I am sorry. " * 8) > 0.8
    assert repetition("ha") == 0
    assert repetition("哈" * 60) > 0.9
    pytest.importorskip("py3langid")
    assert is_degenerate("I am sorry. " * 8, instead_of=good)
    assert not is_degenerate("I am sorry. " * 8, instead_of="I cannot. " * 8)  # it did before
    assert repeats("The rain. It's a mighty" + "f-f-f-f-f-f-f")  # an end in a loop is less than half of it
    assert repeats(
        "We sail at dawn for gold and never look back at home, me hearties. Aye, aye, aye, aye, aye, aye, aye"
    )
    assert not repeats("We sail at dawn for gold. Aye, aye, aye!")
    french = "Je ne sais pas qui a écrit ce livre, mais la rivière est longue et la ville est ancienne."
    assert is_degenerate(french, instead_of=good)
    assert not is_degenerate(good, instead_of=good)
    assert not is_degenerate("Oui.", instead_of=good)  # too short to tell


def test_looks_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_CACHE", str(tmp_path / "cache"))
    assert [count_look("a", "w") for _ in range(3)] == [1, 2, 3]
    assert (count_look("b", "w"), count_look("a", "x"), count_look("a", "w")) == (1, 1, 4)
    (tmp_path / "cache" / "test_looks.json").write_text("{")
    assert count_look("a", "w") == 1  # damaged: it begins anew
    monkeypatch.setenv("STEERSMAN_CACHE", str(tmp_path / "cache" / "test_looks.json"))
    with pytest.warns(UserWarning, match="not counted"):
        assert count_look("a", "w") is None


# what may be said -------------------------------------------------------------------------------------------

KEPT = {"kl": Cost(0.1, 0.2, 50, True)}


def test_what_is_shown() -> None:
    beaten = control_of(1.0, [0.1] * 19)
    assert verdict_of(0.5, beaten, KEPT) == SHOWN
    assert verdict_of(0.5, control_of(1.0, [0.1] * 18), KEPT) == CANNOT_TELL  # too few
    assert verdict_of(0.5, control_of(1.0, [0.1] * 18 + [1.1]), KEPT) == CANNOT_TELL
    assert verdict_of(0.5, None, KEPT) == CANNOT_TELL
    assert verdict_of(-0.1, beaten, KEPT) == CANNOT_TELL
    assert verdict_of(math.nan, beaten, KEPT) == CANNOT_TELL
    assert verdict_of(0.5, beaten, {"kl": Cost(0.1, 0.4, 50, False)}) == CANNOT_TELL


def test_an_effect_the_wrong_way_is_never_shown() -> None:
    """Even where every control goes further that way."""
    found = clustered_mean(np.random.default_rng(0).normal(-1, 0.1, 40))
    control = control_of(found.mean, [-2.0] * 19)
    assert control is not None
    assert (found.high < 0, control.p) == (True, 0.05)
    assert verdict_of(found.low, control, KEPT) == CANNOT_TELL


def test_answers_are_counted_toward_the_side_steered_for() -> None:
    before, after = np.zeros(40), np.r_[np.ones(30), np.zeros(10)]
    up = answers_moved(before, after, list(range(40)), [0.0] * 19, 1.0)
    assert (up["base"], up["steered"], up["moved"], up["verdict"]) == (0, 0.75, 0.75, SHOWN)
    down = answers_moved(after, before, list(range(40)), [0.0] * 19, -1.0)
    assert (down["moved"], down["verdict"]) == (0.75, SHOWN)
    assert (down["low"], down["high"]) == pytest.approx((up["low"], up["high"]))
    scores = answers_moved(before + 0.2, after / 2, list(range(40)), [], -1.0)
    assert scores["moved"] == pytest.approx(-0.175)
    assert scores["control"] is None


def test_why_nothing_was_chosen() -> None:
    def tuning(effect: float, kept: bool, finalists: int = 0) -> Tuning:
        mean = clustered_mean(np.full(4, effect))
        costs = {"kl": Cost(1, 2, 9, kept)}
        tried = Tried(VectorCandidate("", (1,), 0.3, "answer"), mean, costs, "coarse")
        made = {"bounds": [{"cost": "kl", "most": 0.3}]}
        return Tuning(made, (tried,), None, tuple({} for _ in range(finalists)), None, None)

    assert "none of 1 candidate moves the effect" in tuning(-1, True).why_none
    assert "none keeps kl <= 0.3 by its one-sided 95 % bound" in tuning(1, False).why_none
    assert "the answers of all 3 finalists are degenerate" in tuning(1, True, 3).why_none
    with pytest.raises(PlanError, match="nothing passes"):
        tuning(1, False).require()


def test_no_cost_that_is_read_off_is_no_cost_that_is_broken() -> None:
    """With degenerate text bounded alone, nothing is known of a candidate's costs before it answers."""
    mean = clustered_mean(np.ones(4))
    assert Tried(VectorCandidate("", (1,), 0.3, "answer"), mean, {}, "coarse").passes
    assert not Tried(VectorCandidate("", (1,), 0.3, "answer"), mean, None, "coarse").passes


def test_finalists_come_of_stretches_of_layers_and_of_kinds() -> None:
    lever = vectors(range(4, 13))
    layers = [(4,), (6,), (7,), (8, 9, 10), (9,), (10,), (12,)]
    found = [lever.kin(VectorCandidate("", some, 0.3, "answer"), 3) for some in layers]
    assert found == [0, 0, 1, 1, 1, 2, 2]
    assert {lever.kin(VectorCandidate("", some, 0.3, "answer"), 1) for some in layers} == {0}
    some = experts([1.0, -1.0])
    assert {some.kin(ExpertCandidate(kind, 1, "all"), 3) for kind in KINDS} == {*KINDS}


# how often it finds what is not there ----------------------------------------------------------------------


class Null(World):
    """A model in which every direction moves the effect by chance, as much at test as in development."""

    def __init__(self, seed: int, *, moves: float, planted: float = 0.0) -> None:
        super().__init__(seed)
        self.moves, self.planted = moves, planted

    def items(self, lever: Lever, candidate: Candidate, test: bool) -> Floats:
        """Of 32 items in 16 groups: what the direction does, and what these items do."""
        assert isinstance(lever, Vectors)
        assert isinstance(candidate, VectorCandidate)
        one = (self.seed, lever.number or 0, candidate.layers[0])
        slope = self.moves * np.random.default_rng(one).normal() + (0 if lever.number else self.planted)
        draw = np.random.default_rng((*one, round(100 * abs(candidate.dose)), candidate.dose < 0, test))
        noise = np.repeat(draw.normal(size=16), 2) + draw.normal(size=32)
        return np.asarray(candidate.dose * slope + noise)

    def effects(self, lever: Lever, candidates: Sequence[Candidate]) -> Floats:
        return np.array([self.items(lever, one, test=False) for one in candidates])

    def costs(self, lever: Lever, candidate: Candidate) -> dict[str, Cost]:
        assert isinstance(candidate, VectorCandidate)
        dear = 0.3 * abs(candidate.dose) + 0.05 * self.items(lever, candidate, test=False)[0]
        return {"kl": Cost(dear, dear, 32, dear <= 0.3)}

    def says(self, controls: int = 19) -> str:
        """The whole procedure: chosen in development, confirmed at test, beside controls tuned alike."""
        groups = [number // 2 for number in range(32)]
        lever = vectors(range(2), doses=(0.5, 1.0))
        tuned: list[Searched] = []
        for number in range(controls + 1):
            one = lever if not number else replace(lever, reverse=None, number=number)
            every = not number
            tuned.append(search(one, self.effects, self.costs, groups, every=every, fine=False))
        best, *others = tuned
        if best.best is None:
            return "nothing passes"
        drawn = [
            0.0 if one.best is None else float(self.items(one.lever, one.best.candidate, test=True).mean())
            for one in others
        ]
        found = clustered_mean(self.items(lever, best.best.candidate, test=True), groups)
        return verdict_of(found.low, control_of(found.mean, drawn), best.best.costs or {})


@pytest.mark.parametrize("moves", [0.0, 4.0])
def test_of_nulls_at_most_one_in_twenty_is_shown(moves: float) -> None:
    """Directions that do nothing, and such as move the effect by chance: the controls must tell."""
    worlds = 60
    shown = sum(Null(seed, moves=moves).says() == SHOWN for seed in range(worlds))
    assert shown <= 8, shown  # of 60 at .05: P(> 8) = .003


@pytest.mark.long
@pytest.mark.parametrize("moves", [0.0, 0.5, 1.0, 4.0])
def test_of_many_nulls_at_most_one_in_twenty_is_shown(moves: float) -> None:
    worlds = 1000
    shown = sum(Null(seed, moves=moves).says() == SHOWN for seed in range(worlds))
    assert shown <= 71, shown  # of 1,000 at .05: P(> 71) = .001


def test_what_is_planted_is_shown() -> None:
    assert sum(Null(seed, moves=0.5, planted=5.0).says() == SHOWN for seed in range(20)) >= 18
