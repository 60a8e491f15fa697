"""Vectors drawn like a model's states: their covariance, their repetition, what they leave out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import families as f
from steersman import PairsError
from steersman.concepts.controls import like_states, vectors_like_states
from steersman.concepts.states import block_outputs

ROWS = [f.token_ids(1, length, seed=length)[0].tolist() for length in (9, 5, 7, 12, 5)]


def test_random_vectors_vary_as_a_known_covariance() -> None:
    root = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    covariance = root @ root.T
    drawn = like_states(covariance, 200_000, seed=1)
    torch.testing.assert_close(torch.cov(drawn.T), covariance, rtol=0.03, atol=0.03)
    assert torch.equal(like_states(covariance, 3, seed=1), like_states(covariance, 3, seed=1))
    flat = like_states(torch.diag(torch.tensor([1.0, 0.0])), 5, seed=0)
    assert not flat[:, 1].any()  # nothing along what does not vary


def test_vectors_like_states_vary_as_the_states_of_prompts_do() -> None:
    model = f.dense()
    found = vectors_like_states(model, ROWS, [0, 1], 4000, seed=2)
    for layer, drawn in found.items():
        rows = [block_outputs(model, [layer], [row])[layer][0, 1:].double() for row in ROWS]
        states = torch.cat(rows)
        values, directions = torch.linalg.eigh(torch.cov(states.T))
        assert drawn.shape == (4000, states.shape[1])
        torch.testing.assert_close(drawn.norm(dim=1), torch.ones(4000), rtol=1e-5, atol=1e-5)
        # Length is taken off each draw: what it has along the main directions is compared in order.
        along = (drawn.double() @ directions).square().mean(dim=0)
        assert float(along @ values) > 3 * float(values.mean())
        assert torch.argmax(along) == torch.argmax(values)
        nothing = values < 1e-9 * values.max()
        assert nothing.any()  # fewer tokens than dimensions
        assert float(along[nothing].sum()) < 1e-6


def test_vectors_like_states_are_the_same_however_many_and_in_whatever_batches() -> None:
    model = f.dense()
    few = vectors_like_states(model, ROWS, [1], 3, seed=2, batch_size=1)[1]
    many = vectors_like_states(model, ROWS, [0, 1], 8, seed=2, batch_size=4)[1]
    torch.testing.assert_close(few, many[:3], rtol=1e-4, atol=1e-5)
    other = vectors_like_states(model, ROWS, [1], 3, seed=3)[1]
    assert not np.allclose(few, other, atol=0.1)


def test_too_few_tokens_to_draw_from() -> None:
    with pytest.raises(PairsError, match="1 tokens beside the first ones are too few"):
        vectors_like_states(f.dense(), [[3, 4], [5]], [0], 2, seed=0)
