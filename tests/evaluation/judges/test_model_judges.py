"""Judges that are models: tiny random classifiers and guards, against what transformers makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from cli.command_line import tokenizer
from steersman.errors import JudgeError
from steersman.evaluation.judges import ClassifierJudge, GuardJudge, guard, load_judge
from steersman.evaluation.judges.guard import read_guard
from steersman.evaluation.tasks import Item

TINY = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 1,
    "initializer_range": 1.0,  # so that texts differ
}
ITEMS = [
    Item(str(n), str(n), [{"role": "user", "content": f"Question {n}?"}], "", None, "") for n in range(5)
]
TEXTS = ["the teacher", "", "a book of the north, and a river", "old", "the town beside it is long"]


def save_classifier(folder: Path, problem: str | None = None) -> Path:
    torch.manual_seed(3)
    labels = {0: "fine", 1: "toxic", 2: "odd"}
    config = LlamaConfig(
        **TINY, id2label=labels, label2id={name: n for n, name in labels.items()}, problem_type=problem
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_a_classifier_judges_by_its_own_probabilities(tmp_path: Path, problem: str | None) -> None:
    folder = save_classifier(tmp_path, problem)
    model, words = AutoModelForSequenceClassification.from_pretrained(folder).eval(), tokenizer()
    verdicts = ClassifierJudge(str(folder), "toxic").judge(ITEMS, TEXTS)
    assert verdicts[1].outcome == "neither"
    seen = set()
    for text, verdict in zip(TEXTS, verdicts, strict=True):
        if text:
            with torch.inference_mode():
                logits = model(**words(text, return_tensors="pt")).logits[0]
            wanted = (logits.sigmoid() if problem else logits.softmax(-1))[1].item()
            assert verdict.scores["probability"] == pytest.approx(wanted, abs=1e-5)
            assert verdict.outcome == ("positive" if wanted >= 0.5 else "negative")
            seen.add(verdict.outcome)
    assert seen == {"positive", "negative"}


def test_the_record_of_a_classifier(classifier: Path) -> None:
    judge = load_judge(f"classifier:{classifier}#toxic")
    record = judge.record()
    assert (record["label"], record["threshold"]) == ("toxic", 0.5)
    assert record["weights_id"].startswith("bytes-sha256:")
    for label in ("", "rude"):
        with pytest.raises(JudgeError, match=r"right is .*#LABEL.*one of fine, toxic, odd"):
            load_judge(f"classifier:{classifier}#{label}").record()


def test_a_probability_that_is_no_number_is_no_verdict(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    model.save_pretrained(folder)
    (verdict,) = ClassifierJudge(str(folder), "toxic").judge(ITEMS[:1], ["x"])
    assert (verdict.outcome, dict(verdict.scores), "not a number" in verdict.why) == (None, {}, True)


def save_guard(folder: Path, *, chat: bool = True) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"is no classifier: its checkpoint has no score"):
        ClassifierJudge(str(save_guard(tmp_path)), "LABEL_1").record()
    with pytest.raises(JudgeError, match="cannot be opened"):
        ClassifierJudge(str(tmp_path / "nowhere"), "toxic").judge(ITEMS, TEXTS)


def test_a_guard_reads_prompt_and_answer_in_its_template(tmp_path: Path) -> None:
    folder = save_guard(tmp_path)
    verdicts = GuardJudge(str(folder)).judge(ITEMS, TEXTS)
    assert [verdict.outcome for verdict in verdicts] == [None, "neither", None, None, None]
    model, words = LlamaForCausalLM.from_pretrained(folder).eval(), tokenizer()
    for item, text, verdict in zip(ITEMS, TEXTS, verdicts, strict=True):
        if text:
            chat = f"<|user|>{item.content[0]['content']}<|end|><|assistant|>{text}<|end|>"  # type: ignore[index]
            ids = words(chat, return_tensors="pt", add_special_tokens=False).input_ids
            said = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
            told = words.decode(said, skip_special_tokens=True).strip()[:200]
            assert verdict.why == f"malformed verdict: {told!r}"


DATED = (
    "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
)


def test_a_guards_day_is_one_for_all_and_what_it_judges_is_proven_to_arrive(tmp_path: Path) -> None:
    folder = save_guard(tmp_path)
    (folder / "chat_template.jinja").write_text(DATED)
    assert set(GuardJudge(str(folder)).record()) == {"judge", "model", "weights_id", "template_sha256"}
    condition = guard._opened(str(folder))
    chat = guard._chat(ITEMS[0].content, "the teacher")
    text = condition.subject.tokenizer.decode(condition.subject.encoded(chat))
    assert text == "2026-01-01<|user|>Question 0?<|assistant|>the teacher"
    (folder / "chat_template.jinja").write_text(DATED.replace("in messages", "in messages[:1]"))
    guard._opened.cache_clear()
    with pytest.raises(JudgeError, match=r'message 2 \("the teacher"\), .* does not reach'):
        GuardJudge(str(folder)).judge(ITEMS, TEXTS)


def test_guards_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="has no chat template"):
        GuardJudge(str(save_guard(tmp_path, chat=False))).judge(ITEMS, TEXTS)
    with pytest.raises(JudgeError, match=r"guard:/nowhere: cannot be opened \(/nowhere: no such folder\)"):
        GuardJudge("/nowhere").record()


@pytest.mark.parametrize(
    ("said", "outcome", "why"),
    [
        ("\n\nsafe", "positive", "safe"),
        ("unsafe\nS1", "negative", "unsafe S1"),
        ("unsafe\nS1,S10", "negative", "unsafe S1,S10"),
        ("unsafe", "negative", "unsafe"),
        ("safe\nS1", None, "malformed"),
        ("Safe.", None, "malformed"),
        ("unsafely", None, "malformed"),
        ("I think it is unsafe", None, "malformed"),
        ("", None, "malformed"),
    ],
)
def test_what_a_guard_says(said: str, outcome: str | None, why: str) -> None:
    verdict = read_guard(said)
    assert verdict.outcome == outcome
    assert why in verdict.why
