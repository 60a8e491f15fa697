"""Mixture weights: how much of each chosen expert's output enters the sum, as the model's router gave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steersman.errors import ModelError
from steersman.experts.recording import recording
from steersman.models.architecture import RouterSite
from steersman.models.families import family_of

CollectMixture = Callable[[int, Tensor, Tensor], None]
"""Takes a router's place among the sites, the choice int64 [tokens, k] and weights float32 [tokens, k]."""


@contextmanager
def recording_mixture(sites: Sequence[RouterSite], collect: CollectMixture) -> Iterator[None]:
    """While open, hand every router's choice and mixture weights of every forward to `collect`.

    Weights are what the router gives the experts: after renormalisation and scaling, where the model does
    these in its router. Raises `ModelError` where they cannot be read, and as `recording` does.
    """
    chosen: dict[int, Tensor] = {}
    with recording(sites, chosen.__setitem__):
        handles = [_listen(site, number, chosen, collect) for number, site in enumerate(sites)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _listen(site: RouterSite, number: int, chosen: dict[int, Tensor], collect: CollectMixture) -> Any:
    """Listen where `recording` does and after it, so that the choice is known."""
    family = family_of(site.module)
    given_to_experts = family is not None and family.choice in ("experts", "skipping")

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (*args, *kwargs.values())
        collect(number, chosen[number], _weights(site, chosen.pop(number), values))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ids = chosen.pop(number)
        if family is not None and family.choice == "sorted":
            # Slots sorted by expert, and their weights in that order.
            weights = torch.empty(ids.numel(), device=ids.device)
            weights[output[0]] = output[2].float()
            collect(number, ids, weights.view(ids.shape))
        else:
            collect(number, ids, output[0].float().reshape(-1, site.facts.experts).gather(-1, ids))

    if given_to_experts and site.experts is not None:
        return site.experts.register_forward_pre_hook(before, with_kwargs=True)
    return site.module.register_forward_hook(after)


def _weights(site: RouterSite, ids: Tensor, values: tuple[Any, ...]) -> Tensor:
    """The last floating tensor given to the experts that has a number for each choice, or for each expert."""
    for value in reversed(values):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if value.numel() == ids.numel():
            return value.float().reshape(ids.shape)
        if value.shape[-1] == site.facts.experts and value.numel() == ids.shape[0] * site.facts.experts:
            return value.float().reshape(-1, site.facts.experts).gather(-1, ids)
    raise ModelError(f"layer {site.facts.layer}: the mixture weights of its experts cannot be read")
