"""The editing rule against a slow loop written from its formula, and by its properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from steersman.experts.bounds import are_few, edit_scores, move_few, move_to_bounds, put_few, sources_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = st.sampled_from([-1.0, -0.75, -0.5, -0.1, 0.0, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0])


def scores_of(limit: float = 50.0, experts: int | None = None) -> st.SearchStrategy[np.ndarray]:
    width = st.just(experts) if experts else st.integers(2, 9)
    return width.flatmap(
        lambda columns: hnp.arrays(
            np.float32,
            st.tuples(st.integers(1, 4), st.just(columns)),
            elements=st.floats(-limit, limit, width=32),
        )
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [tokens, experts], strengths [plans, experts] and each token's plan."""
    scores = draw(scores_of())
    plans = draw(st.integers(1, 3))
    strengths = [[draw(LEVELS) for _ in range(scores.shape[1])] for _ in range(plans)]
    plan = [draw(st.integers(0, plans - 1)) for _ in range(scores.shape[0])]
    return torch.from_numpy(scores), torch.tensor(strengths), torch.tensor(plan)


def slow(row: list[float], strengths: list[float], eps: float) -> list[float]:
    """The formula of the design, expert by expert, in Python's own doubles."""
    mean = sum(row) / len(row)
    sigma = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
    high, low = max(row), min(row)
    above = high + max(0.01, 4 * eps * abs(high))
    below = low - max(0.01, 4 * eps * abs(low))
    edited = []
    for x, strength in zip(row, strengths, strict=True):
        if strength == 0:
            edited.append(x)
        elif strength == 1:
            edited.append(above)
        elif strength == -1:
            edited.append(below)
        else:
            beta = abs(strength) / (1 - abs(strength))
            moved = x + beta * sigma if strength > 0 else x - beta * sigma
            edited.append(min(moved, above) if strength > 0 else max(moved, below))
    return edited


