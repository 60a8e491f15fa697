"""Whether a text is degenerate: it repeats itself, or is in another language than it should be."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from steersman.errors import PairsError, how_to_install

LENGTH = 4
"""Of the n-grams of words that are counted (seq-rep-4: Welleck et al., arXiv 1908.04319)."""
REPEATED = 0.5
"""Share of a text's n-grams that were there before, from which on it repeats itself."""
FEWEST = 6
"""n-grams that a text must have for a share of them to say anything."""
LETTERS = 20
"""Letters that a text must have for its language to be told."""
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


def language_of(text: str) -> tuple[str, float] | None:
    """ISO 639-1 code of a text's likeliest language and its probability, by py3langid; None where the text is
    too short.
    """
    if sum(letter.isalpha() for letter in text) < LETTERS:
        return None
    language, probability = _identifier().classify(text)
    return str(language), float(probability)


def is_degenerate(text: str, *, instead_of: str) -> bool:
    """Whether a text repeats itself where another did not, or is in another language than it."""
    if repetition(text) >= REPEATED > repetition(instead_of):
        return True
    now, before = language_of(text), language_of(instead_of)
    return now is not None and before is not None and now[1] >= SURE and now[0] != before[0]


def require_identifier() -> None:
    """Raise PairsError where the language identifier is not installed."""
    _identifier()


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise PairsError(
            f"--cost degenerate tells languages by py3langid, which is not here: {how_to_install('language')}"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
