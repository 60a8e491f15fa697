"""Where a concept is read in a text, and the states there.

`last`: the last token of the target where a side ends with the assistant's words (or is a plain text), else
the last token of the generation prompt, in which the answer is about to begin (ConTrans, arXiv 2405.13578).
`target_mean`: the mean over the target's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from steersman.concepts.states import block_outputs
from steersman.errors import ModelError
from steersman.models.encoding import EncodeSide, Tokens, longest_text
from steersman.pairs import Content
from steersman.rendering import encode, special_ids

Position = Literal["last", "target_mean"]
POSITIONS: tuple[Position, ...] = ("last", "target_mean")


@dataclass(frozen=True)
class ReadStates:
    """What a layer gives for a batch: the state that is read of each text, float32 [texts, width], and the
    norms of the states in scope, float32 [tokens].
    """

    states: Tensor
    norms: Tensor


def tokens_read(model: nn.Module, tokenizer: PreTrainedTokenizerBase, position: Position) -> EncodeSide:
    """How a side is encoded for reading a concept: the positions are those of tokens that a steering of scope
    `answer` touches; the last of them is what `last` reads, and `target_mean` reads them all.
    """
    most, special = longest_text(model), frozenset(special_ids(tokenizer))

    def side(content: Content, target: str | None, where: str) -> tuple[Sequence[int], Sequence[int]]:
        encoded = encode(tokenizer, content, target, where=where, max_length=most, special=special)
        if position == "last" and not ends_in_target(content):
            return encoded.ids, (len(encoded.ids) - 1,)
        return encoded.ids, encoded.target

    return side


def ends_in_target(content: Content) -> bool:
    """Whether a side is read at its target's end: a chat that ends with the assistant's words, or a text."""
    return isinstance(content, str) or content[-1]["role"] == "assistant"


def states_at(
    model: nn.Module,
    layers: Sequence[int],
    ids: Sequence[Tokens],
    positions: Sequence[Tokens],
    position: Position,
) -> dict[int, ReadStates]:
    """The states of a batch of texts at the positions that `tokens_read` gave, of each layer, on the CPU.

    Raises:
        ModelError: a layer does not exist, or its states are not finite.
    """
    lengths = torch.tensor([len(of_text) for of_text in positions])
    rows = torch.repeat_interleave(torch.arange(len(positions)), lengths)
    columns = torch.from_numpy(np.concatenate(list(positions))).long()

    def keep(states: Tensor) -> ReadStates:
        there = states.device
        picked = states[rows.to(there), columns.to(there)].float()
        if position == "last":
            read = picked[(lengths.cumsum(0) - 1).to(there)]
        else:
            sums = picked.new_zeros(len(lengths), picked.shape[1]).index_add_(0, rows.to(there), picked)
            read = sums / lengths.to(there)[:, None]
        return ReadStates(read.cpu(), torch.linalg.vector_norm(picked, dim=1).cpu())

    found = block_outputs(model, layers, ids, keep)
    for layer in layers:
        if not bool(torch.isfinite(found[layer].norms).all()):
            raise not_finite(layer, dtype_of(model))
    return found


def not_finite(layer: int, dtype: Any) -> ModelError:
    """The error for a layer that gives NaN or infinity."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return ModelError(
            f"layer {layer} gives states that are not finite: float16 ends at 65504; "
            "open the model in bfloat16 or float32"
        )
    return ModelError(f"layer {layer} gives states that are not finite, in {name}: the model is damaged")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
