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
SURE = 0.9
"""Probability from which on a text is held to be in another language than it should be."""


def repetition(text: str) -> float:
    """seq-rep-4: the share of a text's 4-grams of words that occurred before in it; of a text whose words are
    not parted by spaces, of its characters. 0 where there are too few.
    """
    words: list[str] = re.findall(r"\w+|[^\w\s]", text.lower())
    if words and max(map(len, words)) > 40:
        words = [letter for letter in text if not letter.isspace()]
    grams = [tuple(words[start : start + LENGTH]) for start in range(len(words) - LENGTH + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= FEWEST else 0.0


def is_degenerate(text: str, *, instead_of: str) -> bool:
    """Whether a text repeats itself where another did not, or is in another language than it."""
    if repetition(text) >= REPEATED > repetition(instead_of):
        return True
    now, before = language_of(text), language_of(instead_of)
    return now is not None and before is not None and now[1] >= SURE and now[0] != before[0]
