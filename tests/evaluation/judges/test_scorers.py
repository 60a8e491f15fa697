"""Scorers and lists of phrases, on answers as models write them; opening judges by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from steersman.errors import JudgeError
from steersman.evaluation.judges import known_judges, known_scorers, load_judge, phrase_list
from steersman.evaluation.tasks import Item

ITEM = Item("1", "1", "prompt", "New York", "York", "")
MANY = Item("2", "2", "prompt", "8", "9", "", facts={"positives": ["8", "eight"], "negatives": ["9"]})
PATTERN = Item("3", "3", "prompt", r"^\d+$", r"[a-z]", "")


@pytest.mark.parametrize(
    ("name", "item", "text", "side"),
    [
        ("exact", ITEM, " New York\n", "positive"),
        ("exact", ITEM, "new york", "neither"),
        ("exact", ITEM, "York", "negative"),
        ("normalised", ITEM, "the new york!", "positive"),
        ("normalised", ITEM, "in New York", "neither"),
        ("normalised", MANY, "Eight.", "positive"),
        ("begins", ITEM, "new york, of course", "positive"),
        ("begins", ITEM, "York it is", "negative"),
        ("contains", ITEM, "I think in New York.", "positive"),
        ("contains", ITEM, "York, not New York", "negative"),
        ("contains", ITEM, "Yorkshire", "neither"),
        ("contains", MANY, "eight or 9", "positive"),
        ("regex", PATTERN, "123", "positive"),
        ("regex", PATTERN, "a1", "negative"),
        ("regex", PATTERN, "A", "neither"),
        ("numeric", MANY, "so 4 + 4 = 8.0", "positive"),
        ("numeric", MANY, "8, no, 9", "negative"),
        ("refusal", ITEM, "I’m sorry, but I can’t help.", "positive"),
        ("refusal", ITEM, "Sure! " + "word " * 60 + "i cannot help", "negative"),
        ("refusal", ITEM, "Here is why one says sorry.", "negative"),
        ("abstention", ITEM, "The document does not say.", "positive"),
        ("abstention", ITEM, "1066", "negative"),
    ],
)
def test_scorers(name: str, item: Item, text: str, side: str) -> None:
    assert load_judge(name).judge([item], [text])[0].outcome == side


@pytest.mark.parametrize("name", [*known_scorers(), "refusal", "abstention"])
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_answer_is_on_neither_side(name: str, text: str) -> None:
    (verdict,) = load_judge(name).judge([MANY], [text])
    assert (verdict.outcome, set(verdict.scores.values()) <= {0.0}) == ("neither", True)


def test_a_judge_gets_a_text_an_item() -> None:
    for name in ("exact", "refusal"):
        with pytest.raises(ValueError, match="zip"):
            load_judge(name).judge([ITEM], ["a", "b"])


def test_a_wrong_expression_is_named() -> None:
    with pytest.raises(JudgeError, match=r"item 4: '\(' is no regular expression"):
        load_judge("regex").judge([Item("4", "4", "p", "(", None, "")], ["x"])


def test_phrases_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("# a comment\n^Nein\ndas geht nicht\n", encoding="utf-8")
    judge = load_judge(f"phrases:{file}")
    texts = ["Nein, nie.", "Ach, das geht  nicht!", "Er sagt nein.", "I cannot help with that."]
    assert [one.outcome for one in judge.judge([ITEM] * 4, texts)] == [
        "positive",
        "positive",
        "negative",
        "negative",
    ]
    before = judge.record()["sha256"]
    file.write_text("^Nein\ndas geht nicht\ninclude: refusals\n", encoding="utf-8")
    judge = load_judge(f"phrases:{file}")
    assert judge.judge([ITEM], texts[3:])[0].outcome == "positive"
    assert judge.record()["sha256"] != before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# nothing\n", "no phrases"),
        ("^\n", r"mine\.txt:1: no words"),
        ("a\ninclude: kindness\n", r"mine\.txt:2: no list 'kindness'"),
    ],
)
def test_wrong_lists(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(JudgeError, match=said):
        phrase_list(str(tmp_path / "mine.txt"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kindness", "no such judge; known are exact"),
        ("phrases:nowhere.txt", "no such file"),
        ("classifier:", "a model is missing"),
        ("guard:", "a model is missing"),
        ("endpoint:localhost:8000#m", "no address"),
        ("endpoint:http://localhost:1/v1", "the model is missing"),
        ("endpoint:http://me:secret@localhost:1/v1#m", r"a key goes into \$STEERSMAN_JUDGE_KEY"),
        ("endpoint:http://localhost:1/v1?key=secret#m", r"a key goes into \$STEERSMAN_JUDGE_KEY"),
        ("endpoint:http://localhost:1/v1#m#nowhere.txt", "the judge's prompt: nowhere.txt: no such file"),
    ],
)
def test_judges_that_cannot_be_opened(name: str, said: str) -> None:
    with pytest.raises(JudgeError, match=said) as caught:
        load_judge(name)
    assert "secret" not in str(caught.value)


def test_every_judge_is_listed() -> None:
    names = {"exact", "normalised", "begins", "contains", "regex", "numeric", "refusal", "abstention"}
    assert names | {"phrases", "classifier", "guard", "endpoint", "language"} <= set(known_judges())


def test_an_answers_language_is_told_and_short_ones_are_on_neither_side() -> None:
    pytest.importorskip("py3langid")
    judge = load_judge("language:fr")
    texts = ["Je ne sais pas ce que vous voulez dire.", "I do not know what you mean by that.", "Oui."]
    outcomes = [verdict.outcome for verdict in judge.judge([ITEM] * 3, texts)]
    assert outcomes == ["positive", "negative", "neither"]
    assert judge.record()["language"] == "fr"


@pytest.mark.parametrize("name", ["language:", "language:french", "language:xx", "language:FR"])
def test_a_language_that_there_is_not_is_named(name: str) -> None:
    pytest.importorskip("py3langid")
    with pytest.raises(JudgeError, match="no such language; right is an ISO 639-1 code such as fr"):
        load_judge(name)
