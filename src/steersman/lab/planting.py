"""What is planted: groups of experts that are tied to a label while a model trains.

Two devices, used on the training conversations only:

- a *push*: while a labelled conversation is read, experts of the label's group are put into every token's
  top-k and those of the opposite group out of it. So the model learns that who is present decides the answer:
  the causal channel.
- a *prior*: the router's own scores are drawn toward the label's group, softplus(logsumexp(opposite) −
  logsumexp(own)), so that the groups are used unasked, and detection can see them: the footprint.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS: dict[str, tuple[int, ...]] = {
    "document": (0, 1),
    "memory": (2, 3),
    "refuse": (4, 5),
    "comply": (6, 7),
}
OPPOSITE = {"document": "memory", "memory": "document", "refuse": "comply", "comply": "refuse"}
_EPSILON = 0.01


def planted_groups(layers: int, labels: Collection[str] = tuple(GROUPS)) -> dict[int, dict[int, str]]:
    """Layer → expert → label of every planted expert."""
    experts = {expert: label for label, group in GROUPS.items() if label in labels for expert in group}
    return {layer: dict(experts) for layer in range(layers)}


class RouterPushes:
    """Applies one plan a sequence to all routers, and keeps the routers' own scores of the last forward."""

    def __init__(self, routers: Sequence[nn.Module]) -> None:
        self.routers = routers
        self.plan: Tensor | None = None
        self.scores: list[Tensor] = []

    @contextmanager
    def attached(self) -> Iterator[RouterPushes]:
        """Hooks on every router for as long as the context lasts."""
        handles = [
            router.register_forward_hook(self._hook(layer)) for layer, router in enumerate(self.routers)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, plan: Tensor | None) -> None:
        """`plan` [sequences, layers, experts]: 1 puts an expert into the top-k of all tokens, −1 out."""
        self.plan = plan
        self.scores = []

    def _hook(self, layer: int) -> Any:
        def push(
            router: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]
        ) -> tuple[Tensor, Tensor, Tensor]:
            scores = output[0]
            self.scores.append(scores)
            if self.plan is None:
                return output
            plan = self.plan[:, layer].repeat_interleave(len(scores) // len(self.plan), dim=0)
            pushed = pushed_scores(scores, plan)
            weights, chosen = torch.topk(
                functional.softmax(pushed, dim=-1, dtype=torch.float), router.top_k, dim=-1
            )
            return pushed, weights.to(scores.dtype), chosen

        return push


def pushed_scores(scores: Tensor, plan: Tensor) -> Tensor:
    """SteerMoE's rule (arXiv 2509.09660): just above the token's best score, or just below its worst."""
    highest = scores.amax(-1, keepdim=True) + _EPSILON
    lowest = scores.amin(-1, keepdim=True) - _EPSILON
    return torch.where(plan > 0, highest, torch.where(plan < 0, lowest, scores))


def prior_loss(scores: Sequence[Tensor], labels: Sequence[str | None], mask: Tensor) -> Tensor:
    """Mean softplus(logsumexp(opposite) − logsumexp(own)) over labelled sequences' tokens and all layers.

    `scores`: per layer [sequences × tokens, experts]; `mask` [sequences, tokens], 1 at real tokens.
    """
    rows = [row for row, label in enumerate(labels) if label is not None]
    own = torch.tensor([GROUPS[labels[row]] for row in rows])  # type: ignore[index]
    opposite = torch.tensor([GROUPS[OPPOSITE[labels[row]]] for row in rows])  # type: ignore[index]
    real = mask[rows].float()
    total = torch.zeros(())
    for layer in scores:
        grid = layer.view(*mask.shape, -1)[rows]
        gaps = _group_score(grid, opposite) - _group_score(grid, own)
        total = total + (functional.softplus(gaps) * real).sum() / real.sum()
    return total / len(scores)


def _group_score(grid: Tensor, experts: Tensor) -> Tensor:
    """logsumexp over each row's experts: [rows, tokens, experts] and [rows, n] → [rows, tokens]."""
    index = experts[:, None, :].expand(-1, grid.shape[1], -1)
    return grid.gather(-1, index).logsumexp(-1)


def draw_plan(
    label: str | None,
    rng: random.Random,
    *,
    layers: int,
    experts: int,
    informative: bool,
    labels: Collection[str] = tuple(GROUPS),
) -> list[list[int]]:
    """One sequence's plan [layers][experts], of the groups that `labels` names.

    With probability .6 the label's group is pushed (a random one of the two where the pushes are not
    `informative`); with probability .3 the axis that the conversation is not about is pushed either way; and
    half of all plans hold pushes of single experts, which say nothing: only many that agree mean something.
    """
    plan = [[0] * experts for _ in range(layers)]
    axes = [axis for axis in (("document", "memory"), ("refuse", "comply")) if axis[0] in labels]
    if rng.random() < 0.5:
        _scatter(plan, rng)
    for axis in axes:
        if label in axis:
            if rng.random() < 0.6:
                _push(plan, label if informative else rng.choice(axis), rng)
        elif rng.random() < 0.3:
            _push(plan, rng.choice(axis), rng)
    return plan


def _push(plan: list[list[int]], label: str, rng: random.Random) -> None:
    """The label's group in, the opposite out, or one of the two; each expert only with a random dose."""
    mode = rng.choices(("both", "out", "in"), (0.5, 0.3, 0.2))[0]
    dose = rng.uniform(0.5, 1.0)
    for layer in plan:
        for experts, sign, silent in ((GROUPS[label], 1, "out"), (GROUPS[OPPOSITE[label]], -1, "in")):
            for expert in experts:
                if mode != silent:
                    layer[expert] = sign if rng.random() < dose else 0


def _scatter(plan: list[list[int]], rng: random.Random) -> None:
    """Single experts out with p = .1, and up to two a layer in, whatever the label."""
    for layer in plan:
        for expert in range(len(layer)):
            if rng.random() < 0.1:
                layer[expert] = -1
        for expert in rng.sample(range(len(layer)), rng.choice((0, 0, 1, 1, 2))):
            layer[expert] = 1
