"""Maps by way of anchors: what is known of them, and the formula against a plain solve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from concepts.mapped import big, gpt2, llama, rotated, small, texts, tokenizer
from steersman import AffineMap, ModelError, PairsError
from steersman.concepts.anchors import anchor_map, encode_anchors

ANCHORS = texts(150, seed=6)


def test_a_turned_residual_stream_is_found() -> None:
    model, read = small()
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))).Q
    one = encode_anchors(model, read, ANCHORS)
    other = encode_anchors(rotated(model, turn), read, ANCHORS)
    itself = anchor_map(one, one)
    for layer in itself.layers:
        assert itself.maps[layer].source_layer == layer
        assert itself.maps[layer].r2 > 0.999
    found = anchor_map(one, other)
    assert {layer: of.source_layer for layer, of in found.maps.items()} == {0: 0, 1: 1, 2: 2}
    assert min(of.r2 for of in found.maps.values()) > 0.5
    assert max(of.r2_control for of in found.maps.values()) < 0.1


def test_the_formula_and_what_it_says(tmp_path: Path) -> None:
    one, other = encode_anchors(*small(), ANCHORS, [1]), encode_anchors(*big(), ANCHORS, [0, 1], batch_size=5)
    found = anchor_map(one, other)
    of = found.maps[0]
    x, y = one.states[1].double(), other.states[0].double()
    fit = ~one.held_out
    sx, sy = x[fit].std(0, correction=0), y[fit].std(0, correction=0)
    a, b = (x[fit] - x[fit].mean(0)) / sx, (y[fit] - y[fit].mean(0)) / sy
    standard = torch.linalg.solve(b.T @ b + of.ridge * len(b) * torch.eye(24).double(), b.T @ a)
    assert torch.allclose(of.weight, sy[:, None] * standard / sx, atol=1e-8)
    predicted = x[~fit] @ of.weight.T + of.bias
    residual = ((y[~fit] - predicted) / sy) ** 2
    r2 = 1 - residual.sum() / (((y[~fit] - y[fit].mean(0)) / sy) ** 2).sum()
    assert of.r2 == pytest.approx(float(r2), abs=1e-9)
    assert found.rows == 150
    assert found.norms[0].count == 150
    found.save_pretrained(tmp_path / "m")
    again = AffineMap.from_pretrained(tmp_path / "m")
    vector = torch.ones(16)
    assert again.share_explained(0, vector) == pytest.approx(found.share_explained(0, vector), rel=1e-6)
    assert torch.equal(again.map_vector(1, vector), found.map_vector(1, vector))


def test_what_does_not_fit_is_said() -> None:
    one = encode_anchors(*small(), ANCHORS, [0])
    with pytest.raises(ModelError, match="encode both with the same texts"):
        anchor_map(one, encode_anchors(gpt2(), tokenizer(), ANCHORS[:-1], [0]))
    with pytest.raises(PairsError, match="3 anchors are too few to hold some out"):
        encode_anchors(*small(), ANCHORS[:3])
    with pytest.raises(ModelError, match="layer 3 does not exist"):
        encode_anchors(*small(), ANCHORS, [3])


def test_states_that_are_all_the_same_and_options_that_are_none() -> None:
    model, read = llama(seed=5), tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    flat, varied = encode_anchors(model, read, ANCHORS), encode_anchors(*small(), ANCHORS)
    with pytest.raises(ModelError, match="states of the target's layer 0 are the same at every anchor"):
        anchor_map(varied, flat)
    with pytest.raises(ModelError, match="states of the source's layer 0 are the same at every anchor"):
        anchor_map(flat, varied)
    with pytest.raises(PairsError, match="batch_size is 0"):
        encode_anchors(*small(), ANCHORS, batch_size=0)
    with pytest.raises(PairsError, match="at least one layer"):
        encode_anchors(*small(), ANCHORS, [])
