"""Two routing rules written out, for routers that were seen to follow one of them to the bit.

Most families choose by a top-k of a softmax or a softmax of a top-k, and nothing else. Written out with the
edit in its place, that costs a few operations; intercepting a router's own code costs as much again. So a
router's class, flags and dtype are tried: where the rule gives the very bits of the router's own forward, it
is used for steering; everywhere else, interception.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from steersman.experts.interception import check_size
from steersman.experts.router_tables import TokenEdit
from steersman.models.architecture import RouterSite
from steersman.models.families import family_of
from steersman.models.overflow import Watcher, scores_overflown

Rule = Callable[[Tensor, int, bool, TokenEdit | None, bool], tuple[Tensor, Tensor]]
"""(scores z, k, renormalised, edit, whether the scores are few) → (mixture weights, expert ids)"""


class PlainRouting:
    """One router's forward, written out.

    Its output is (scores z, mixture weights, expert ids), as the families' own. It holds for what was tried:
    a class, its flags, and the dtype of the scores (which autocast changes).
    """

    def __init__(self, site: RouterSite, rule: Rule, flags: dict[str, Any], renormalised: bool) -> None:
        self._site = site
        self._state = site.module.__dict__
        self._forward = type(site.module).forward
        self._parameters = site.module._parameters
        self._width = site.weight.shape[1]
        self._top_k = site.facts.top_k
        self._rule = rule
        self._flags = flags
        self._renormalised = renormalised
        self.dtype: torch.dtype | None = None
        """That of the scores with which it was tried."""

    def run(
        self, hidden: Tensor, edit: TokenEdit | None, size: int, watcher: Watcher | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Choose experts for hidden states [..., width] of `size` tokens; None edits nothing.

        Returns None where the router is not as it was tried.
        """
        weight = self._parameters.get("weight")
        if weight is None or type(self._site.module).forward is not self._forward:
            return None
        for name, value in self._flags.items():
            if self._state.get(name) != value:
                return None
        hidden = hidden.reshape(-1, self._width)
        scores = functional.linear(hidden, weight, self._parameters.get("bias"))
        if self.dtype not in (None, scores.dtype):
            return None
        few = False
        if edit is not None:
            check_size(self._site, scores.shape[0], size)
            few = edit.of_few(scores)
            given, scores = scores, edit.scores(scores, few)
            if scores.dtype is torch.float16 and watcher is not None:
                watcher.enter(("router", self._site.facts.layer), scores_overflown(given, scores))
        weights, chosen = self._rule(scores, self._top_k, self._renormalised, edit, few)
        return scores, weights, chosen


def _softmax_topk(
    scores: Tensor, k: int, renormalised: bool, edit: TokenEdit | None, few: bool
) -> tuple[Tensor, Tensor]:
    shares = functional.softmax(scores, dtype=torch.float, dim=-1)
    if edit is not None and edit.dead_rank is not None:
        # A share may round to 0, and would tie with those of dead experts. An activated expert never ties:
        # its score is above all others by 0.01 or more.
        shares = edit.dead_last(shares, few)
    weights, chosen = torch.topk(shares, k, dim=-1)
    if renormalised:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(scores.dtype), chosen


def _topk_softmax(
    scores: Tensor, k: int, renormalised: bool, edit: TokenEdit | None, few: bool
) -> tuple[Tensor, Tensor]:
    # No rank is needed: the bounds lie outside all other scores in the router's own dtype.
    best, chosen = torch.topk(scores, k, dim=-1)
    return functional.softmax(best, dim=-1, dtype=best.dtype), chosen


_RULES: dict[str, Rule] = {"softmax-topk": _softmax_topk, "topk-softmax": _topk_softmax}


def plain_routing(site: RouterSite) -> PlainRouting | None:
    """A router's rule written out, or None where it is not seen to give the router's own bits."""
    router, family = site.module, family_of(site.module)
    rule = _RULES.get(family.scoring) if family is not None else None
    weight = router.__dict__.get("_parameters", {}).get("weight")
    if (
        family is None
        or rule is None
        or family.correction_bias is not None
        or site.facts.groups is not None
        or weight is None
        or weight.is_meta
        or not weight.is_floating_point()
        or router.training
    ):
        return None
    flag = family.renormalised
    renormalised = bool(getattr(router, flag)) if isinstance(flag, str) else flag
    names = ["top_k", *([flag] if isinstance(flag, str) else [])]
    if any(name not in router.__dict__ for name in names):
        return None
    routing = PlainRouting(site, rule, {name: router.__dict__[name] for name in names}, renormalised)
    return routing if _same_bits(routing, router, weight) else None


def _same_bits(routing: PlainRouting, router: nn.Module, weight: Tensor) -> bool:
    """Whether the rule and the router's own forward agree on hidden states small and large, in every bit."""
    sizes = torch.tensor([[0.5], [2.0], [1000.0]], device=weight.device)
    tokens = torch.arange(3 * weight.shape[1], device=weight.device, dtype=torch.float32)
    hidden = (torch.sin(tokens * 1.618).view(3, -1) * sizes).to(weight.dtype)
    with torch.no_grad():
        try:
            own: Any = type(router).forward(router, hidden.clone())
            ours = routing.run(hidden, None, 3)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
    if ours is None:
        return False
    routing.dtype = ours[0].dtype
    return (
        isinstance(own, tuple)
        and len(own) == len(ours)
        and all(
            isinstance(one, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
            for one, other in zip(own, ours, strict=True)
        )
    )
