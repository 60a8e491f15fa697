"""Edits of the residual stream as mathematics: against loops over tokens, and by their properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steersman import ResidualEdit
from steersman.concepts.residual import Add, Slots, edit_states, steps_of

WIDTH = 5
LAYER = 3
STATES = torch.tensor([[0.0, -0.0, 1.0, -2.5, 3e4], [1.5, 2.0, -0.0, 1e-30, -7.0]])


def slow(state: Tensor, edits: list[ResidualEdit]) -> Tensor:
    """One token's state after the edits, in order, in float64."""
    h = state.double()
    for edit in edits:
        v = edit.vectors[LAYER].double()
        if edit.operation == "add":
            h = h + edit.strength * v
        else:
            unit = v / v.pow(2).sum().sqrt()
            h = h - edit.strength * (h * unit).sum() * unit
    return h


numbers = st.floats(-8, 8, width=32, allow_subnormal=False)
vectors = st.lists(numbers, min_size=WIDTH, max_size=WIDTH).filter(lambda v: max(map(abs, v)) > 0.1)


@st.composite
def edits(draw: st.DrawFn) -> ResidualEdit:
    operation = draw(st.sampled_from(["add", "project"]))
    strength = draw(
        st.sampled_from([0.0, 0.25, 1.0]) if operation == "project" else st.floats(-3, 3, width=32)
    )
    return ResidualEdit({LAYER: torch.tensor(draw(vectors))}, strength, operation=operation)


rows = st.lists(st.lists(edits(), max_size=4), min_size=1, max_size=4)


@given(rows, st.integers(0, 2**31))
def test_rows_of_steps_equal_a_loop_over_tokens(plans: list[list[ResidualEdit]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(9, WIDTH, generator=generator)
    index = torch.randint(len(plans), (9,), generator=generator)
    before = states.clone()
    steps = [steps_of(plan, LAYER) for plan in plans]
    found = edit_states(states, Slots(steps, WIDTH, torch.device("cpu")).at(index))
    for token, row in enumerate(index.tolist()):
        torch.testing.assert_close(
            found[token].double(), slow(states[token], plans[row]), rtol=1e-4, atol=1e-4
        )
        # The steps of a row by themselves are the same.
        torch.testing.assert_close(found[token], edit_states(states[token : token + 1], steps[row])[0])
    assert torch.equal(states, before)  # what is given is never changed


@pytest.mark.parametrize("other", [[], [ResidualEdit({LAYER: torch.ones(WIDTH)}, 0.0)]])
def test_a_row_without_edits_keeps_its_bits_beside_rows_that_have_some(other: list[ResidualEdit]) -> None:
    busy = [
        ResidualEdit({LAYER: torch.ones(WIDTH)}, 2.0),
        ResidualEdit({LAYER: torch.arange(1.0, 1 + WIDTH)}, 0.5, operation="project"),
        ResidualEdit({LAYER: torch.ones(WIDTH)}, -1.0),
    ]
    slots = Slots([steps_of(busy, LAYER), steps_of(other, LAYER)], WIDTH, torch.device("cpu"))
    found = edit_states(STATES, slots.at(torch.tensor([0, 1])))
    assert not torch.equal(found[0], STATES[0])
    assert torch.equal(found[1].view(torch.int32), STATES[1].view(torch.int32))  # −0.0 stays −0.0
    found = edit_states(STATES, slots.at(torch.tensor([1, 0])))
    assert torch.equal(found[0].view(torch.int32), STATES[0].view(torch.int32))


def test_adding_that_follows_adding_is_one_step_and_nothing_is_none() -> None:
    one, two = torch.ones(WIDTH), torch.arange(float(WIDTH))
    three = [
        ResidualEdit({LAYER: one}, 2.0),
        ResidualEdit({LAYER: two}, -1.0),
        ResidualEdit({LAYER: one}, 0.0),
    ]
    (step,) = steps_of(three, LAYER)
    assert isinstance(step, Add)
    assert torch.equal(step.vector, 2 * one - two)
    assert steps_of(three, LAYER + 1) == []


@given(vectors)
def test_projecting_at_1_takes_the_direction_out_and_does_so_once(vector: list[float]) -> None:
    steps = steps_of([ResidualEdit({LAYER: torch.tensor(vector)}, 1.0, operation="project")], LAYER)
    states = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    once = edit_states(states, steps)
    unit = torch.tensor(vector).double() / torch.tensor(vector).double().norm()
    assert (once.double() @ unit).abs().max() < 1e-5
    torch.testing.assert_close(edit_states(once, steps), once, rtol=1e-5, atol=1e-5)
    assert (once.norm(dim=-1) <= states.norm(dim=-1) + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_to_in_float32(dtype: torch.dtype) -> None:
    states, vector = torch.full((1, WIDTH), 256.0, dtype=dtype), torch.full((WIDTH,), 0.7)
    plan = [ResidualEdit({LAYER: vector}, 1.0), ResidualEdit({LAYER: vector}, 1.0)]
    found = edit_states(states, steps_of(plan, LAYER))
    assert found.dtype == dtype
    # In bfloat16 each 0.7 alone would be lost to rounding; their exact sum is not.
    assert torch.equal(found, (states.double() + 1.4).to(dtype))
    assert not torch.equal(found, states) or dtype == torch.bfloat16
