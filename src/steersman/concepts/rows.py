"""States of rows: read from a model or from disk, checked, massive activations left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steersman.concepts.states import block_outputs
from steersman.errors import ModelError

Ints = np.ndarray[Any, Any]

MASSIVE = 10.0
"""A token is left out whose norm is more than so many times the median of its text's tokens at some layer:
sinks and the like, which say little of the text and would outweigh all else (arXiv 2402.17762)."""


@dataclass(frozen=True)
class RowStates:
    """States of a text's rows, float32 [rows, layers, width], and which are not massive, bool [rows]."""

    states: Tensor
    usual: Tensor


def states_of_texts(
    model: nn.Module, layers: Sequence[int], ids: Sequence[Ints], batch_size: int
) -> Iterator[Tensor]:
    """States of all tokens of each text, [tokens, layers, width], in the model's dtype, in the host's memory.

    Raises ModelError where one is not finite.
    """
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size]
        outputs = block_outputs(model, layers, batch)
        for row, text in enumerate(batch):
            states = torch.stack([outputs[layer][row, : len(text)].cpu() for layer in layers], dim=1)
            _check_finite(states, layers, model)
            yield states


def rows_of_states(states: Tensor, positions: Ints) -> RowStates:
    """The rows at these positions of a text whose tokens' states are [tokens, layers, width]."""
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    # Layer by layer: a wide copy of all of them may not fit.
    norms = torch.stack([of_layer.to(wide).norm(dim=-1) for of_layer in states.unbind(1)], dim=1)
    place = torch.from_numpy(positions.astype(np.int64))
    usual = (norms[place] <= MASSIVE * norms.median(dim=0).values).all(dim=1)
    return RowStates(states[place].to(wide), usual)


def _check_finite(states: Tensor, layers: Sequence[int], model: nn.Module) -> None:
    finite = torch.isfinite(states).all(dim=-1).all(dim=0)
    if not bool(finite.all()):
        layer = layers[int((~finite).nonzero()[0])]
        dtype = str(states.dtype).removeprefix("torch.")
        why = ", which overflows: right is bfloat16 or float32 (--dtype)" if dtype == "float16" else ""
        raise ModelError(
            f"{type(model).__name__}: layer {layer} gives states that are not finite in {dtype}{why}"
        )
