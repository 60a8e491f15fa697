"""The start-up canary: a sentinel plan must change what the model computes, and no plan must not.

An engine keeps compiled graphs from earlier starts. One that was compiled without the operations, or with
fewer, would serve every request unsteered and say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steersman.concepts.residual import Add
from steersman.edits import ROLES
from steersman.errors import SteeringNotApplied
from steersman.vllm.live import Span
from steersman.vllm.plan_rows import PlanRow
from steersman.vllm.worker_state import WorkerState

TOKENS = 4
CLEAR = 10.0
"""How many times the engine's own noise, from run to run, a change must be."""
REST = 1e-3
"""What may be left of the sentinel's change afterwards, where the engine is noisy."""
STALE = (
    "the model that the engine runs does not hold the operations of this steering: clear the engine's "
    "compile cache (VLLM_CACHE_ROOT, VLLM_DISABLE_COMPILE_CACHE=1) and start again"
)


def sing(state: WorkerState, forward: Callable[[int], Tensor]) -> None:
    """Run the model unsteered, with the sentinel in either direction, and unsteered again.

    Args:
        state: The worker's.
        forward: Runs the model on so many tokens, always the same, as requests are run; gives states.

    Raises:
        SteeringNotApplied: a site did not run, or the sentinel changed nothing, or something else did.
    """
    bank = state.bank
    if not bank.places.routers and not bank.places.blocks:
        return
    try:
        state.follow([], TOKENS)
        before = forward(TOKENS).clone()
        again = forward(TOKENS).clone()
        for plan in _sentinels(state):  # one lever at a time: the other would hide that it does nothing
            bank.write(bank.sentinel, plan)
            row = bank.row(bank.sentinel, 0)
            steered = [
                _steered(state, forward, Span(0, TOKENS, ((row, strength),)))
                for strength in (1.0, -1.0)  # one of which changes a router's choice, whatever that is
            ]
            state.follow([], TOKENS)
            _check(before, again, steered, forward(TOKENS).clone())
    finally:
        state.follow([], TOKENS)
        bank.clear(bank.sentinel)


def _steered(state: WorkerState, forward: Callable[[int], Tensor], span: Span) -> Tensor:
    state.follow([span], TOKENS)
    ran = state.counted()
    states = forward(TOKENS).clone()
    state.check_ran_since(ran)
    return states


def _check(before: Tensor, again: Tensor, steered: Sequence[Tensor], after: Tensor) -> None:
    noise = _distance(before, again)  # 0 where the engine computes the same twice
    moved, left = max(_distance(before, one) for one in steered), _distance(before, after)
    if not moved > CLEAR * noise:
        raise SteeringNotApplied(f"the sentinel plan changed nothing: {STALE}")
    if left > CLEAR * noise and left > REST * moved:
        raise SteeringNotApplied("the model computes something else after the sentinel plan than before it")


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _sentinels(state: WorkerState) -> list[tuple[PlanRow, ...]]:
    """Plans that no model can compute the same under: experts forced, and states pushed, everywhere."""
    places = state.bank.places
    strengths = {place.layer: {0: -1.0, place.experts - 1: 1.0} for place in places.routers}
    push = Add(torch.linspace(-8, 8, places.width))
    steps = {layer: [push] for layer in places.blocks}
    rows = (PlanRow(strengths, {}), PlanRow({}, steps))
    return [(row,) * len(ROLES) for row in rows if not row.empty]
