"""The three verdicts: what an interval and its controls let one say."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.certainty import (
    CANNOT_TELL,
    LEAST_CONTROLS,
    MARGIN,
    NOT_RUN,
    NOT_SHOWN,
    SHOWN,
    Control,
    all_of,
    controls_in_words,
    verdict,
)
from steersman.evaluation.statistics import random_control

limits = st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted)
ps = st.one_of(st.none(), st.floats(0, 1))
controls = st.lists(st.builds(Control, st.integers(0, 99), st.floats(0, 1)), max_size=3)


def slow_verdict(low: float, high: float, margin: float | None, p: float | None, given: list[Control]) -> str:
    """The same, a condition after the other."""
    clear = True
    for inside in (low, high, 0.0):
        clear &= not (low <= 0.0 <= high) and math.isfinite(inside)
    for control in given:
        if control.count < 19 or control.p > 0.05:
            clear = False
    if p is not None and p > 0.05:
        clear = False
    if clear:
        return "shown"
    if margin is not None and all(abs(limit) <= margin for limit in (low, high)):
        return "not shown"
    return "cannot tell"


@given(limits, st.one_of(st.none(), st.floats(0, 0.5)), ps, controls)
def test_the_rule(
    interval: list[float], margin: float | None, p: float | None, given_controls: list[Control]
) -> None:
    found = verdict(*interval, margin=margin, p=p, controls=given_controls)
    assert found == slow_verdict(*interval, margin, p, given_controls)


@given(limits, ps, controls)
def test_the_sign_does_not_matter(
    interval: list[float], p: float | None, given_controls: list[Control]
) -> None:
    low, high = interval
    there = verdict(low, high, margin=MARGIN, p=p, controls=given_controls)
    assert there == verdict(-high, -low, margin=MARGIN, p=p, controls=given_controls)


@given(limits, st.floats(0, 0.5), ps, controls, st.floats(1, 3))
def test_less_data_never_shows_more(
    interval: list[float], margin: float, p: float | None, given_controls: list[Control], wider: float
) -> None:
    """A wider interval around the same middle says what the narrow one says, or nothing."""
    low, high = interval
    middle, half = (low + high) / 2, (high - low) / 2 * wider
    narrow = verdict(low, high, margin=margin, p=p, controls=given_controls)
    wide = verdict(middle - half, middle + half, margin=margin, p=p, controls=given_controls)
    assert wide in (narrow, CANNOT_TELL) or (narrow, wide) == (SHOWN, NOT_SHOWN)


@given(limits, ps, controls)
def test_a_control_more_never_shows_more(
    interval: list[float], p: float | None, given_controls: list[Control]
) -> None:
    for fewer, more in pairwise([given_controls[:n] for n in range(len(given_controls) + 1)]):
        if verdict(*interval, p=p, controls=more) == SHOWN:
            assert verdict(*interval, p=p, controls=fewer) == SHOWN


@pytest.mark.parametrize("count", range(40))
def test_so_many_controls_can_carry_a_verdict(count: int) -> None:
    """Where an effect is beyond all of them, its p is the least that so many can give."""
    least = Control(count, 1.0) if not count else Control(count, random_control(1.0, [0.0] * count).p)
    assert least.beaten == least.carries == (count >= LEAST_CONTROLS == 19)
    assert verdict(0.4, 0.6, controls=[least]) == (SHOWN if count >= 19 else CANNOT_TELL)


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_without_an_interval_nobody_can_tell(nothing: float | None) -> None:
    for low, high in ((nothing, 0.1), (0.1, nothing), (nothing, nothing)):
        assert verdict(low, high, margin=MARGIN, p=0.0) == CANNOT_TELL


def test_several_claims_in_one() -> None:
    assert all_of([SHOWN, SHOWN]) == SHOWN
    assert all_of([SHOWN, CANNOT_TELL]) == CANNOT_TELL
    assert all_of([SHOWN, CANNOT_TELL, NOT_SHOWN]) == NOT_SHOWN


def test_controls_in_words() -> None:
    assert (
        controls_in_words(Control(49, 0.02), 0) == "0 of 49 random plans of its shape did as much (p = 0.02)"
    )
    assert controls_in_words(Control(3, 0.25), 0).endswith("and fewer than 19 can show nothing")
    assert controls_in_words(NOT_RUN, 0, "random vectors") == "no random vectors were run"
