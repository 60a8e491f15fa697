"""How a block calls its experts: read off from one call, and made again for one expert a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.models.architecture import RouterSite


class CannotEstimate(Exception):
    """The experts of an architecture cannot be called one by one; exact runs do."""


@dataclass(frozen=True)
class ExpertCall:
    """How a block called its experts: the arguments, and which of them are states, ids and weights."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: int | str
    ids: int | str
    weights: int | str

    def __getitem__(self, name: int | str) -> Tensor:
        found: Tensor = self.args[name] if isinstance(name, int) else self.kwargs[name]
        return found

    def mixture(self) -> tuple[Tensor, Tensor]:
        """Ids int64 and weights float32, [tokens, k]."""
        ids = self[self.ids].long()
        ids = ids.reshape(-1, ids.shape[-1])
        return ids, self[self.weights].float().reshape(ids.shape)

    def with_tokens(
        self, states: Tensor, ids: Tensor, weights: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call for other tokens."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in ((self.states, states), (self.ids, ids), (self.weights, weights)):
            if isinstance(name, int):
                args[name] = value
            else:
                kwargs[name] = value
        return tuple(args), kwargs


def single_experts(site: RouterSite, call: ExpertCall, states: Tensor, experts: Tensor) -> Tensor:
    """f_j(x): the output of one expert for each token, [n, width]."""
    ids = experts[:, None].to(call[call.ids].dtype)
    ones = torch.ones(ids.shape, dtype=call[call.weights].dtype, device=states.device)
    args, kwargs = call.with_tokens(states, ids, ones)
    with torch.no_grad():
        output: Tensor = site.experts(*args, **kwargs)  # type: ignore[misc]
    return output.reshape(len(experts), -1)


def read_call(site: RouterSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertCall:
    """Find the states, ids and weights among what experts are given."""
    named: dict[int | str, Any] = dict(enumerate(args))
    named.update(kwargs)
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    ids = [name for name, v in tensors.items() if not v.is_floating_point() and v.dtype != torch.bool]
    floats = [name for name, value in tensors.items() if value.is_floating_point()]
    if len(ids) != 1 or len(floats) != 2:
        raise CannotEstimate("its experts are not given states, ids and weights")
    weights = [name for name in floats if tensors[name].numel() == tensors[ids[0]].numel()]
    states = [name for name in floats if name not in weights]
    if len(weights) != 1 or len(states) != 1:
        raise CannotEstimate("its experts are not given one weight a choice")
    return ExpertCall(args, kwargs, states[0], ids[0], weights[0])
