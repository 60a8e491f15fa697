"""Vectors in every decoder family of transformers without experts: exactly at the tokens in scope; and which
models are refused.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM

import every_dense as d
import every_family as e
import streams
from steersman import ModelError, PlanError, Steering, SteeringNotApplied
from steersman.concepts.states import block_outputs
from steersman.models.architecture import decoder_layers

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
VECTOR = torch.ones(e.WIDTH)


@pytest.mark.parametrize(
    "name",
    [name if name in d.QUICK else pytest.param(name, marks=pytest.mark.long) for name in d.MODEL_TYPES],
)
def test_vectors(name: str) -> None:
    if not e.known(name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = d.tiny(name)
    streams.assert_steered(model, decoder_layers(model), e.VOCABULARY)


def test_several_streams_are_refused_before_anything_runs() -> None:
    model = d.tiny("gemma3n_text")
    with pytest.raises(PlanError, match="Gemma3nForCausalLM cannot be steered by vectors: each token has 4"):
        Steering.from_vectors(model, {1: VECTOR})
    with pytest.raises(ModelError, match="each token has 4 residual streams"):
        block_outputs(model, [1], [[5, 6, 7]])


def test_layers_that_run_several_times_are_refused_before_anything_runs() -> None:
    if not e.known("dory"):
        pytest.skip(f"transformers {transformers.__version__} has no dory")
    model = d.tiny("dory")
    with pytest.raises(PlanError, match="layer 3: it runs 2 times in one forward"):
        Steering.from_vectors(model, {1: VECTOR, 3: VECTOR})
    with pytest.raises(ModelError, match=r"layer 3: it runs 2 times in one forward.*; name other layers"):
        block_outputs(model, [1, 3], [[5, 6, 7]])


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba"])
def test_a_state_given_does_not_tell_how_many_tokens_it_holds(name: str) -> None:
    """Whatever transformers calls it: `cache` from 5.24 on, `cache_params` before."""
    model, ids = d.tiny(name), torch.tensor([[5, 6, 7, 8]])
    plan = Steering.from_vectors(model, {1: VECTOR}, scope="answer")
    with torch.no_grad():
        output = model(ids, use_cache=True)
        names = [name for name in ("cache", "cache_params") if name in output]
        assert names
        for state in ({name: output[name]} for name in names):
            refused = pytest.raises(SteeringNotApplied, match="generate with a recurrent state")
            with refused, plan.apply(model):
                model.generate(ids, max_new_tokens=3, **state)
            refused = pytest.raises(SteeringNotApplied, match="prompt_lengths with a recurrent state")
            with refused, plan.apply(model, prompt_lengths=[4]):
                model(ids[:, :1], use_cache=True, **state)
            with plan.apply(model) as receipt:  # all of it is prompt
                model(ids[:, :1], use_cache=True, **state)
            assert receipt.tokens == {"block_output:1": 1}


@pytest.mark.parametrize("name", ["bart", "t5gemma", "nllb-moe"])
def test_encoder_decoders_are_refused_before_anything_runs(name: str) -> None:
    model = d.tiny(name, AutoModelForSeq2SeqLM)
    with pytest.raises(PlanError, match="an encoder reads its prompt"):
        Steering.from_vectors(model, {1: VECTOR})
    with pytest.raises(ModelError, match="an encoder reads its prompt"):
        block_outputs(model, [1], [[5, 6, 7]])


def test_streams_that_only_their_shape_tells_are_refused_in_the_forward() -> None:
    """ProphetNet's decoder predicts several tokens at once, each from a stream of its own."""
    model = d.tiny("prophetnet")
    plan = Steering.from_vectors(model, {1: VECTOR})
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(SteeringNotApplied, match=r"shape \[1, 9, 32\]"), plan.apply(model), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    with pytest.raises(ModelError, match=r"shape \[1, 9, 32\]"):
        block_outputs(model, [1], ids.tolist())


def test_docs_name_the_families() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("<!-- dense: begin -->")[2]
    listed = text.partition("<!-- dense: end -->")[0]
    assert tuple(re.findall(r"`([^`]+)`", listed)) == d.MODEL_TYPES
