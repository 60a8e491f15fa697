"""Sets: what a pick is worth, greedy choice on known effects, and experts that stand in for each other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.special import expit

from steersman.evaluation.screening import greedy
from steersman.evaluation.screening.exact import Edit, Floats
from steersman.evaluation.screening.greedy import Aim, Chooser, divergence, gains
from steersman.evaluation.screening.subsets import membership, regress
from steersman.evaluation.screening.texts import Reading
from steersman.experts.causal_effects import Sign
from steersman.limits import Router, broken_limit

FACES = st.floats(-30, 30)


@given(FACES, FACES)
def test_the_divergence_is_that_of_two_coins(before: float, after: float) -> None:
    p, q = expit(before), expit(after)
    slow = sum(a * np.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0 and b > 0)
    found = divergence(np.array(before), np.array(after))
    assert found >= 0
    assert found == pytest.approx(slow, rel=1e-5, abs=1e-9)
    assert divergence(np.array(before), np.array(before)) == 0


@given(arrays(np.float64, (3, 2, 6), elements=st.floats(-5, 5)))
def test_a_gain_is_the_sum_over_aims_with_their_variances(values: Floats) -> None:
    reading = Reading("t", (), tuple("aabbcd"))
    aims = [Aim(reading), Aim(reading, kept=True)]
    now, base = values[2], np.zeros((2, 6))
    found = gains(aims, [values[0], values[1]], list(now), list(base))
    for edit in range(2):
        added = [values[0][edit] - now[0], divergence(base[1], now[1]) - divergence(base[1], values[1][edit])]
        assert found.mean[edit] == pytest.approx(sum(each.mean() for each in added), abs=1e-9)
        variance = 0.0
        for each in added:
            sums = [
                each[list(places)].sum() - len(places) * each.mean()
                for places in ((0, 1), (2, 3), (4,), (5,))
            ]
            variance += 4 / 3 * sum(s**2 for s in sums) / 36
        assert found.error[edit] == pytest.approx(np.sqrt(variance), abs=1e-9)


class Additive:
    """What an instrument would measure of a model in which experts add up, but for pairs that stand in for
    each other: together they do `both`, alone nothing.
    """

    routers: ClassVar = {0: Router(0, 8, 2, "softmax-topk"), 1: Router(1, 8, 2, "softmax-topk")}

    def __init__(self, effects: dict[Edit, float], both: tuple[Edit, Edit] | None = None) -> None:
        self.effects, self.both = effects, both
        self.noise = np.random.default_rng(0).normal(0, 0.05, (17, 40))

    misleading: ClassVar[set[Edit]] = set()
    """Edits whose estimates are three times what they do, and of the other sign."""

    @staticmethod
    def estimated(
        tool: Additive, reading: object, plan: tuple[Edit, ...], more: Sequence[Edit], *_: object
    ) -> Floats:
        now = tool.values(plan)
        factor = dict.fromkeys(tool.misleading, -3.0)
        changes = [factor.get(edit, 1.0) * (tool.values((*plan, edit)) - now) for edit in more]
        return np.array([now, *(now + change for change in changes)])

    def values(self, plan: Sequence[Edit]) -> Floats:
        total = sum(self.effects.get(edit, 0.0) for edit in plan)
        if self.both is not None and set(self.both) <= set(plan):
            total += 1.0
        return total + sum((self.noise[edit[0] * 8 + edit[1]] for edit in plan), np.zeros(40))


@pytest.fixture
def chooser(monkeypatch: pytest.MonkeyPatch) -> functools.partial[Chooser]:
    """Choosers that measure an `Additive` instead of a model."""

    def beside(
        tool: Additive, reading: object, plan: tuple[Edit, ...], more: Sequence[Edit], *_: object
    ) -> Floats:
        return np.array([tool.values(plan), *(tool.values((*plan, edit)) for edit in more)])

    monkeypatch.setattr(greedy, "values_beside", beside)
    monkeypatch.setattr(greedy, "estimates_beside", Additive.estimated)
    aim = Aim(Reading("t", (), tuple(map(str, range(40)))))
    monkeypatch.setattr(
        Additive,
        "sites",
        {n: type("Site", (), {"facts": r}) for n, r in Additive.routers.items()},
        raising=False,
    )
    return functools.partial(Chooser, remember=lambda _, work: work(), aims=[aim], name="t")


def test_the_best_are_picked_in_order_until_none_is_worth_it(chooser: functools.partial[Chooser]) -> None:
    effects = {(0, 1, 1.0): 0.5, (0, 2, -1.0): 0.9, (1, 3, 1.0): 0.005, (0, 2, 1.0): 0.8, (1, 4, -1.0): -0.3}
    found = chooser(instrument=Additive(effects)).choose(list(effects), at_most=8)
    assert [(pick.layer, pick.expert, pick.strength) for pick in found.picks] == [(0, 2, -1.0), (0, 1, 1.0)]
    assert found.picks[0].gain == pytest.approx(0.9, abs=0.03)
    assert "the best of 2 more adds" in found.reason
    assert found.candidates == 5
    assert found.gain == pytest.approx(1.4, abs=0.05)


def test_of_equal_gains_the_first_candidate_is_picked(chooser: functools.partial[Chooser]) -> None:
    equal: list[Edit] = [(0, 1, 1.0), (0, 2, -1.0), (1, 3, 1.0), (1, 4, -1.0)]
    for seed in range(6):
        noise = np.random.default_rng(seed).uniform(-4e-6, 4e-6, 4)
        tool = Additive({edit: 0.5 + float(more) for edit, more in zip(equal, noise, strict=True)})
        tool.noise = np.tile(tool.noise[:1], (17, 1))
        found = chooser(instrument=tool).choose(equal, at_most=3)
        assert [(pick.layer, pick.expert, pick.strength) for pick in found.picks] == equal[:3]
        kept = chooser(instrument=tool).choose([], at_most=4, start=equal)
        assert [(pick.layer, pick.expert, pick.strength) for pick in kept.picks] == equal


def test_no_more_than_asked_for_and_none_that_breaks_a_limit(chooser: functools.partial[Chooser]) -> None:
    many = {(0, expert, 1.0): 1.0 - expert / 10 for expert in range(4)}
    found = chooser(instrument=Additive(many)).choose(list(many), at_most=1)
    assert [pick.expert for pick in found.picks] == [0]
    assert found.reason == "as many as asked for: 1 expert"
    found = chooser(instrument=Additive(many)).choose(list(many), at_most=8)
    assert [pick.expert for pick in found.picks] == [0, 1]  # the router chooses 2
    assert found.reason == "no candidate is left"


def test_in_rounds_as_many_join_as_there_are_already(chooser: functools.partial[Chooser]) -> None:
    """1, 1, 2 and 4 of them, each round the best that are left."""
    layers = {n: Router(n, 8, 8, "softmax-topk") for n in range(2)}
    tool = Additive({(n // 8, n % 8, 1.0): 1.0 - n / 20 for n in range(9)} | {(1, 1, -1.0): 0.001})
    tool.sites = {n: type("Site", (), {"facts": r}) for n, r in layers.items()}
    rounds: list[int] = []
    choice = chooser(instrument=tool, advance=rounds.append)
    found = choice.choose_in_rounds([*tool.effects][::-1], at_most=12)
    assert [(pick.layer, pick.expert) for pick in found.picks] == [(n // 8, n % 8) for n in range(9)]
    assert rounds == [1, 1, 2, 4, 1]
    assert found.candidates == 10
    assert found.reason == "no candidate is left"  # an expert is in or out, not both
    few = chooser(instrument=tool).choose_in_rounds([*tool.effects], at_most=3)
    assert (len(few.picks), few.reason) == (3, "as many as asked for: 3 experts")


def test_what_estimates_promise_and_measuring_does_not_find_stays_out(
    chooser: functools.partial[Chooser],
) -> None:
    bad, good = (0, 1, 1.0), (1, 2, 1.0)
    tool = Additive({bad: -0.5, good: 0.4})
    tool.misleading = {bad}
    found = chooser(instrument=tool).choose_in_rounds([bad, good], at_most=4)
    assert not found.picks  # it seemed the best, and took away
    assert found.reason == "nothing more adds anything that is sure"
    tool.effects[bad] = 0.001
    tool.misleading = set()
    found = chooser(instrument=tool).choose_in_rounds([bad, good], at_most=4)
    assert [(pick.layer, pick.expert, pick.strength) for pick in found.picks] == [good]
    assert found.reason.startswith("the best of 1 more adds 0.0")
    assert found.reason.endswith("(a pick needs 0.01 and 3: --least-t)")


def test_a_set_that_steers_the_other_way_wants_less() -> None:
    aim = Aim(Reading("t", (), tuple("abc")), sign=-1.0)
    values, now = np.array([[0.0, 1.0, 2.0]]), np.array([1.0, 2.0, 3.0])
    assert gains([aim], [values], [now], [now]).mean == pytest.approx(1.0)


def test_experts_that_stand_in_for_each_other_are_kept_together(chooser: functools.partial[Chooser]) -> None:
    pair: tuple[Edit, Edit] = ((0, 1, -1.0), (1, 2, -1.0))
    tool = Additive({(0, 5, -1.0): 0.0, (1, 6, 1.0): 0.4}, pair)
    alone = chooser(instrument=tool).choose([*pair], at_most=8)
    assert not alone.picks
    found = chooser(instrument=tool).choose([(1, 6, 1.0)], at_most=8, start=[*pair, (0, 5, -1.0)])
    assert {(pick.layer, pick.expert) for pick in found.picks} == {(0, 1), (1, 2), (1, 6)}


@pytest.mark.parametrize("sign", ["deactivate", "activate"])
@pytest.mark.parametrize("groups", [None, (4, 2)])
def test_random_subsets_keep_the_limits_and_are_balanced(sign: Sign, groups: tuple[int, int] | None) -> None:
    router = Router(0, 16, 4, "rule", groups=groups)
    found = membership(router, sign, 400, np.random.default_rng(0))
    strength = 1.0 if sign == "activate" else -1.0
    for subset in found:
        assert broken_limit(router, dict.fromkeys(np.flatnonzero(subset).tolist(), strength)) is None
    shares = found.mean(axis=0)
    assert stats.chisquare(found.sum(axis=0)).pvalue > 1e-3
    assert 0.02 < shares.min() <= shares.max() < 0.4


def test_the_regression_finds_what_no_single_expert_shows() -> None:
    generator = np.random.default_rng(1)
    members = membership(Router(0, 12, 4, "rule"), "deactivate", 40 * 30, generator)
    members = members.reshape(30, 40, 1, 12)
    pair = members[..., 0, 2] & members[..., 0, 7]  # either does the other's work
    change = 2.0 * pair + generator.normal(0, 0.3, pair.shape) + generator.normal(0, 0.2, 40)
    mean, error, p = regress(change, members, [str(item // 2) for item in range(40)])
    share = members.mean()
    assert mean[0, [2, 7]] == pytest.approx(2 * share, abs=0.1)
    assert (p[0, [2, 7]] < 1e-4).all()
    others = [expert for expert in range(12) if expert not in (2, 7)]
    assert np.abs(mean[0, others]).max() < 0.1
    assert (p[0, others] > 1e-3).all()
    assert (error > 0).all()


def test_the_regression_is_least_squares_with_clustered_errors() -> None:
    generator = np.random.default_rng(2)
    members = generator.random((5, 30, 1, 4)) < 0.3
    change = generator.normal(0, 1, (5, 30))
    groups = [item % 10 for item in range(30)]
    mean, error, _ = regress(change, members, list(map(str, groups)))
    x = np.column_stack([np.ones(150), members.reshape(150, 4)])
    y, inverse = change.reshape(-1), np.linalg.inv(x.T @ x)
    beta = inverse @ x.T @ y
    scores = (x * (y - x @ beta)[:, None]).reshape(5, 30, 5)
    middle = sum(
        np.outer(s, s)
        for g in range(10)
        if (s := scores[:, [i for i in range(30) if groups[i] == g]].sum((0, 1))) is not None
    )
    robust = inverse @ middle @ inverse * (10 / 9) * (149 / 145)
    np.testing.assert_allclose(mean[0], beta[1:], atol=1e-10)
    np.testing.assert_allclose(error[0], np.sqrt(np.diag(robust))[1:], atol=1e-10)
