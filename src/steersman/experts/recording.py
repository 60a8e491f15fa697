"""Recording which experts each token really used: what reaches the experts modules while a forward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steersman.errors import ModelError
from steersman.models.architecture import RouterSite

Collect = Callable[[int, Tensor], None]
"""Takes a router's place among the recorded sites and its choice: int64 [tokens, k], on its own device."""


@contextmanager
def recording(sites: Sequence[RouterSite], collect: Collect) -> Iterator[None]:
    """While open, hand every router's choice of every forward to `collect`, before the experts run.

    Expert ids count from 0 to E - 1 in the whole model, on whichever process they live. Tokens are the rows
    and columns of the batch, row by row.

    Raises:
        ModelError: on leaving, where a router's experts never ran through their module.
    """
    heard: set[int] = set()

    def hook_of(number: int, site: RouterSite) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            heard.add(number)
            collect(number, _expert_ids(site, (*args, *kwargs.values())))

        return before

    handles = [
        site.experts.register_forward_pre_hook(hook_of(number, site), with_kwargs=True)
        for number, site in enumerate(sites)
        if site.experts is not None
    ]
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


def _expert_ids(site: RouterSite, values: tuple[Any, ...]) -> Tensor:
    """The first integer tensor given to an experts module: the ids of the chosen experts, [tokens, k]."""
    for value in values:
        if isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool:
            return value.reshape(-1, value.shape[-1]).long()
    raise ModelError(f"layer {site.facts.layer}: the experts module was not given expert ids")