@given(problems())
def test_follows_the_formula(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, strengths, plan = problem
    edited = edit_scores(scores, strengths, plan)
    eps = float(np.finfo(np.float32).eps)
    for token in range(len(scores)):
        expected = slow(scores[token].tolist(), strengths[plan[token]].tolist(), eps)
        # float32 σ of values up to 50, times β up to 999
        torch.testing.assert_close(edited[token], torch.tensor(expected), rtol=2e-5, atol=2e-4)


@given(problems())
def test_follows_the_formula_in_float64(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, strengths, plan = problem[0].double(), problem[1].double(), problem[2]
    edited = edit_scores(scores, strengths, plan)
    assert edited.dtype == torch.float64
    for token in range(len(scores)):
        expected = slow(
            scores[token].tolist(), strengths[plan[token]].tolist(), float(np.finfo(np.float64).eps)
        )
        torch.testing.assert_close(
            edited[token], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("dtype", DTYPES)
@given(scores=scores_of(1000.0))
def test_strength_zero_is_the_identity_to_the_bit(dtype: torch.dtype, scores: np.ndarray) -> None:
    given_scores = torch.from_numpy(scores).to(dtype)
    edited = edit_scores(given_scores, torch.zeros(scores.shape[1]))
    assert edited.dtype == dtype
    assert torch.equal(edited.view(torch.uint8), given_scores.view(torch.uint8))  # -0.0 stays -0.0


@pytest.mark.parametrize("dtype", DTYPES)
@given(scores=scores_of(4000.0), data=st.data())
def test_full_strength_lies_strictly_outside_after_rounding(
    dtype: torch.dtype, scores: np.ndarray, data: st.DataObject
) -> None:
    given_scores = torch.from_numpy(scores).to(dtype)
    expert = data.draw(st.integers(0, scores.shape[1] - 1))
    strengths = torch.zeros(scores.shape[1])
    for sign in (1.0, -1.0):
        strengths[expert] = sign
        edited = edit_scores(given_scores, strengths)
        assert edited.dtype == dtype
        assert bool((sign * edited[:, expert] > (sign * given_scores).amax(dim=-1)).all())
        eps = torch.finfo(dtype).eps
        for row, value in zip(
            given_scores.double().tolist(), edited[:, expert].double().tolist(), strict=True
        ):
            expected = slow(row, strengths.tolist(), eps)[expert]
            assert abs(value - expected) <= eps * abs(expected) + 1e-7  # rounded once


@pytest.mark.parametrize("dtype", DTYPES)
@given(scores=scores_of(1000.0), data=st.data())
def test_unnamed_experts_keep_their_scores_to_the_bit(
    dtype: torch.dtype, scores: np.ndarray, data: st.DataObject
) -> None:
    given_scores = torch.from_numpy(scores).to(dtype)
    strengths = torch.tensor([data.draw(LEVELS) for _ in range(scores.shape[1])])
    unnamed = strengths == 0
    edited = edit_scores(given_scores, strengths)
    assert torch.equal(edited[:, unnamed], given_scores[:, unnamed])


@pytest.mark.parametrize("dtype", DTYPES)
@given(scores=scores_of(), data=st.data())
def test_monotone_in_strength_and_never_the_wrong_way(
    dtype: torch.dtype, scores: np.ndarray, data: st.DataObject
) -> None:
    given_scores = torch.from_numpy(scores).to(dtype)
    expert = data.draw(st.integers(0, scores.shape[1] - 1))
    drawn = data.draw(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
    levels = sorted({-1.0, 0.0, 1.0, *drawn})
    edited = []
    for level in levels:
        strengths = torch.zeros(scores.shape[1], dtype=torch.float64)
        strengths[expert] = level
        edited.append(edit_scores(given_scores, strengths.float())[:, expert])
    for smaller, larger in itertools.pairwise(edited):
        assert bool((smaller <= larger).all())


@given(problems(), st.sampled_from([-96.0, -3.0, 0.5, 17.0, 64.0]))
def test_shift_equivariant(problem: tuple[Tensor, Tensor, Tensor], shift: float) -> None:
    """Adding a constant to a token's scores adds it to the result: a log-softmax would change nothing."""
    scores, strengths, plan = problem
    shifted = edit_scores(scores.double() + shift, strengths.double(), plan)
    torch.testing.assert_close(
        shifted, edit_scores(scores.double(), strengths.double(), plan) + shift, rtol=1e-9, atol=1e-8
    )


@given(problems())
def test_each_token_follows_its_own_plan(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, strengths, plan = problem
    together = edit_scores(scores, strengths, plan)
    size = strengths.abs()
    beta = float(torch.where(size < 1, size / (1 - size), 0).max())
    # σ sums in another order, which rounds by some eps of the scores; a strength multiplies that by its β.
    rounding = 4 * float(np.finfo(np.float32).eps) * float(scores.abs().max())
    for token in range(len(scores)):
        alone = edit_scores(scores[token : token + 1], strengths[plan[token]])
        torch.testing.assert_close(together[token], alone[0], rtol=1e-6, atol=1e-6 + beta * rounding)


@given(scores_of(5.0, experts=6))
def test_one_half_moves_by_one_population_standard_deviation(scores: np.ndarray) -> None:
    given_scores = torch.from_numpy(scores)
    for strength, sign in ((0.5, 1.0), (-0.5, -1.0)):
        for expert in range(6):
            strengths = torch.zeros(6)
            strengths[expert] = strength
            edited = edit_scores(given_scores, strengths)[:, expert]
            for token in range(len(scores)):
                row = scores[token].astype(np.float64)
                target = row[expert] + sign * np.std(row)
                clipped = target > row.max() + 0.01 if sign > 0 else target < row.min() - 0.01
                if not clipped:
                    assert float(edited[token]) == pytest.approx(target, abs=1e-5)


def test_one_half_by_hand() -> None:
    scores = torch.tensor([[0.0, 0.0, 4.0, 4.0]])  # mean 2, σ 2 (the sample's would be 2.31)
    edited = edit_scores(scores, torch.tensor([0.5, 0.0, 0.0, -0.5]))
    assert edited.tolist() == [[2.0, 0.0, 4.0, 2.0]]


def test_bounds_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 0.5]])
    edited = edit_scores(scores, torch.tensor([1.0, -1.0, 0.0, 0.99]))
    assert edited[0].tolist() == pytest.approx([3.01, 0.49, 3.0, 3.01])


def test_margin_grows_with_the_scores_where_the_dtype_is_coarse() -> None:
    scores = torch.tensor([[5.0, -7.0, 100.0]], dtype=torch.bfloat16)
    edited = edit_scores(scores, torch.tensor([1.0, 0.0, 0.0]))
    eps = torch.finfo(torch.bfloat16).eps
    assert float(edited[0, 0]) == pytest.approx(100 + 4 * eps * 100, abs=0.5)
    assert float(edited[0, 0]) > 100.0
    below = edit_scores(scores, torch.tensor([-1.0, 0.0, 0.0]))
    assert float(below[0, 0]) < -7.0


def test_equal_scores_have_no_deviation_but_still_have_bounds() -> None:
    scores = torch.full((2, 4), 1.5)
    edited = edit_scores(scores, torch.tensor([0.5, 1.0, -1.0, 0.999]))
    assert edited[0].tolist() == pytest.approx([1.5, 1.51, 1.49, 1.5])


def test_input_is_not_changed() -> None:
    scores = torch.randn(3, 5)
    before = scores.clone()
    edit_scores(scores, torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0]))
    assert torch.equal(scores, before)


