"""`routing.choose` on a GPU: one Triton program for each token that has an edit at its router.

A token without one keeps the engine's own choice, to the bit. The rules of all routers are one table, so
that one kernel serves layers that choose in different ways.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from steersman.vllm.bank import Bank
from steersman.vllm.kernels import check_dtype, count_run, edited, rows_of_tokens, strengths_of, warps

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
SINGLE = tl.constexpr(4 * torch.finfo(torch.float32).eps)
"""4 · eps of the scores that select, which are float32."""


@dataclass(frozen=True)
class RuleTable:
    """The rules of a bank's routers.

    Attributes:
        numbers: int32 [routers, 6]: scoring (a place in `SCORINGS`), renormalised, groups, groups kept,
            whether the best two rank a group, top-k. Zeros where a router has no rule of ours.
        scaling: float32 [routers].
        bias: float32 [routers, experts]; 0 where there is none, as all that it is added to is 0 or more.
        most: The largest top-k.
        softmax_first: int32 [routers], for `kernels.edit_scores`.
    """

    numbers: Tensor
    scaling: Tensor
    bias: Tensor
    most: int
    softmax_first: Tensor


def rule_table(bank: Bank) -> RuleTable:
    """The rules of a bank's places, where the model runs; biases are copied."""
    routers, _, experts = bank.strengths.shape
    numbers, scaling, bias = torch.zeros(routers, 6), torch.ones(routers), torch.zeros(routers, experts)
    for index, place in enumerate(bank.places.routers):
        rule = place.rule
        if rule is None:
            continue
        groups, kept = rule.groups or (0, 0)
        two = rule.group_score == "top2"
        numbers[index] = torch.tensor(
            [SCORINGS.index(rule.scoring), rule.renormalised, groups, kept, two, rule.top_k],
            dtype=torch.float32,
        )
        scaling[index] = rule.scaling
        if rule.bias is not None:
            bias[index, : place.experts] = rule.bias.detach().float().cpu()
    first = torch.tensor([place.softmax_first for place in bank.places.routers], dtype=torch.int32)
    rules = (place.rule for place in bank.places.routers)
    return RuleTable(
        numbers.to(torch.int32).to(bank.device),
        scaling.to(bank.device),
        bias.to(bank.device),
        max((rule.top_k for rule in rules if rule is not None), default=0),
        first.to(bank.device),
    )


@triton.jit
def _log_one_plus(x):
    """log(1 + x) for 0 ≤ x ≤ 1, exact where 1 + x is rounded to 1 too."""
    whole = 1.0 + x
    rounded = whole - 1.0
    return tl.where(rounded == 0.0, x, tl.log(whole) * x / tl.where(rounded == 0.0, 1.0, rounded))


@triton.jit
def _scored(z, inside, scoring):
    """f(z), float32 [block]; 0 beyond the last expert."""
    if scoring == 0:
        highest = tl.max(tl.where(inside, z, float("-inf")))
        power = tl.where(inside, tl.exp(z - highest), 0.0)
        result = power / tl.sum(power)
    elif scoring == 1:
        result = 1.0 / (1.0 + tl.exp(-z))
    else:
        result = tl.sqrt_rn(tl.maximum(z, 0.0) + _log_one_plus(tl.exp(-tl.abs(z))))
    return tl.where(inside, result, 0.0)


@triton.jit
def _in_kept_groups(selecting, strength, inside, experts, groups, kept, best_two, block: tl.constexpr):
    """Which experts are in a group that is kept; a group with an expert at λ = 1 is."""
    offsets = tl.arange(0, block)
    group_of = offsets // (experts // groups)
    score = tl.full([block], float("-inf"), tl.float32)
    for group in range(groups):
        member = inside & (group_of == group)
        value = tl.max(tl.where(member, selecting, float("-inf")))
        if best_two != 0:
            first = tl.min(tl.where(member & (selecting == value), offsets, block))
            value += tl.max(tl.where(member & (offsets != first), selecting, float("-inf")))
        forced = tl.max(tl.where(member & (strength == 1.0), 1, 0))
        value = tl.where(forced == 1, float("inf"), value)
        score = tl.where(member, value, score)
    chosen = tl.zeros([block], tl.int32)
    for _ in range(kept):
        open_ = inside & (chosen == 0)
        best = tl.max(tl.where(open_, score, float("-inf")))
        group = tl.min(tl.where(open_ & (score == best), group_of, block))
        chosen = tl.where(group_of == group, 1, chosen)
    return inside & (chosen == 1)


