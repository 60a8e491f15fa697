"""Items side by side: each arm's answer, with its changed words marked and its tokens' KL by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from steersman.evaluation.evaluation_report.numbers import Pieces
from steersman.evaluation.evaluation_report.place import Place
from steersman.evaluation.evaluation_report.texts import messages
from steersman.ties import largest

LEVELS = (0.1, 0.5, 2.0)
"""KL in nats from which a token has level 1, 2, 3."""


@dataclass(frozen=True)
class Stretch:
    """Part of a word: its text, the KL of the token that it is from (None: not known) and that's level."""

    text: str
    shift: float | None = None

    @property
    def level(self) -> int:
        return 0 if self.shift is None else sum(self.shift >= least for least in LEVELS)

    @property
    def title(self) -> str:
        return "" if self.shift is None else f"KL {nats(self.shift)} nats"


@dataclass(frozen=True)
class Word:
    """A word in stretches, and whether the base's answer does not have it there."""

    stretches: tuple[Stretch, ...]
    changed: bool


@dataclass(frozen=True)
class Answer:
    """One arm's answer; `tokens` where they do not spell the words, and stand in a line of their own."""

    arm: str
    number: int
    words: Sequence[Word]
    tokens: Sequence[Stretch]
    side: str
    changed_side: bool
    note: Pieces

    @property
    def runs(self) -> list[list[Word]]:
        """The words in runs, of changed ones and of others in turn."""
        return [list(run) for _, run in groupby(self.words, key=lambda word: word.changed)]


@dataclass(frozen=True)
class Shown:
    """One item on the page."""

    id: str
    kind: str
    prompt: Sequence[tuple[str, str]]
    answers: Sequence[Answer]

    @property
    def changed_under(self) -> str:
        """Numbers of the arms under which the item is on another side than under the base."""
        return " ".join(str(answer.number) for answer in self.answers if answer.changed_side)


def nats(shift: float) -> str:
    """A divergence to two digits behind the point."""
    return f"{shift:.2f}" if shift == 0 or shift >= 0.005 else "< 0.01"


def shown_items(result: Place, task: Place) -> list[Shown]:
    """The items of a task that the evaluation keeps for reading."""
    order = {arm["name"]: number for number, arm in enumerate(result.value["arms"])}
    return [_shown(item, task, order) for item in task["shown"]]


def _shown(item: Place, task: Place, order: dict[str, int]) -> Shown:
    arms = sorted(item.value["answers"], key=lambda arm: order.get(arm, len(order)))
    base = item.value["answers"].get("base", {}).get("outcome")
    answers = [_answer(item["answers"][arm], arm, order.get(arm, len(order)), task, base) for arm in arms]
    return Shown(item.value["id"], item.value["kind"], messages(item.value["prompt"]), answers)


def _answer(place: Place, arm: str, number: int, task: Place, base: str | None) -> Answer:
    value = place.value
    words, tokens = laid_over(value["words"], value["tokens"])
    changed = arm != "base" and value["outcome"] != base
    return Answer(arm, number, words, tokens, side_of(value["outcome"], task), changed, _note(place, arm))


def side_of(outcome: str | None, task: Place) -> str:
    """A side by the name that the task has for it."""
    sides = task.value["sides"]
    if sides is None:
        return ""
    return "not judged" if outcome is None else str(sides.get(outcome, "neither side"))


def _note(place: Place, arm: str) -> Pieces:
    """How far an answer is from the base's, in words: for who does not see marks and shades."""
    words, tokens = place.value["words"], place.value["tokens"]
    if arm == "base" or not words:
        return ()
    changed = sum(bool(marked) for _, marked in words)
    note: Pieces = (f"{changed} of {len(words)} words differ",)
    if tokens:
        first = largest(range(len(tokens)), lambda index: tokens[index][1], absolute=1e-5)[0]
        at = f" nats at “{tokens[first][0].strip()}”"
        note = (*note, "; largest KL ", place["tokens"][first][1].number(nats), at)
    return note


def laid_over(words: Any, tokens: Any) -> tuple[list[Word], list[Stretch]]:
    """Tokens over words: each word in the stretches that its tokens make of it.

    Where the tokens do not spell the words (a tokenizer that drops or rewrites letters), both are given as
    they are.
    """
    stretches = [Stretch(text, shift) for text, shift in tokens or []]
    letters = [(sign, place) for place, of in enumerate(stretches) for sign in of.text if not sign.isspace()]
    spelt = "".join(sign for sign, _ in letters)
    if not stretches or spelt != "".join(text for text, _ in words):
        return [Word((Stretch(text),), bool(changed)) for text, changed in words], stretches
    laid, at = [], 0
    for text, changed in words:
        parts: dict[int, str] = {}
        for sign, place in letters[at : at + len(text)]:
            parts[place] = parts.get(place, "") + sign
        at += len(text)
        laid.append(
            Word(tuple(Stretch(part, stretches[p].shift) for p, part in parts.items()), bool(changed))
        )
    return laid, []
