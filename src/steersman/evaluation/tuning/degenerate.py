"""Whether a text is degenerate: it repeats itself, or is in another language than it should be."""

from __future__ import annotations

import re

from steersman.evaluation.judges.language import language_of

LENGTH = 4
"""Of the n-grams of words that are counted (seq-rep-4: Welleck et al., arXiv 1908.04319)."""
REPEATED = 0.5
"""Share of a text's n-grams that were there before, from which on it repeats itself."""
FEWEST = 6
"""n-grams that a text must have for a share of them to say anything."""
LOOP = 12
"""Words at a text's end that, at a period of `LENGTH` at most, are a loop that it does not leave."""
SURE = 0.9
"""Probability from which on a text is held to be in another language than it should be."""


def repetition(text: str) -> float:
    """seq-rep-4: the share of a text's 4-grams of words that occurred before in it; of a text whose words are
    not parted by spaces, of its characters. 0 where there are too few.
    """
    words = _words(text)
    grams = [tuple(words[start : start + LENGTH]) for start in range(len(words) - LENGTH + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= FEWEST else 0.0


def repeats(text: str) -> bool:
    """Whether a text repeats itself: half of its 4-grams were there before, or it ends in a loop, which an
    answer that was cut off would not have left.
    """
    end = _words(text)[-LOOP:]
    loops = len(end) == LOOP and any(
        all(word == before for word, before in zip(end[period:], end, strict=False))
        for period in range(1, LENGTH + 1)
    )
    return loops or repetition(text) >= REPEATED


def is_degenerate(text: str, *, instead_of: str) -> bool:
    """Whether a text repeats itself where another did not, or is in another language than it."""
    if repeats(text) and not repeats(instead_of):
        return True
    now, before = language_of(text), language_of(instead_of)
    return now is not None and before is not None and now[1] >= SURE and now[0] != before[0]


def _words(text: str) -> list[str]:
    words: list[str] = re.findall(r"\w+|[^\w\s]", text.lower())
    if words and max(map(len, words)) > 40:
        return [letter for letter in text if not letter.isspace()]
    return words
