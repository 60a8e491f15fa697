"""Reading texts with a model: padded batches through its decoder, as it is used and not as it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from steersman.models.architecture import find_decoder
from steersman.models.weights import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = np.ndarray[Any, Any]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and router jitter, which would change choices; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def padded(ids: Sequence[Ints | Sequence[int]], *, left: bool = False) -> tuple[Ints, Ints]:
    """Token ids and attention mask of a batch, int64 [texts, columns], padded on the right unless `left`."""
    columns = max(map(len, ids))
    tokens, mask = np.zeros((2, len(ids), columns), np.int64)
    for row, text in enumerate(ids):
        span = slice(columns - len(text), columns) if left else slice(0, len(text))
        tokens[row, span] = text
        mask[row, span] = 1
    return tokens, mask


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's, else its end token's, else 0 (the mask hides it in any case)."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    return 0


def input_device(model: nn.Module) -> torch.device:
    """Where a model's input goes."""
    device = next(find_decoder(model).parameters()).device
    # Offloaded: accelerate brings inputs to where each layer runs.
    return torch.device("cpu") if device.type == "meta" else device


def read_batch(model: nn.Module, ids: Sequence[Ints | Sequence[int]]) -> None:
    """Run texts, as token ids, through the decoder in one batch padded on the right: for what is recorded of
    it on the way.
    """
    decoder = find_decoder(model)
    device = input_device(model)
    tokens, mask = padded(ids)
    # Parts of a model that is sharded are gathered by the forward of the whole one.
    sharded = any(is_sharded(parameter) for parameter in decoder.parameters())
    with torch.no_grad():
        (model if sharded else decoder)(
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            use_cache=False,
        )
