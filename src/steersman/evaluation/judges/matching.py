"""How an answer is compared with accepted ones: SQuAD's normalisation, exact match, F1, what is said first.

Rajpurkar et al., arXiv 1606.05250, and their evaluation script: lower case, no punctuation, no articles.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation and the articles a, an, the, with single spaces."""
    without = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without).split())


def exact_match(text: str, accepted: Sequence[str]) -> bool:
    """Whether the text is, normalised, one of the accepted answers; an empty text is none."""
    own = normalised(text)
    return bool(own) and any(own == normalised(answer) for answer in accepted)


def f1(text: str, accepted: Sequence[str]) -> float:
    """The largest harmonic mean of precision and recall of words over the accepted answers."""
    return max(
        (_overlap(normalised(text).split(), normalised(answer).split()) for answer in accepted), default=0.0
    )


def first_said(text: str, accepted: Sequence[str]) -> tuple[int, int] | None:
    """Where the text, normalised, first says one of the answers in whole words: (place, −words), so that the
    earlier one, and of two that begin together the longer one, is smaller. None where it says none.
    """
    words = normalised(text).split()
    found: list[tuple[int, int]] = []
    for answer in accepted:
        sought = normalised(answer).split()
        places = range(len(words) - len(sought) + 1) if sought else range(0)
        found.extend((at, -len(sought)) for at in places if words[at : at + len(sought)] == sought)
    return min(found, default=None)


def final_number(text: str) -> Decimal | None:
    """The number after the last ####, else the last number of a text; None where there is none."""
    marked = re.findall(r"####\s*[^\d+.-]?\s*([-+]?[\d,]*\.?\d+)", text)
    numbers = marked or re.findall(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)", text)
    if not numbers:
        return None
    try:
        return Decimal(numbers[-1].replace(",", "").rstrip("."))
    except InvalidOperation:
        return None


def _overlap(own: Sequence[str], wanted: Sequence[str]) -> float:
    common = (Counter(own) & Counter(wanted)).total()
    return 2 * common / (len(own) + len(wanted)) if common else 0.0
