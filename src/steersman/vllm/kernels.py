"""The edits of a step on a GPU: one Triton program for each token reads which rows it follows, and edits.

What a program does depends on tables at fixed addresses only, so a captured graph that is replayed follows
what has been written into them since. A token that follows nothing at a site costs the reading of its rows,
and its numbers are not written, to the bit. The rules are those of `experts/bounds.py` and
`concepts/residual.py`; states are summed in float32 and rounded once.

The first program of each launch counts the run of its site in `ran`. Tokens beyond those of the tables
(an engine may pad a step further) follow nothing.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from steersman.experts.bounds import LEAST_MARGIN
from steersman.vllm.bank import Bank
from steersman.vllm.routing import SPAN

LEAST = tl.constexpr(LEAST_MARGIN)
FLOOR = tl.constexpr(SPAN)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of scores and states."""


# ------------------------------------------------------------ parts of kernels


@triton.jit
def count_run(ran, index, token):
    """Count that a site has run."""
    if token == 0:
        tl.store(ran + index, tl.load(ran + index) + 1)


@triton.jit
def strengths_of(
    token,
    rows,
    strengths,
    table,
    index,
    table_rows,
    table_experts,
    experts,
    components,
    tokens,
    block: tl.constexpr,
):
    """λ of a token's experts, clipped to ±1, float32 [block]; 0 beyond the last expert."""
    offsets = tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    if token < tokens:
        for component in range(components):
            row = tl.load(rows + token * 2 * components + component)
            if row != 0:
                by = tl.load(strengths + token * 2 * components + component)
                start = table + (index * table_rows + row).to(tl.int64) * table_experts
                total += tl.load(start + offsets, mask=offsets < experts, other=0.0) * by
    return tl.minimum(tl.maximum(total, -1.0), 1.0)


@triton.jit
def edited(x, strength, inside, experts, factor):
    """Scores x moved by λ, both float32 [block]: the rule of `experts.bounds.edit_scores`.

    `factor` is 4 · eps of the dtype that the scores are rounded to.
    """
    low = tl.min(tl.where(inside, x, float("inf")))
    high = tl.max(tl.where(inside, x, float("-inf")))
    lower = low - tl.maximum(factor * tl.abs(low), LEAST)
    upper = high + tl.maximum(factor * tl.abs(high), LEAST)
    mean = tl.sum(tl.where(inside, x, 0.0)) / experts
    apart = tl.where(inside, x - mean, 0.0)
    deviation = tl.sqrt_rn(tl.sum(apart * apart) / experts)
    size = tl.abs(strength)
    full = size == 1.0
    beta = strength / tl.where(full, 1.0, 1.0 - size)
    moved = tl.minimum(tl.maximum(x + beta * deviation, lower), upper)
    bounded = tl.where(full, tl.where(strength > 0.0, upper, lower), moved)
    return tl.where(strength == 0.0, x, bounded)


# ------------------------------------------------------------ kernels


@triton.jit
def _edit_scores(
    scores,
    site,
    token_rows,
    token_strengths,
    table,
    softmax_first,
    ran,
    stride,
    column,
    experts,
    table_rows,
    table_experts,
    components,
    tokens,
    factor,
    block: tl.constexpr,
):
    token = tl.program_id(0)
    index = tl.load(site)
    count_run(ran, index, token)
    strength = strengths_of(
        token,
        token_rows,
        token_strengths,
        table,
        index,
        table_rows,
        table_experts,
        experts,
        components,
        tokens,
        block,
    )
    if tl.max(tl.abs(strength)) > 0.0:
        offsets = tl.arange(0, block)
        inside = offsets < experts
        place = scores + token.to(tl.int64) * stride + offsets * column
        given = tl.load(place, mask=inside, other=0.0)
        new = edited(given.to(tl.float32), strength, inside, experts, factor).to(given.dtype)
        changed = inside & (strength != 0.0)
        if tl.load(softmax_first + index) != 0:
            dead = inside & (strength == -1.0)
            if tl.max(dead.to(tl.int32)) != 0:
                exact = new.to(tl.float32)
                highest = tl.max(tl.where(inside, exact, float("-inf")))
                floor = (highest - FLOOR).to(given.dtype)
                low = inside & (exact < floor.to(tl.float32)) & (strength != -1.0)
                new = tl.where(low, floor, new)
                changed = changed | low
        tl.store(place, new, mask=changed)


