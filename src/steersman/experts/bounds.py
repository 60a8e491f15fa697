"""The editing rule of expert steering: a router's scores moved toward a bound just outside them.

For each token, with its unedited scores x over the experts, their standard deviation σ, maximum and minimum,
and an expert's strength λ in [-1, 1], β = |λ| / (1 - |λ|):

    λ > 0:  x ← min(x + βσ, max + ε)        λ < 0:  x ← max(x - βσ, min - ε)        |λ| = 1: the bound itself

λ = ±1 is the rule of SteerMoE (arXiv 2509.09660, section 3): its log-softmax is a shift of the scores, and
every step here commutes with shifts. ε = max(0.01, 4 · eps(dtype) · |bound|), so that the bound stays outside
after rounding: in bfloat16 5.0 + 0.01 is 5.0.

`edit_scores` is the rule for any strengths. `move_to_bounds` is the same rule, to the bit, where every |λ| is
0 or 1, in half the operations: at one token a model waits for each of them. `move_few` is it once more for a
handful of tokens in the host's memory, where the call of an operation costs more than the arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_MARGIN = 0.01
"""SteerMoE's ε, in units of the scores."""


def edit_scores(scores: Tensor, strengths: Tensor, plan: Tensor | None = None) -> Tensor:
    """Apply the editing rule to the scores of many tokens, each with its own row of strengths.

    Args:
        scores: [tokens, experts], any floating dtype; not changed.
        strengths: λ, [plans, experts] where `plan` is given; else [tokens, experts], or one row for all
            tokens, [experts] or [1, experts].
        plan: [tokens], the row of `strengths` that each token follows.

    Returns:
        [tokens, experts] in the dtype of `scores`, computed in float32 (float64 stays). Where λ = 0 the
        score is returned to the bit.
    """
    return Moving.by(strengths if plan is None else strengths[plan])(scores)


@dataclass(eq=False)  # not frozen: it is made in compiled code, where torch 2.11 would lose its attributes
class Moving:
    """Strengths made ready for `edit_scores`, where the same ones edit scores step after step.

    Attributes:
        beta: β = |λ| / (1 - |λ|) with the sign of λ; any number where |λ| = 1.
        kept: λ = 0.
        raised, lowered: λ = 1, λ = -1; None where there is neither.
    """

    beta: Tensor
    kept: Tensor
    raised: Tensor | None
    lowered: Tensor | None

    @classmethod
    def by(cls, strengths: Tensor) -> Moving:
        """For λ, [tokens, experts] or one row for all."""
        size = strengths.abs()
        full = size == 1
        beta = strengths / (1 - size).masked_fill(full, 1.0)
        # Compiled code cannot look, and on a device looking would wait for it.
        looks = strengths.is_cpu and not torch.compiler.is_compiling()
        if looks and not bool(full.any()):
            return cls(beta, strengths == 0, None, None)
        return cls(beta, strengths == 0, strengths == 1, strengths == -1)

    def __call__(self, scores: Tensor) -> Tensor:
        """Edited scores, [tokens, experts]."""
        x = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
        lower, upper = _bounds(x, scores.dtype)
        deviation = x.std(dim=-1, correction=0, keepdim=True)
        moved = torch.clamp(x + self.beta * deviation, lower, upper)
        if self.raised is not None and self.lowered is not None:
            moved = torch.where(self.raised, upper, torch.where(self.lowered, lower, moved))
        return torch.where(self.kept, scores, moved.to(scores.dtype))


def sources_of(strengths: Tensor) -> Tensor | None:
    """Where `move_to_bounds` finds each expert's edited score; None where a strength is neither 0 nor ±1.

    Args:
        strengths: λ, [..., experts].

    Returns:
        int64 [..., experts], for E experts: e itself (its own score), E (the lower bound) or E + 1 (the
        upper).
    """
    experts = strengths.shape[-1]
    if not bool(((strengths == 0) | (strengths.abs() == 1)).all()):
        return None
    own = torch.arange(experts, device=strengths.device).expand(strengths.shape)
    return own.masked_fill(strengths < 0, experts).masked_fill(strengths > 0, experts + 1)


