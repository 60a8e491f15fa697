"""Comparing answers: against slow, obvious versions, and by properties."""

from __future__ import annotations

import itertools
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.evaluation.judges.matching import exact_match, f1, final_number, first_said, normalised

WORDS = st.lists(st.sampled_from(["the", "a", "Paris", "paris,", "London", "new", "York", "!"]), max_size=6)
TEXTS = WORDS.map(" ".join)


def slow_f1(text: str, answer: str) -> float:
    """Each word of one paired with an unused like word of the other."""
    own, wanted = normalised(text).split(), normalised(answer).split()
    common, left = 0, list(wanted)
    for word in own:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(own), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def slow_first(text: str, answers: list[str]) -> tuple[int, int] | None:
    words = normalised(text).split()
    for start in range(len(words)):
        for length in range(len(words), 0, -1):
            if any(normalised(answer).split() == words[start : start + length] for answer in answers):
                return start, -len(words[start : start + length])
    return None


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_f1_and_exact_match(text: str, accepted: list[str]) -> None:
    assert f1(text, accepted) == pytest.approx(max(slow_f1(text, answer) for answer in accepted))
    if exact_match(text, accepted):
        assert f1(text, accepted) == 1
    assert exact_match(text, [text]) == bool(normalised(text))


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_what_is_said_first(text: str, accepted: list[str]) -> None:
    assert first_said(text, accepted) == slow_first(text, accepted)


@given(TEXTS)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5, then 7", "7"),
        ("#### 12\n13", "12"),
        ("#### 1\n#### 2", "2"),
        ("#### $1,234.50", "1234.5"),
        ("it is -3.", "-3"),
        ("1,000,000 people", "1000000"),
        (".5", "0.5"),
        ("none", None),
        ("", None),
        ("nan and inf", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_unicode_digits_and_signs_do_no_harm() -> None:
    for text in itertools.product(["٣", "²", "-", ",", ".", "####", "1"], repeat=3):
        final_number(" ".join(text))
        final_number("".join(text))
