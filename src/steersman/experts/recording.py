"""Recording which experts each token really used: what reaches the experts modules while a forward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steersman.errors import ModelError
from steersman.models.architecture import RouterSite, find_routers
from steersman.models.families import Choice, Family, family_of

Collect = Callable[[int, Tensor], None]
"""Takes a router's place among the recorded sites and its choice: int64 [tokens, k], on its own device."""


def countable_routers(model: nn.Module) -> list[RouterSite]:
    """The routers whose choices can be counted, by layer. Raises `ModelError` where there is none."""
    found = find_routers(model)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no routers: expert steering needs a Mixture-of-Experts model; "
            "vectors steer dense ones too: refine_concept (steersman refine MODEL PAIRS -o concept)"
        )
    sites = [site for site in found if site.facts.steerable]
    if not sites:
        raise ModelError(f"no router of {type(model).__name__} can be steered: {found[0].facts.reason}")
    return sites


@contextmanager
def recording(sites: Sequence[RouterSite], collect: Collect) -> Iterator[None]:
    """While open, hand every router's choice of every forward to `collect`, before the experts run.

    Expert ids count from 0 to E - 1 in the whole model, on whichever process they live. Tokens are the rows
    and columns of the batch, row by row.

    Raises:
        ModelError: a router's choices cannot be read; on leaving, where its experts never ran through their
            module.
    """
    heard: set[int] = set()

    def listener(number: int, site: RouterSite) -> Callable[..., None]:
        read = _READERS[_family(site).choice]

        def listen(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            heard.add(number)
            given = rest[0]  # the experts' keyword arguments, or the router's output
            values = (*args, *given.values()) if isinstance(given, dict) else given
            collect(number, read(site, values))

        return listen

    handles = [_hook(site, listener(number, site)) for number, site in enumerate(sites)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    missing = [site.facts.layer for number, site in enumerate(sites) if number not in heard]
    if missing:
        raise ModelError(
            f"the experts of layers {missing} did not run through their module: nothing to count"
        )


def _family(site: RouterSite) -> Family:
    family = family_of(site.module)
    if family is None or site.facts.reason is not None:
        raise ModelError(f"the choices of layer {site.facts.layer} cannot be read: {site.facts.reason}")
    return family


def _hook(site: RouterSite, listen: Callable[..., None]) -> RemovableHandle:
    """Listen to what the experts are given, or to the router where they are not given ids."""
    if _family(site).choice in ("experts", "skipping") and site.experts is not None:
        return site.experts.register_forward_pre_hook(listen, with_kwargs=True)
    return site.module.register_forward_hook(listen)


def _given(site: RouterSite, values: tuple[Any, ...]) -> Tensor:
    """The first integer tensor given to an experts module: the ids of the chosen experts, [tokens, k]."""
    for value in values:
        if isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool:
            return value.reshape(-1, value.shape[-1]).long()
    raise ModelError(f"layer {site.facts.layer}: the experts module was not given expert ids")


def _given_or_skipped(site: RouterSite, values: tuple[Any, ...]) -> Tensor:
    """The same, where a token that skips the experts is given expert 0 with weight 0: both do nothing."""
    chosen = _given(site, values)
    weights = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()][-1]
    skipped = (chosen == 0) & (weights.reshape(chosen.shape) == 0)
    return chosen.masked_fill(skipped, site.facts.experts - 1)


def _left(site: RouterSite, output: tuple[Any, ...]) -> Tensor:
    """From scores [tokens, experts] that are 0 where an expert was not chosen, and raw ones: a chosen
    expert's score may vanish, and then it is the best of the others.
    """
    scores, raw = output
    first: Tensor = raw.masked_fill(scores != 0, torch.inf).topk(site.facts.top_k, dim=-1).indices
    return first


def _sorted_slots(site: RouterSite, output: tuple[Any, ...]) -> Tensor:
    """From the tokens' slots sorted by expert, and the number of slots of each expert."""
    slots: Tensor = output[0]
    sizes = torch.tensor(output[3], device=slots.device)
    chosen = torch.empty_like(slots)
    chosen[slots] = torch.arange(len(sizes), device=slots.device).repeat_interleave(sizes)
    return chosen.view(-1, site.facts.top_k)


_READERS: dict[Choice, Callable[[RouterSite, tuple[Any, ...]], Tensor]] = {
    "experts": _given,
    "skipping": _given_or_skipped,
    "dense": _left,
    "sorted": _sorted_slots,
}
