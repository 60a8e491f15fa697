"""The rules for numbers in answers: whether they are in digits or in words, and whether they are right."""

from __future__ import annotations

from steersman.evaluation.judges.phrases import words_of
from steersman.evaluation.judges.verdict import Outcome

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand"
)
NUMBER_WORDS = frozenset(words_of(_WORDS))


def judge_numerals(text: str, positive: str, negative: str | None) -> Outcome:
    """Positive: the first number of the text is in digits. Negative: it is in words. Right or wrong."""
    for word in words_of(text):
        if word.isdecimal():
            return "positive"
        if word in NUMBER_WORDS:
            return "negative"
    return "neither"


def judge_whole_answer(text: str, positive: str, negative: str | None) -> Outcome:
    """Positive: one answer, to its end and with its last stop; so `1` is no `1 7`. Negative: the other."""
    words = words_of(text)
    for side, answer in (("positive", positive), ("negative", negative)):
        if answer is not None and words[: len(words_of(answer))] == words_of(answer):
            return "positive" if side == "positive" else "negative"
    return "neither"
