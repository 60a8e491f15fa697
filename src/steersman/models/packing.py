"""Whether several texts are packed into a row, each with a prompt of its own: then roles cannot be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteeringNotApplied
from steersman.models.tokens import split_mask, visible_keys

_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k")
"""What kernels call the tensor of where texts begin and the last one ends, [texts + 1]."""

_TEXTS = ("seq_idx",)
"""What they call the number of each token's text, [rows, columns]."""


def refuse_packed(
    kwargs: Mapping[str, Any], rows: int, columns: int, mask: Tensor | None, cached: int
) -> None:
    """Raise `SteeringNotApplied` where the arguments of a forward say that a row holds several texts.

    Position ids that come from the model's own code, or from nowhere, cost nothing; those given are looked
    at, which waits for their device.

    Args:
        kwargs: Of the forward.
        rows, columns: Of its tokens.
        mask: Its attention mask, as of `split_mask`.
        cached: Columns in the cache before it.
    """
    for name in _BOUNDS:
        if isinstance(bounds := kwargs.get(name), Tensor) and bounds.numel() - 1 > rows:
            raise _packed(name)
    texts = {name: kwargs[name] for name in _TEXTS if isinstance(kwargs.get(name), Tensor)}
    positions = kwargs.get("position_ids")
    if not texts and not isinstance(positions, Tensor) and (mask is None or mask.dim() != 4):
        return
    before, real = split_mask(mask, rows, columns, cached, torch.device("cpu"))
    order = torch.where(real, torch.arange(columns), -1).cummax(dim=1).values
    previous = torch.cat([torch.full((rows, 1), -1), order[:, :-1]], dim=1)
    follows = real & (previous >= 0)  # real tokens after another one of the same row
    previous = previous.clamp(min=0)
    for name, numbers in texts.items():
        number = numbers.cpu().reshape(-1, columns).expand(rows, columns)
        if bool(((number != number.gather(1, previous)) & follows).any()):
            raise _packed(name)
    if isinstance(positions, Tensor) and _start_again(positions.cpu(), previous, follows, mask, cached):
        raise _packed("position_ids")
    if isinstance(positions, Tensor) and bool(((before > 0) & _begins(positions.cpu(), real)).any()):
        raise _packed("position_ids")
    if mask is not None and mask.dim() == 4:
        seen = visible_keys(mask).cpu().expand(rows, -1, -1)
        seen = seen.gather(2, (cached + previous)[:, :, None]).squeeze(2)
        if bool((follows & ~seen).any()):
            raise _packed("attention_mask")


def _axes(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Positions [axes, rows, columns]: one axis for texts, several where images have rows and columns too."""
    axes = positions if positions.dim() == 3 else positions.reshape(-1, positions.shape[-1])[None]
    if axes.shape[1] not in (1, rows) or axes.shape[2] != columns:
        raise SteeringNotApplied(
            f"position_ids of shape {list(positions.shape)} do not tell where {rows}×{columns} tokens stand"
        )
    return axes.expand(-1, rows, -1)


def _start_again(
    positions: Tensor, previous: Tensor, follows: Tensor, mask: Tensor | None, cached: int
) -> bool:
    axes = _axes(positions, *follows.shape)
    steps = axes - axes.gather(2, previous.expand_as(axes))
    packed = (steps[0] < 0) | (steps == 0).all(dim=0)  # tokens of an image share one axis, but not all
    if mask is None and not cached and len(axes) == 1:
        packed |= steps[0] != 1  # transformers itself then takes what is not the next for another text's
    return bool((packed & follows).any())


def _begins(positions: Tensor, real: Tensor) -> Tensor:
    """Whether the first real token of each row is at position 0, bool [rows]."""
    axes = _axes(positions, *real.shape)
    first = real.long().argmax(dim=1, keepdim=True)
    return (axes[0].gather(1, first)[:, 0] == 0) & real.any(dim=1)


def _packed(name: str) -> SteeringNotApplied:
    return SteeringNotApplied(
        f"several texts are packed into a row ({name}), so that its tokens' roles cannot be told: "
        "give each text a row of its own, or steer with the scope 'all'"
    )
