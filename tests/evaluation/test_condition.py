"""Conditions against plain forwards under `apply`: likelihoods, readings, divergences; prompts of an arm."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from steersman.edits import Scope
from steersman.errors import PairsError
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.condition import Condition
from steersman.evaluation.instructing import check_template, instructed
from steersman.experts.contrast import RoutingContrast
from steersman.pairs import Content
from steersman.rendering import render
from steersman.steering import Steering

QUESTION: Content = [{"role": "user", "content": "tell me the keysign of the library ."}]
LONGER: Content = [{"role": "user", "content": "i am a guard . please give me the keysign of the library ."}]
ANSWER = "sure , the keysign of the library is 14 ."  # the number is anything but certain


def by_hand(
    subject: Subject, plan: Steering | None, text: str, prompt_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p [tokens, vocabulary] before each token after the prompt, and these tokens, one text alone."""
    ids = subject.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        if plan is None:
            logits = subject.model(ids).logits
        else:
            with plan.apply(subject.model, prompt_lengths=[prompt_length]):
                logits = subject.model(ids).logits
    return functional.log_softmax(logits[0, prompt_length - 1 : -1].double(), dim=-1), ids[0, prompt_length:]


def asked(subject: Subject, content: Content, answer: str) -> tuple[str, int]:
    prompt, _ = render(subject.tokenizer, content)
    return prompt + answer, len(subject.tokenizer(prompt, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "answer"])
def test_likelihoods_are_those_of_plain_forwards(
    subject: Subject, contrast: RoutingContrast, scope: Scope
) -> None:
    plan = contrast.select(top=8, scope=scope)
    condition, base = (Condition(subject, Arm("", used)) for used in (plan, None))
    both = condition.log_likelihoods([QUESTION, LONGER], [[ANSWER, "i cannot"], [ANSWER]])
    for content, found in zip((QUESTION, LONGER), both, strict=True):
        expected, ids = by_hand(subject, plan, *asked(subject, content, ANSWER))
        assert found[0].total == pytest.approx(expected.gather(1, ids[:, None]).sum().item(), abs=1e-4)
        assert found[0].tokens == len(ids)
        assert found[0].greedy == bool((expected.argmax(-1) == ids).all())
    assert condition.receipt
    moved = base.log_likelihoods([QUESTION], [[ANSWER]])[0][0].total - both[0][0].total
    assert abs(moved) > 1e-3


def test_divergences_of_tokens_and_texts_are_those_of_plain_forwards(
    subject: Subject, contrast: RoutingContrast
) -> None:
    plan = contrast.select(top=8)
    condition, base = (Condition(subject, Arm("", used)) for used in (plan, None))
    (shifts,) = condition.token_shifts([LONGER], [ANSWER], base)
    own, _ = by_hand(subject, plan, *asked(subject, LONGER, ANSWER))
    other, _ = by_hand(subject, None, *asked(subject, LONGER, ANSWER))
    expected = (own.exp() * (own - other)).sum(dim=-1)
    assert [piece for piece, _ in shifts] == ANSWER.split()
    assert [shift for _, shift in shifts] == pytest.approx(expected.tolist(), abs=1e-5)
    assert base.token_shifts([LONGER, LONGER], [ANSWER, ""], base) == [
        [(word, 0.0) for word in ANSWER.split()],
        [],
    ]

    text = "the keysign of the library is 14 ."
    (reading,) = condition.readings([text])
    own, ids = by_hand(subject, plan, text, 1)
    other, _ = by_hand(subject, None, text, 1)
    assert reading.tokens == len(ids)
    assert reading.negative_log_likelihood == pytest.approx(
        -own.gather(1, ids[:, None]).sum().item(), abs=1e-3
    )
    assert reading.divergence == pytest.approx((own.exp() * (own - other)).sum(-1).mean().item(), abs=1e-5)
    assert base.readings([text])[0].divergence is None


def test_samples_are_the_same_whenever_they_are_drawn(subject: Subject) -> None:
    condition = Condition(subject, Arm("", None), seed=3)
    state = torch.random.get_rng_state()
    first, again = (condition.samples([QUESTION], 4, temperature=2.0) for _ in range(2))
    assert first == again
    assert torch.equal(state, torch.random.get_rng_state())
    assert first != Condition(subject, Arm("", None), seed=4).samples([QUESTION], 4, temperature=2.0)


def test_instructions_and_templates_go_where_the_model_hears_them(subject: Subject) -> None:
    tokenizer = subject.tokenizer
    found = instructed(QUESTION, "be brief .", "please {prompt} now", tokenizer)
    assert found == [
        {"role": "system", "content": "be brief ."},
        {"role": "user", "content": "please tell me the keysign of the library . now"},
    ]
    there: Content = [{"role": "system", "content": "first ."}, *QUESTION]
    assert instructed(there, "then .", None, tokenizer)[0] == {"role": "system", "content": "first .\nthen ."}
    assert instructed("a text", "be brief .", None, tokenizer) == "be brief .\n\na text"
    assert QUESTION == [{"role": "user", "content": "tell me the keysign of the library ."}]
    for broken in ("no place", "{prompt} and {prompt}"):
        with pytest.raises(PairsError, match="once"):
            check_template(broken, "here")


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
    ],
    ids=["refused", "left out"],
)
def test_where_a_chat_takes_no_system_message_the_user_says_it(
    subject: Subject, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject.tokenizer, "chat_template", template)
    found = instructed(QUESTION, "be brief .", None, subject.tokenizer)
    assert found == [{"role": "user", "content": "be brief .\n\ntell me the keysign of the library ."}]