# --------------------------------------------------------------------------- strengths of 0 and ±1

FULL = st.sampled_from([-1.0, 0.0, 1.0])


@st.composite
def full_problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores [tokens, experts], small and large, and a full strength for each."""
    limit = draw(st.sampled_from([1e-3, 1.0, 50.0, 3e4, 1e6, 1e30]))
    scores = draw(scores_of(float(np.float32(limit))))
    strengths = [[draw(FULL) for _ in row] for row in scores]
    return torch.from_numpy(scores), torch.tensor(strengths)


def moves_of(strengths: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [
        (
            tuple(expert for expert, value in enumerate(row) if value == 1),
            tuple(expert for expert, value in enumerate(row) if value == -1),
        )
        for row in strengths.tolist()
    ]


@given(full_problems(), st.sampled_from([*DTYPES, torch.float64]))
def test_moving_to_bounds_is_the_rule_to_the_bit(problem: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    scores, strengths = problem
    scores = scores.clamp(-3e4, 3e4).to(dtype) if dtype == torch.float16 else scores.to(dtype)
    sources = sources_of(strengths)
    assert sources is not None
    assert torch.equal(move_to_bounds(scores, sources), edit_scores(scores, strengths))
    one = move_to_bounds(scores, sources[0])
    assert torch.equal(one, edit_scores(scores, strengths[0]))


@given(full_problems())
def test_moving_a_few_in_place_is_the_rule_to_the_bit(problem: tuple[Tensor, Tensor]) -> None:
    scores, strengths = problem
    moved = scores.clone()
    move_few(moved, moves_of(strengths))
    assert torch.equal(moved, edit_scores(scores, strengths))
    assert torch.equal(moved.signbit()[strengths == 0], scores.signbit()[strengths == 0])
    marked = scores.clone()
    put_few(marked, moves_of(strengths), -1.0)
    assert torch.equal(marked, scores.masked_fill(strengths == -1, -1.0))


def test_sources_are_of_full_strengths_alone() -> None:
    assert sources_of(torch.tensor([[1.0, 0.0, -1.0]])).tolist() == [[4, 1, 3]]
    assert sources_of(torch.tensor([[1.0, 0.5, -1.0]])) is None


def test_only_a_few_scores_on_the_host_are_written_one_by_one() -> None:
    assert are_few(torch.zeros(4, 128))
    assert not are_few(torch.zeros(5, 128))
    assert not are_few(torch.zeros(2, 8, dtype=torch.bfloat16))
    assert not are_few(torch.zeros(8, 4).t())
    assert not are_few(torch.zeros(2, 8, requires_grad=True))
    assert not are_few(torch.zeros(2, 8, device="meta"))
    assert not are_few(torch.nn.Parameter(torch.zeros(2, 8), requires_grad=False))
    with FakeTensorMode():
        assert not are_few(torch.zeros(2, 8))
