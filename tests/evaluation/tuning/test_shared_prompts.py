"""Answers that go on from prompts which were read once, against answers that read them again."""

from __future__ import annotations

import pytest
import torch

import every_dense as d
import every_family as e
from steersman import Steering, lab
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.prompts import batches
from steersman.evaluation.tuning.shared_prompts import SharedPrompts
from steersman.models.architecture import decoder_layers

SHARED, READ_AGAIN = ("llama", "qwen3", "gpt2", "gpt_oss", "qwen3_moe"), ("mamba", "openai-gpt")
"""Seen to go on from keys and values; those with recurrent states, or without a cache."""


@pytest.mark.parametrize("name", [*SHARED, *READ_AGAIN])
def test_answers_are_as_without(name: str) -> None:
    model = e.shared(name) if name in e.MODEL_TYPES else d.tiny(name)
    size = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, size, (length,), generator=draw).tolist() for length in (4, 9, 1, 7)]
    (batch,) = batches(rows, 8, 0, torch.device("cpu"))
    last = len(decoder_layers(model)) - 1
    vectors = {last: torch.randn(e.WIDTH, generator=draw)}
    shared = SharedPrompts(model)
    for plan in (
        None,
        *(Steering.from_vectors(model, vectors, strength=2.0, scope=s) for s in ("answer", "all")),
    ):
        given = shared.arguments(batch, plan)
        assert bool(given) == (name in SHARED and (plan is None or plan.edits[0].scope == "answer"))
        one, other = (
            generated(model, batch, plan, more) for more in (given, {})
        )  # the second reads the prompts itself
        for step, (mine, own) in enumerate(zip(one.logits, other.logits, strict=True)):
            assert torch.allclose(mine, own, atol=1e-4, rtol=1e-4)
            width = batch.input_ids.shape[1] + step + 1
            if not torch.equal(one.sequences[:, :width], other.sequences[:, :width]):
                break  # a tie, which rounding decides
    assert shared.used == (2 if name in SHARED else 0)


@pytest.mark.parametrize("asked", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_a_checkpoint_that_asks_for_a_cache_of_its_own_reads_again(
    asked: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = d.tiny("llama")
    for name, value in asked.items():
        monkeypatch.setattr(model.generation_config, name, value)
    (batch,) = batches([[5, 6, 7]], 1, 0, torch.device("cpu"))
    assert SharedPrompts(model).arguments(batch, None) == {}


def generated(model, batch, plan, more):
    arguments = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "max_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": -1,
        "return_dict_in_generate": True,
        "output_logits": True,
        **more,
    }
    if plan is None:
        return model.generate(**arguments)
    with plan.apply(model) as receipt:
        found = model.generate(**arguments)
    assert sum(receipt.tokens.values()) == (12 if plan.edits[0].scope == "answer" else 21 + 8)
    return found


def test_a_subject_gives_the_same_answers_and_receipt() -> None:
    model, tokenizer = lab.load("source")
    plan = Steering.from_vectors(
        model, {1: torch.ones(model.config.hidden_size)}, strength=0.5, scope="answer"
    )
    contents = [
        [{"role": "user", "content": f"what is the {word} of the tower ?"}] for word in ("key", "badge")
    ]
    found = []
    for share in (False, True, True):
        subject = Subject(model, tokenizer, max_new_tokens=6)
        subject.shared_prompts = SharedPrompts(model) if share else None
        conditions = [subject.condition(Arm("", one)) for one in (None, plan)]
        answers = [condition.answers(contents) for condition in conditions]
        found.append((answers, conditions[1].receipt))
        if subject.shared_prompts is not None:
            assert subject.shared_prompts.used == 2
    assert found[0] == found[1] == found[2]
