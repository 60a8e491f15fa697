"""Answers to a batch: those of the evaluation, why they end, their likelihoods, their receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cli.command_line import save_tiny
from steersman import Steering, load_model
from steersman.errors import ModelError, PairsError, SteeringNotApplied
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.condition import Condition
from steersman.evaluation.prompts import encode_prompt
from steersman.evaluation.tasks import load_task
from steersman.harnesses.answering import Answerer, Settings


@pytest.fixture(scope="module")
def contents() -> list[Any]:
    return [item.content for item in load_task("lab:faithfulness/test", limit=4)] + [
        item.content for item in load_task("lab:refusal/test", limit=4)
    ]


@pytest.fixture(scope="module")
def prompts(lab_moe: tuple[Any, Any], contents: list[Any]) -> list[tuple[int, ...]]:
    return [encode_prompt(lab_moe[1], content) for content in contents]


@pytest.mark.parametrize("steered", [False, True])
def test_answers_are_those_of_the_evaluation(
    lab_moe: tuple[Any, Any], contents: list[Any], prompts: Any, by_hand: Path, steered: bool
) -> None:
    plan = Steering.from_pretrained(by_hand) if steered else None
    condition = Condition(Subject(*lab_moe, max_new_tokens=12), Arm("it", plan))
    answered = Answerer(*lab_moe, plan, "weights").answer(prompts, Settings(12))
    assert [answer.text.strip() for answer in answered] == condition.answers(contents)
    assert answered[0].receipt == (condition.receipt if steered else None)
    assert [answer.prompt_tokens for answer in answered] == [len(prompt) for prompt in prompts]
    assert all(answer.stop == "stop" and answer.new_tokens < 12 for answer in answered)


def test_why_an_answer_ends(lab_moe: tuple[Any, Any], prompts: Any) -> None:
    answerer = Answerer(*lab_moe, None, "weights")
    (whole,) = answerer.answer(prompts[-1:], Settings(12))
    (short,) = answerer.answer(prompts[-1:], Settings(2))
    assert (whole.stop, short.stop, short.new_tokens) == ("stop", "max_tokens", 2)
    words = whole.text.split()
    stopped = answerer.answer(prompts, Settings(12, stop=(words[2],), likelihoods=1))[-1]
    assert (stopped.text.split(), stopped.stop) == (words[:2], "stop")
    assert len(stopped.likelihoods or ()) == stopped.new_tokens == 3


def test_a_checkpoints_own_stop_string_ends_an_answer(tmp_path: Path) -> None:
    model, tokenizer = load_model(str(save_tiny(tmp_path / "m")))
    asked = [tokenizer(text)["input_ids"] for text in ("The river is long", "who wrote the book?")]
    answerer = Answerer(model, tokenizer, None, "weights")
    (word,) = tokenizer("e")["input_ids"]
    settings = Settings(6, logit_bias=((word, 1000.0),))
    assert [answer.text for answer in answerer.answer(asked, settings)] == ["eeeeee"] * 2
    model.generation_config.stop_strings = ["eee"]
    for answer in answerer.answer(asked, settings):
        assert (answer.text, answer.stop, answer.new_tokens) == ("eee", "stop", 3)
    model.generation_config.bad_words_ids = 3
    with pytest.raises(ModelError, match=r"generation_config\.json sets: .*bad_words_ids 3"):
        answerer.answer(asked, settings)


def test_the_models_window_ends_an_answer(lab_moe: tuple[Any, Any], prompts: Any) -> None:
    answerer = Answerer(*lab_moe, None, "weights")
    window = lab_moe[0].config.max_position_embeddings
    nearly = (prompts[0] * window)[: window - 1]
    (answer,) = answerer.answer([nearly], Settings(5))
    assert (answer.new_tokens, answer.stop) == (1, "model_length")
    with pytest.raises(PairsError, match=f"a prompt of {window} tokens leaves no room"):
        answerer.answer([(*nearly, 5)], Settings(5))


def test_likelihoods_are_those_of_a_forward_over_the_answer(lab_moe: tuple[Any, Any], prompts: Any) -> None:
    model, tokenizer = lab_moe
    answer = Answerer(model, tokenizer, None, "weights").answer(prompts, Settings(12, likelihoods=3))[0]
    likelihoods = answer.likelihoods or ()
    ids = tokenizer.convert_tokens_to_ids([token.text for token in likelihoods])
    with torch.no_grad():
        logits = model(torch.tensor([[*prompts[0], *ids]])).logits[0, len(prompts[0]) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert len(likelihoods) == answer.new_tokens
    for place, token in enumerate(likelihoods):
        assert token.log_p == pytest.approx(float(expected[place, ids[place]]), abs=1e-4)
        assert token.likeliest[0] == (token.text, token.log_p)  # greedy
        assert [value for _, value in token.likeliest] == sorted(
            (value for _, value in token.likeliest), reverse=True
        )


def test_a_seed_repeats_samples_and_leaves_torchs_own_alone(lab_moe: tuple[Any, Any], prompts: Any) -> None:
    answerer = Answerer(*lab_moe, None, "weights")
    before = torch.random.get_rng_state()
    first, again, other = (
        [answer.text for answer in answerer.answer(prompts, Settings(12, temperature=3.0, seed=seed))]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_scope_that_selects_nothing_raises(lab_moe: tuple[Any, Any], prompts: Any) -> None:
    plan = Steering.from_experts(lab_moe[0], activate={1: [4]}, scope="generated")
    answerer = Answerer(*lab_moe, plan, "weights")
    assert answerer.answer(prompts, Settings(2))[0].receipt == {"router:1": len(prompts)}
    with pytest.raises(SteeringNotApplied, match="selects nothing"):
        answerer.answer(prompts, Settings(1))