@triton.jit
def _edit_states(
    hidden,
    residual,
    site,
    token_rows,
    token_strengths,
    vector_ids,
    shares,
    vectors,
    ran,
    stride,
    residual_stride,
    width,
    first_block,
    table_rows,
    components,
    slots,
    tokens,
    has_residual: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0)
    index = tl.load(site)
    count_run(ran, index, token)
    here = (index - first_block) * table_rows
    count = 0
    if token < tokens:
        for component in range(components):
            row = tl.load(token_rows + token * 2 * components + component)
            if row != 0:
                for slot in range(slots):
                    count += tl.load(vector_ids + (here + row) * slots + slot)
    if count != 0:
        offsets = tl.arange(0, block)
        inside = offsets < width
        place = hidden + token.to(tl.int64) * stride + offsets
        state = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        for component in range(components):
            row = tl.load(token_rows + token * 2 * components + component)
            if row != 0:
                by = tl.load(token_strengths + token * 2 * components + component)
                for slot in range(slots):
                    number = tl.load(vector_ids + (here + row) * slots + slot)
                    if number != 0:
                        start = vectors + number.to(tl.int64) * width
                        vector = tl.load(start + offsets, mask=inside, other=0.0)
                        if slot % 2 == 0:
                            state += vector * by
                        else:
                            share = tl.load(shares + (here + row) * slots + slot) * by
                            if share != 0.0:
                                whole = state
                                if has_residual:
                                    beside = residual + token.to(tl.int64) * residual_stride + offsets
                                    whole += tl.load(beside, mask=inside, other=0.0).to(tl.float32)
                                state -= share * tl.sum(whole * vector) * vector
        tl.store(place, state.to(hidden.dtype.element_ty), mask=inside)


# ------------------------------------------------------------ launches


def edit_scores(scores: Tensor, site: Tensor, bank: Bank, softmax_first: Tensor) -> None:
    """Edit a router's scores in place.

    Args:
        scores: [tokens, experts], float32, bfloat16 or float16.
        site: int32 [1], the router's number.
        bank: The tables.
        softmax_first: int32 [routers], 1 where a softmax comes before the top-k (`tell_dead_apart`).
    """
    tokens, experts = scores.shape
    if not tokens:
        return
    check_dtype(scores)
    block = triton.next_power_of_2(experts)
    _edit_scores[(tokens,)](
        scores,
        site,
        bank.token_rows,
        bank.token_strengths,
        bank.strengths,
        softmax_first,
        bank.ran,
        *scores.stride(),
        experts,
        *bank.strengths.shape[1:],
        *rows_of_tokens(bank),
        4 * torch.finfo(scores.dtype).eps,
        block=block,
        num_warps=warps(block, 512),
    )


def edit_states(hidden: Tensor, residual: Tensor | None, site: Tensor, bank: Bank) -> None:
    """Edit the output of a decoder layer in place.

    Args:
        hidden: What is changed, [tokens, width], float32, bfloat16 or float16.
        residual: What the engine adds to it later, [tokens, width]; None: nothing.
        site: int32 [1], the block's number, counted on from the routers.
        bank: The tables.
    """
    tokens, width = hidden.shape
    if not tokens:
        return
    check_dtype(hidden)
    beside = hidden if residual is None else residual
    if hidden.stride(1) != 1 or beside.stride(1) != 1:
        raise ValueError("states whose numbers do not lie side by side cannot be edited")
    block = triton.next_power_of_2(width)
    _edit_states[(tokens,)](
        hidden,
        beside,
        site,
        bank.token_rows,
        bank.token_strengths,
        bank.vector_ids,
        bank.shares,
        bank.vectors,
        bank.ran,
        hidden.stride(0),
        beside.stride(0),
        width,
        len(bank.places.routers),
        bank.vector_ids.shape[1],
        bank.room.components,
        bank.room.slots,
        bank.room.tokens,
        has_residual=residual is not None,
        block=block,
        num_warps=warps(block, 512),
    )


def rows_of_tokens(bank: Bank) -> tuple[int, int]:
    """(components, tokens) of the table of who follows what."""
    return bank.room.components, bank.room.tokens


def warps(block: int, each: int) -> int:
    """Warps for a block of numbers: a power of two, 16 at most, `each` numbers a warp."""
    return max(1, min(16, block // each))


def check_dtype(tensor: Any) -> None:
    """Raise `ValueError` for numbers that the kernels do not know."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"the kernels edit {', '.join(map(str, DTYPES))}, not {tensor.dtype}")
