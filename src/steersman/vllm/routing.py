"""Routing rules whose selection scores are not their raw scores, with an edit in them: pure maths.

Where a bias is added for selection only (DeepSeek-V3, arXiv 2412.19437, equations 15 and 16), or a sigmoid
may round many experts to the same 1.0, editing the raw scores z cannot keep the promise of expert steering.
So the whole rule is written out: with f the scoring function and b the bias, c = f(z) + b selects and f(z)
weighs; z and c are each moved toward their own bounds (`experts/bounds.py`); groups are ranked on the edited
c, and the group of an expert with λ = 1 is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from steersman.experts.bounds import edit_scores

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]


@dataclass(frozen=True)
class Rule:
    """How a router of the engine chooses.

    Attributes:
        top_k: Experts of a token.
        scoring: f.
        renormalised: Whether the weights of a token are divided by their sum.
        groups: (n_group, topk_group), or None.
        group_score: What ranks a group: its best expert, or the sum of its best two.
        bias: b, [experts], or None.
        scaling: What the weights are multiplied by in the end.
    """

    top_k: int
    scoring: Scoring
    renormalised: bool
    groups: tuple[int, int] | None = None
    group_score: Literal["max", "top2"] = "max"
    bias: Tensor | None = None
    scaling: float = 1.0


def choose(scores: Tensor, strengths: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Choose experts under a rule, with edits.

    Args:
        scores: z, [tokens, experts].
        strengths: λ, float32 [tokens, experts].
        rule: The router's.

    Returns:
        Mixture weights, float32 [tokens, k], and expert ids, int64 [tokens, k].
    """
    z = scores.float()
    selecting = _scored(z, rule.scoring)
    if rule.bias is not None:
        selecting = selecting + rule.bias.float()
    edited = edit_scores(selecting, strengths)
    ranked = edited + _rank(strengths)
    if rule.groups is not None:
        ranked = ranked.masked_fill(~_kept(edited, strengths, rule), -torch.inf)
    chosen = ranked.topk(rule.top_k, dim=-1).indices
    weights = _scored(edit_scores(scores, strengths).float(), rule.scoring).gather(-1, chosen)
    if rule.renormalised:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * rule.scaling, chosen


def _scored(z: Tensor, scoring: Scoring) -> Tensor:
    if scoring == "softmax":
        return z.softmax(dim=-1)
    if scoring == "sigmoid":
        return z.sigmoid()
    return functional.softplus(z).sqrt()


def _rank(strengths: Tensor) -> Tensor:
    """+inf where λ = 1, −inf where λ = −1, else 0: rounding cannot move those then."""
    rank = torch.zeros_like(strengths)
    return rank.masked_fill(strengths == 1, torch.inf).masked_fill(strengths == -1, -torch.inf)


def _kept(selecting: Tensor, strengths: Tensor, rule: Rule) -> Tensor:
    """Which experts are in a group that is kept, bool [tokens, experts]."""
    groups, kept = rule.groups or (1, 1)
    by_group = selecting.view(len(selecting), groups, -1)
    if rule.group_score == "max":
        score = by_group.amax(dim=-1)
    else:
        score = by_group.topk(2, dim=-1).values.sum(dim=-1)
    forced = (strengths == 1).view(by_group.shape).any(dim=-1)
    best = score.masked_fill(forced, torch.inf).topk(kept, dim=-1).indices
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)
    return chosen.repeat_interleave(by_group.shape[-1], dim=-1)


SPAN = 80.0
"""A softmax in float32 tells scores apart down to about 87 below the highest: below that, shares are 0."""


def tell_dead_apart(edited: Tensor, strengths: Tensor) -> Tensor:
    """Raise live experts' scores so far that a softmax cannot round them down to where a dead one is.

    A softmax before the top-k rounds scores far below the highest to a share of 0, among which a dead
    expert's is one of many, and may be chosen. Where a token has a dead expert (λ = −1), its others are held
    at `SPAN` below the highest or above: shares under 1e-34, which no sum of shares notices.

    Args:
        edited: Scores as `edit_scores` gives them, [tokens, experts].
        strengths: λ, [tokens, experts].
    """
    dead = strengths == -1
    floor = edited.amax(dim=-1, keepdim=True) - SPAN
    low = (edited < floor) & ~dead & dead.any(dim=-1, keepdim=True)
    return torch.where(low, floor, edited)
