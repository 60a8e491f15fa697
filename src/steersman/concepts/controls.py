"""Vectors drawn like a model's own states: what stands beside a concept as its random control.

An isotropic vector points where the model never goes, and wrecks it at a dose at which a concept does little.
One from N(0, Σ), where Σ is the covariance of a layer's states, pushes along directions that the model uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steersman.concepts.rows import Ints, rows_of_states, states_of_texts
from steersman.errors import PairsError
from steersman.models.reading import evaluating
from steersman.pairs import Content
from steersman.rendering import encode_prompt


def state_like_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Content],
    layers: Sequence[int],
    count: int,
    seed: int,
    *,
    batch_size: int = 16,
) -> dict[int, Tensor]:
    """`count` vectors a layer, drawn like the states of prompts: {layer: unit vectors, float32
    [count, width]}, on the CPU. See `vectors_like_states`.

    Args:
        model: The model that is steered, with its tokenizer.
        prompts: Ordinary ones: chats or texts.
        layers: Decoder layers, from 0.
        count: Draws; the first of more are the same.
        seed: Of the draws.
        batch_size: Prompts in one forward.

    Raises:
        PairsError: the prompts have too few tokens, or one cannot be rendered.
        ModelError: states that are not finite, or a layer that does not exist.
    """
    rows = [encode_prompt(tokenizer, content, where=str(n)) for n, content in enumerate(prompts, 1)]
    return vectors_like_states(model, rows, layers, count, seed, batch_size=batch_size)


def vectors_like_states(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    count: int,
    seed: int,
    *,
    batch_size: int = 16,
) -> dict[int, Tensor]:
    """As `state_like_vectors`, of prompts as token ids.

    Σ_i g_i (h_i − h̄) / ‖…‖ with g_i ~ N(0, 1) over the tokens i of all prompts: a draw from N(0, Σ̂) without
    Σ̂, in O(count · width) memory. One draw has the same g at every layer, as one concept has the same pairs.
    Left out are each prompt's first token and those of massive norm, which say little of a prompt and
    outweigh all else (`concepts.rows.MASSIVE`).
    """
    ids = [np.asarray(row, np.int64) for row in rows]
    drawn: Tensor | float = 0.0
    total: Tensor | float = 0.0
    given, tokens = torch.zeros(count, dtype=torch.float64), 0
    with evaluating(model), torch.no_grad():
        for number, states in enumerate(states_of_texts(model, layers, ids, batch_size)):
            kept, weights = _of_text(states, count, (seed, number))
            drawn = drawn + torch.einsum("ct,tlw->lcw", weights, kept)
            total = total + kept.sum(dim=0)
            given, tokens = given + weights.sum(dim=1), tokens + len(kept)
    if tokens < 2 or not isinstance(drawn, Tensor) or not isinstance(total, Tensor):
        raise PairsError(
            f"{tokens} tokens beside the first ones are too few to draw vectors from: give longer prompts"
        )
    centred = drawn - given[:, None] * (total / tokens)[:, None]
    units = (centred / centred.norm(dim=-1, keepdim=True)).float()
    return dict(zip(layers, units, strict=True))


def like_states(covariance: Tensor, draws: int, seed: int) -> Tensor:
    """Vectors drawn from N(0, Σ), [draws, width] float64, where Σ [width, width] is known."""
    values, directions = torch.linalg.eigh(covariance.double())
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(draws, len(values), generator=generator, dtype=torch.float64)
    drawn: Tensor = (white * values.clamp(min=0).sqrt()) @ directions.T
    return drawn


def _of_text(states: Tensor, count: int, seed: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A prompt's usual states but the first, float64 [tokens, layers, width], and their weights
    [count, tokens]: the same whatever stands beside it in a batch.
    """
    positions: Ints = np.arange(1, len(states))
    found = rows_of_states(states, positions)
    weights = np.random.default_rng(seed).standard_normal((count, len(positions)))
    return found.states[found.usual].double(), torch.from_numpy(weights)[:, found.usual]