def move_to_bounds(scores: Tensor, sources: Tensor) -> Tensor:
    """`edit_scores` for strengths of 0 and ±1.

    Args:
        scores: [tokens, experts], any floating dtype; not changed.
        sources: From `sources_of`: [experts] for all tokens, or [tokens, experts].

    Returns:
        [tokens, experts] in the dtype of `scores`.
    """
    x = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    low, high = _bounds(x, scores.dtype)
    reached = torch.cat((x, low, high), -1)
    edited = reached.index_select(-1, sources) if sources.dim() == 1 else reached.gather(-1, sources)
    return edited if edited.dtype == scores.dtype else edited.to(scores.dtype)


def _bounds(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """min - ε and max + ε of each token, [tokens, 1], for scores that are rounded to `dtype`.

    max + ε is the largest of x + 0.01, x (1 + c) and x (1 - c) over the experts, c = 4 · eps(dtype): each
    grows with x, and c is a power of two, so both products round as |x| c added to x would. min - ε
    likewise: one reduction gives both.
    """
    offset, factor = _candidates(dtype, x.dtype, x.device)
    around = torch.addcmul(offset, x.unsqueeze(-2), factor).flatten(-2)
    if around.requires_grad:  # of which torch 2.11 knows no derivative
        return around.amin(dim=-1, keepdim=True), around.amax(dim=-1, keepdim=True)
    low, high = torch.aminmax(around, dim=-1, keepdim=True)
    return low, high


@functools.cache
@torch.inference_mode(False)  # kept, and used where gradients are wanted too
def _candidates(dtype: torch.dtype, computed: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets and factors, [4, 1] each, of the values around a score among which the bounds are found."""
    c = 4 * torch.finfo(dtype).eps
    offset = torch.tensor([LEAST_MARGIN, -LEAST_MARGIN, 0.0, 0.0], dtype=computed, device=device)
    factor = torch.tensor([1.0, 1.0, 1 + c, 1 - c], dtype=computed, device=device)
    return offset[:, None], factor[:, None]


FEW = 512
"""Scores up to which `move_few` takes less time than operations on tensors do."""

Moves = tuple[tuple[int, ...], tuple[int, ...]]
"""A token's experts at λ = 1, and those at λ = -1."""


def are_few(scores: Tensor) -> bool:
    """Whether scores can be written in place, one by one, on the host."""
    return (
        type(scores) is Tensor  # others need not have memory of their own: a FakeTensor's address is 0
        and scores.is_cpu
        and scores.dtype == torch.float32
        and scores.numel() <= FEW
        and not scores.requires_grad
        and scores.is_contiguous()
    )


def move_few(scores: Tensor, moves: Sequence[Moves]) -> None:
    """`move_to_bounds` in place, for scores that `are_few`.

    Sums are made in double precision and rounded once when they are written, which gives the bits of a sum
    in float32.

    Args:
        scores: float32 [tokens, experts]; changed.
        moves: Of each token.
    """
    experts = scores.shape[-1]
    c, least = _margin_of(torch.float32)
    floats = _floats(scores.numel()).from_address(scores.data_ptr())
    start = 0
    for activated, deactivated in moves:
        row = floats[start : start + experts]
        if activated:
            high = max(row)
            upper = high + max(least, c * abs(high))
            for expert in activated:
                floats[start + expert] = upper
        if deactivated:
            low = min(row)
            lower = low - max(least, c * abs(low))
            for expert in deactivated:
                floats[start + expert] = lower
        start += experts


def put_few(values: Tensor, moves: Sequence[Moves], value: float) -> None:
    """Write a value for every expert at λ = -1, in place, where values [tokens, experts] `are_few`."""
    experts = values.shape[-1]
    floats = _floats(values.numel()).from_address(values.data_ptr())
    start = 0
    for _, deactivated in moves:
        for expert in deactivated:
            floats[start + expert] = value
        start += experts


@functools.cache
def _floats(number: int) -> type[ctypes.Array[ctypes.c_float]]:
    return ctypes.c_float * number


@functools.cache
def _margin_of(dtype: torch.dtype) -> tuple[float, float]:
    """(c, least margin), as they are in a dtype."""
    return 4 * torch.finfo(dtype).eps, torch.tensor(LEAST_MARGIN, dtype=dtype).item()
