"""One check for every way of running a model: against the plain model, the same plans, the same counts and
states.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import families as f
from steersman import ContrastPair, ContrastPairs, RoutingContrast, Steering, detect_experts, weights_id
from steersman.concepts.states import block_outputs
from steersman.models.architecture import read_architecture
from streams import width_of

WAYS_FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3")
"""A plain softmax, a top-k before the softmax with biases, groups with a correction bias."""

ON, OFF = 5, 1
"""The expert that the plan activates in layer 1, and the one it deactivates in layer 2."""
LAYERS = (1, 2)

IDS = f.token_ids(2, 7)
WORDS = [f"w{number}" for number in range(f.VOCABULARY)]


def plan_of(model: nn.Module) -> Steering:
    return Steering.from_experts(model, activate={1: [ON]}, deactivate={2: [OFF]})


def vector_of(model: Any) -> Tensor:
    """What is added to layer 1's output."""
    return torch.randn(width_of(model), generator=torch.Generator().manual_seed(5))


def vectors_of(model: nn.Module) -> Steering:
    return Steering.from_vectors(model, {1: vector_of(model)}, strength=2.0, scope="answer")


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    backend = Tokenizer(tokenizer_models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="w3"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w3")


@functools.cache
def pairs() -> ContrastPairs:
    """Six pairs of texts of 3 to 9 tokens."""

    def text(seed: int) -> str:
        return " ".join(WORDS[number] for number in f.token_ids(1, 3 + seed % 7, seed)[0].tolist())

    return ContrastPairs([ContrastPair(text(2 * n), text(2 * n + 1)) for n in range(6)])


def counts(model: nn.Module) -> RoutingContrast:
    return detect_experts(model, tokenizer(), pairs(), batch_size=4)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def written(model: Any, ids: Tensor = IDS, new: int = 4) -> Tensor:
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
    )


def steered(
    model: Any, plan: Steering, inner: nn.Module | None = None, tokens: int = IDS.numel(), **options: Any
) -> Tensor:
    """Logits under a plan, with the promise checked at the experts by hooks of our own, and the receipt."""
    inside = inner if inner is not None else model
    with (
        f.watching(inside, 1) as first,
        f.watching(inside, 2) as second,
        plan.apply(model, **options) as receipt,
    ):
        output = logits(model)
    assert len(first) == len(second) == 1
    assert first[0].chosen.shape[0] == tokens
    assert bool(first[0].has(ON).all())
    assert not bool(second[0].has(OFF).any())
    assert receipt.tokens == {"router:1": tokens, "router:2": tokens}
    return output


def check_way(
    plain: Any, model: Any, tolerance: float = 1e-5, inner: nn.Module | None = None, **options: Any
) -> None:
    """The whole contract for one way of running `model`, whose plain form is `plain`."""
    before, base = logits(model), logits(plain)
    torch.testing.assert_close(before, base, atol=tolerance, rtol=0)
    assert read_architecture(model).id == read_architecture(plain).id
    assert weights_id(model) == weights_id(plain)
    for plan in (plan_of(plain), plan_of(model)):
        assert plan.fingerprint == plan_of(plain).fingerprint
        expected = steered(plain, plan)
        torch.testing.assert_close(steered(model, plan, inner, **options), expected, atol=tolerance, rtol=0)
        assert not torch.allclose(expected, base, atol=100 * tolerance, rtol=0)  # it matters
    with plan.apply(plain), plan.apply(model, **options) as receipt:
        assert torch.equal(written(model), written(plain))
    assert receipt.tokens == {f"router:{layer}": IDS.numel() + 3 * len(IDS) for layer in LAYERS}
    assert torch.equal(logits(model), before)  # unsteered again, to the bit
    check_vectors(plain, model, tolerance, **options)
    ours, theirs = counts(model), counts(plain)
    assert (ours.activations == theirs.activations).all()
    assert (ours.tokens == theirs.tokens).all()
    assert torch.equal(logits(model), before)


def check_vectors(plain: Any, model: Any, tolerance: float = 1e-5, **options: Any) -> None:
    """The same for a plan of vectors, and for states that are read."""
    before, base = logits(model), logits(plain)
    plan = vectors_of(plain)
    assert vectors_of(model).fingerprint == plan.fingerprint
    with plan.apply(plain):
        expected, answers = logits(plain), written(plain)
    with plan.apply(model, **options) as receipt:
        torch.testing.assert_close(logits(model), expected, atol=tolerance, rtol=0)
        assert torch.equal(written(model), answers)
    assert receipt.tokens == {"block_output:1": 5 * len(IDS)}  # of a forward, and of four new tokens
    assert not torch.allclose(expected, base, atol=100 * tolerance, rtol=0)
    assert torch.equal(logits(model), before)
    ours, theirs = (block_outputs(each, [0, 1, 2], IDS.tolist()) for each in (model, plain))
    for layer, states in theirs.items():
        torch.testing.assert_close(ours[layer], states, atol=tolerance, rtol=0)
    assert torch.equal(logits(model), before)