@triton.jit
def _choose(
    scores,
    weights,
    ids,
    site,
    token_rows,
    token_strengths,
    table,
    rules,
    scaling,
    bias,
    ran,
    stride,
    column,
    weight_stride,
    id_stride,
    experts,
    table_rows,
    table_experts,
    components,
    tokens,
    factor,
    block: tl.constexpr,
    chosen_block: tl.constexpr,
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
        scoring = tl.load(rules + index * 6)
        groups = tl.load(rules + index * 6 + 2)
        given = tl.load(scores + token.to(tl.int64) * stride + offsets * column, mask=inside, other=0.0)
        z = given.to(tl.float32)
        selecting = _scored(z, inside, scoring)
        selecting += tl.load(bias + index * table_experts + offsets, mask=inside, other=0.0)
        selecting = edited(selecting, strength, inside, experts, SINGLE)
        weighing = edited(z, strength, inside, experts, factor).to(given.dtype).to(tl.float32)
        weighing = _scored(weighing, inside, scoring)
        rank = tl.where(strength == 1.0, float("inf"), selecting)
        rank = tl.where(strength == -1.0, float("-inf"), rank)
        if groups > 0:
            kept, two = tl.load(rules + index * 6 + 3), tl.load(rules + index * 6 + 4)
            among = _in_kept_groups(selecting, strength, inside, experts, groups, kept, two, block)
            rank = tl.where(among, rank, float("-inf"))
        top_k = tl.load(rules + index * 6 + 5)
        places = tl.arange(0, chosen_block)
        chosen = tl.zeros([chosen_block], tl.int32)
        share = tl.zeros([chosen_block], tl.float32)
        taken = tl.zeros([block], tl.int32)
        for turn in range(top_k):
            open_ = inside & (taken == 0)
            best = tl.max(tl.where(open_, rank, float("-inf")))
            expert = tl.min(tl.where(open_ & (rank == best), offsets, experts - 1))
            taken = tl.where(offsets == expert, 1, taken)
            chosen = tl.where(places == turn, expert, chosen)
            weight = tl.sum(tl.where(offsets == expert, weighing, 0.0))
            share = tl.where(places == turn, weight, share)
        if tl.load(rules + index * 6 + 1) != 0:
            share = share / tl.sum(share)
        share = share * tl.load(scaling + index)
        held = places < top_k
        at = token.to(tl.int64)
        tl.store(weights + at * weight_stride + places, share.to(weights.dtype.element_ty), mask=held)
        tl.store(ids + at * id_stride + places, chosen.to(ids.dtype.element_ty), mask=held)


def choose(scores: Tensor, weights: Tensor, ids: Tensor, site: Tensor, bank: Bank, rules: RuleTable) -> None:
    """Choose experts anew, in place, for the tokens that have an edit here.

    Args:
        scores: z, [tokens, experts].
        weights: Mixture weights, [tokens, k], as the engine has chosen.
        ids: Expert ids, [tokens, k], of any whole type. Shared experts that the engine runs beside those of
            the choice may stand behind them, and stay.
        site: int32 [1], the router's number.
        bank: The tables.
        rules: From `rule_table`.

    Raises:
        ValueError: shapes or types that the kernel does not know.
    """
    tokens, experts = scores.shape
    if not tokens:
        return
    check_dtype(scores)
    if (
        ids.shape[1] < rules.most
        or weights.shape != ids.shape
        or weights.stride(1) != 1
        or ids.stride(1) != 1
    ):
        raise ValueError(
            f"the engine's choice is {tuple(ids.shape)} with weights {tuple(weights.shape)}; known are "
            f"{rules.most} experts a token, side by side"
        )
    block = triton.next_power_of_2(experts)
    _choose[(tokens,)](
        scores,
        weights,
        ids,
        site,
        bank.token_rows,
        bank.token_strengths,
        bank.strengths,
        rules.numbers,
        rules.scaling,
        rules.bias,
        bank.ran,
        *scores.stride(),
        weights.stride(0),
        ids.stride(0),
        experts,
        *bank.strengths.shape[1:],
        *rows_of_tokens(bank),
        4 * torch.finfo(scores.dtype).eps,
        block=block,
        chosen_block=triton.next_power_of_2(rules.most),
        num_warps=warps(block, 128),
    )
