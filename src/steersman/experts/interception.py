"""Steering a router by its own code: the few operations on which its choice depends are intercepted.

1. the product of hidden states and router weights gives the raw scores z: they are edited
   (`bounds.edit_scores`);
2. where a correction bias is added for selection, the sum gives the selection scores c: they are edited by
   their own bounds, taken from a first run without edits;
3. the top-k over experts, and the top-k over groups of experts, rank a full activation first and a full
   deactivation last, and still return the model's own values. Rounding or a softmax that runs out of range
   cannot break the promise then.

Everything else (softmax, sigmoid, renormalisation, scaling, sparsemixer) is the model's.
"""

from __future__ import annotations

import threading
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from steersman.errors import SteeringNotApplied
from steersman.experts.router_tables import TokenEdit
from steersman.models.architecture import RouterSite
from steersman.models.families import family_of, has_bias
from steersman.models.overflow import Watcher, scores_overflown

_PRODUCTS = (
    functional.linear,
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
)
_TOPK = (torch.topk, torch.Tensor.topk)


class Interception(TorchFunctionMode):
    """Watches a router's forward and keeps its selection scores c, unedited."""

    def __init__(self, site: RouterSite) -> None:
        super().__init__()
        self.site = site
        self.experts = site.facts.experts
        family = family_of(site.module)
        self.biases = family is not None and has_bias(site.module, family)
        self.ranks = family is None or family.keeps_topk
        self.selection_scores: Tensor | None = None
        self.chosen: Tensor | None = None
        self.scored = 0
        self.biased = 0
        self.ranked = 0
        self._dims = 0
        self._weights: list[Tensor] = []
        self._bias: list[Tensor] = []
        self._gate = site.quantised_gate
        self._hook: RemovableHandle | None = None
        self._thread = 0 if self._gate is None else threading.get_ident()

    def __enter__(self) -> Self:
        if self._gate is not None:  # its product is made by kernels that show no tensor to a function mode
            self._hook = self._gate.register_forward_hook(self._gate_ran)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._hook is not None:
            self._hook.remove()

    def _gate_ran(self, gate: nn.Module, args: tuple[Any, ...], scores: Tensor) -> Tensor | None:
        # Another thread may run the same gate unsteered meanwhile.
        return self._scored(scores) if threading.get_ident() == self._thread and not self.scored else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK:
            return self._topk(func, args, kwargs)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        # Looked up each time: an offloaded router gets its tensors only when it runs.
        if not self.scored and self._gate is None and _holds(tensors, self.site.weight, self._weights):
            return self._weighed(func, args, kwargs)
        if self.biases and tensors and _holds(tensors, self.site.correction_bias, self._bias):
            return self._added(func, args, kwargs, tensors)
        return func(*args, **kwargs)

    def _weighed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation took the weight: its product with the hidden states is z; a cast of it is followed."""
        result = func(*args, **kwargs)
        if func in _PRODUCTS:
            return self._scored(result)
        if isinstance(result, Tensor) and result.dim() == 2:
            self._weights.append(result)
        return result

    def _scored(self, result: Tensor) -> Tensor:
        self.scored += 1
        self._dims = result.dim()
        own = result[..., : self.experts]
        edited = self.on_scores(own)
        if edited is own:
            return result
        # More columns than experts: those of shared ones are scored along, and stay.
        return edited if own.shape == result.shape else _joined(edited, result[..., self.experts :])

    def _added(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """An operation took the correction bias: its sum with the scores is c; a cast of it is followed."""
        result = func(*args, **kwargs)
        if len([tensor for tensor in tensors if tensor.dim()]) > 1:
            self.biased += 1
            return self.on_biased(result)
        if isinstance(result, Tensor) and result.numel() == self.experts:
            self._bias.append(result)
        return result

    def _topk(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        k = args[1] if len(args) > 1 else kwargs.get("k")
        scores, facts = args[0], self.site.facts
        if scores.dim() == self._dims and scores.shape[-1] == facts.experts and k == facts.top_k:
            self.ranked += 1
            result = self.on_topk(func, args, kwargs)
            self.chosen = result.indices
            return result
        if scores.dim() == 2 and facts.groups is not None and (scores.shape[-1], k) == facts.groups:
            return self.on_group_topk(func, args, kwargs)
        return func(*args, **kwargs)  # the best experts within each group, for the group's score

    def on_scores(self, scores: Tensor) -> Tensor:
        """The raw scores z [..., experts] have been computed."""
        return scores

    def on_biased(self, scores: Tensor) -> Tensor:
        """The selection scores c [..., experts] have been computed."""
        self.selection_scores = scores
        return scores

    def on_topk(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The top-k over experts runs."""
        return func(*args, **kwargs)

    def on_group_topk(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The top-k over groups runs."""
        return func(*args, **kwargs)

    def check(self) -> None:
        """Raise `SteeringNotApplied` unless everything that had to be met was, once."""
        expected = (1, int(self.biases), int(self.ranks))
        seen = (self.scored, self.biased, self.ranked)
        if seen != expected:
            raise SteeringNotApplied(
                f"router:{self.site.facts.layer} did not run as known: scores, bias and top-k were met "
                f"{seen} times, not {expected}; the output is not steered"
            )


class SteeringInterception(Interception):
    """Edits scores and guards the ranking of one router's forward.

    Args:
        site: The router.
        edit: What holds for its tokens.
        size: How many tokens the model was given.
        watcher: Is told of edits in float16.
        reference: A run without edits, where the router has a correction bias.
    """

    def __init__(
        self,
        site: RouterSite,
        edit: TokenEdit,
        size: int,
        watcher: Watcher,
        reference: Interception | None = None,
    ) -> None:
        super().__init__(site)
        self._watcher = watcher
        self._edit = edit
        self._size = size
        self._reference = reference

    def on_scores(self, scores: Tensor) -> Tensor:
        check_size(self.site, scores.numel() // self.experts, self._size)
        return self._edited(scores)

    def on_biased(self, scores: Tensor) -> Tensor:
        unedited = self._reference.selection_scores if self._reference is not None else None
        if unedited is None:
            raise SteeringNotApplied(f"router:{self.site.facts.layer}: its selection scores were not found")
        return self._edited(unedited)

    def _edited(self, scores: Tensor) -> Tensor:
        flat = scores.reshape(-1, self.experts)
        edited = self._edit.scores(flat, self._edit.of_few(flat))
        if edited.dtype is torch.float16:
            self._watcher.enter(("router", self.site.facts.layer), scores_overflown(flat, edited))
        return edited.view(scores.shape)

    def on_topk(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _guarded(self._edit.expert_rank, func, args, kwargs)

    def on_group_topk(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _guarded(self._edit.group_rank, func, args, kwargs)


def check_size(site: RouterSite, tokens: int, given: int) -> None:
    """Raise `SteeringNotApplied` where a router sees other tokens than the model was given."""
    if tokens != given:
        raise SteeringNotApplied(
            f"router:{site.facts.layer} was given {tokens} tokens where the model was given {given}: "
            "packed batches cannot be steered"
        )


def _guarded(rank: Tensor | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if rank is None:
        return func(*args, **kwargs)
    scores = args[0]
    rank = rank.to(scores.dtype)
    ranked = scores + (rank if rank.dim() == 1 else rank.view(scores.shape))
    chosen = func(ranked, *args[1:], **kwargs).indices
    return torch.return_types.topk((scores.gather(-1, chosen), chosen))


def _holds(tensors: list[Tensor], wanted: Tensor | None, casts: list[Tensor]) -> bool:
    return any(tensor is wanted or any(tensor is cast for cast in casts) for tensor in tensors)


def _joined(edited: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([edited, rest], dim=-1)
