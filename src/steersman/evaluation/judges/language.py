"""The judge by language: whether an answer is in one, by a language identifier (py3langid)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from steersman.errors import JudgeError, how_to_install
from steersman.evaluation.judges.verdict import Verdict

if TYPE_CHECKING:
    from steersman.evaluation.tasks.item import Item

LETTERS = 20
"""Letters that a text must have for its language to be told."""


class LanguageJudge:
    """Positive: the language is the likeliest one of the answer. Negative: another is. Neither: the answer is
    too short for that (fewer than 20 letters).

    Raises JudgeError where py3langid is not installed, or does not know the language (ISO 639-1, such as fr).
    """

    def __init__(self, language: str) -> None:
        if not re.fullmatch("[a-z]{2,3}", language) or language not in identifier().labels:
            raise JudgeError(f"language:{language}: no such language; right is an ISO 639-1 code such as fr")
        self.language = language

    def record(self) -> dict[str, Any]:
        return {"judge": "language", "language": self.language, "py3langid": version("py3langid")}

    def judge(self, items: Sequence[Item], texts: Sequence[str]) -> list[Verdict]:
        return [self._verdict(text) for text in texts]

    def _verdict(self, text: str) -> Verdict:
        found = language_of(text)
        if found is None:
            return Verdict("neither", why="too short")
        return Verdict(
            "positive" if found[0] == self.language else "negative", why=f"{found[0]} {found[1]:.2f}"
        )


def language_of(text: str) -> tuple[str, float] | None:
    """ISO 639-1 code of a text's likeliest language and its probability; None where the text is too short."""
    if sum(letter.isalpha() for letter in text) < LETTERS:
        return None
    language, probability = identifier().classify(text)
    return str(language), float(probability)


@lru_cache(maxsize=1)
def identifier() -> Any:
    """The identifier with its model. Raises JudgeError where it is not installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise JudgeError(
            f"languages are told by py3langid, which is not here: {how_to_install('language')}"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
