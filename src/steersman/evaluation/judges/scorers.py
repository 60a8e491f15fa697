"""Scorers: rules, known by name, that judge an answer by the answers that its item accepts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from steersman.errors import JudgeError
from steersman.evaluation.judges.listed import phrase_list
from steersman.evaluation.judges.matching import exact_match, f1, final_number, first_said
from steersman.evaluation.judges.phrases import begins_with
from steersman.evaluation.judges.verdict import Outcome, Verdict
from steersman.evaluation.measures.measure import Metric

if TYPE_CHECKING:
    from steersman.evaluation.tasks.item import Item

Scorer = Callable[[str, "Item"], Verdict]
"""(generated text, item) → verdict. An empty text never comes to it."""

ENTRY_POINTS = "steersman.scorers"
"""Packages add scorers by entry points of this group: name = the scorer's, value = a `Scorer`."""

MATCH = (
    Metric("exact_match", "exact match (normalised)", "rate", "higher"),
    Metric("f1", "F1 of words", "mean", "higher"),
)
"""What scorers that compare answers note beside the side, of the positive side's answers."""

UNANSWERABLE = "unanswerable"
"""The answer of an item of SQuAD's form that has none."""


@dataclass(frozen=True)
class _Registered:
    function: Scorer
    about: str
    metrics: tuple[Metric, ...] = ()
    answers: bool = True


_SCORERS: dict[str, _Registered] = {}


def scorer(
    name: str, about: str, metrics: tuple[Metric, ...] = (), *, answers: bool = True
) -> Callable[[Scorer], Scorer]:
    """Register a scorer; `about` is one line for lists, `metrics` what its scores are, `answers` whether what
    it reads of an item's two sides is what a model would say (a regular expression is not).
    """

    def register(function: Scorer) -> Scorer:
        _SCORERS[name] = _Registered(function, about, metrics, answers)
        return function

    return register


def known_scorers() -> dict[str, str]:
    """Scorer → one line, those that other packages add included."""
    ours = {name: found.about for name, found in _SCORERS.items()}
    return {
        **ours,
        **{e.name: f"from {e.value}" for e in entry_points(group=ENTRY_POINTS) if e.name not in ours},
    }


def is_scorer(name: str) -> bool:
    """Whether a scorer has this name."""
    return name in _SCORERS or name in known_scorers()


def _scorer(name: str) -> _Registered:
    if name not in _SCORERS:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            try:
                _SCORERS[name] = _Registered(entry.load(), f"from {entry.value}")
            except (ImportError, AttributeError) as error:
                raise JudgeError(
                    f"{name}: the scorer cannot be loaded from {entry.value} ({error})"
                ) from error
    if name not in _SCORERS:
        raise JudgeError(f"{name}: no such scorer; known are {', '.join(known_scorers())}")
    return _SCORERS[name]


@dataclass(frozen=True)
class ScorerJudge:
    """Judges each answer by a scorer. Raises JudgeError where none has the name."""

    name: str

    def __post_init__(self) -> None:
        _scorer(self.name)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return _scorer(self.name).metrics

    @property
    def answers(self) -> bool:
        """Whether the sides of an item that it reads are what a model would say."""
        return _scorer(self.name).answers

    def record(self) -> dict[str, Any]:
        return {"judge": self.name}

    def judge(self, items: Sequence[Item], texts: Sequence[str]) -> list[Verdict]:
        found = _scorer(self.name)
        nothing = Verdict("neither", {metric.name: 0.0 for metric in found.metrics}, "an empty answer")
        return [
            found.function(text, item) if text.strip() else nothing
            for item, text in zip(items, texts, strict=True)
        ]


def accepted(item: Item) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The accepted wordings of both sides' answers: `facts["positives"]` and `["negatives"]` where there are
    several.
    """
    negative = () if item.negative is None else (item.negative,)
    return tuple(item.facts.get("positives", (item.positive,))), tuple(item.facts.get("negatives", negative))


def _scores(text: str, positives: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(exact_match(text, positives)), "f1": f1(text, positives)}


def _side(positive: bool, negative: bool) -> Outcome:
    return "positive" if positive else "negative" if negative else "neither"


@scorer("exact", "the answer, letter by letter", MATCH)
def _exact(text: str, item: Item) -> Verdict:
    positives, negatives = (tuple(one.strip() for one in side) for side in accepted(item))
    return Verdict(_side(text.strip() in positives, text.strip() in negatives), _scores(text, positives))


@scorer("normalised", "the answer, whatever case, punctuation and articles", MATCH)
def _normalised(text: str, item: Item) -> Verdict:
    positives, negatives = accepted(item)
    side = _side(exact_match(text, positives), exact_match(text, negatives))
    return Verdict(side, _scores(text, positives))


@scorer("begins", "begins with the answer, whatever case and spacing", MATCH)
def _begins(text: str, item: Item) -> Verdict:
    positives, negatives = accepted(item)
    return Verdict(
        _side(begins_with(text, *positives), begins_with(text, *negatives)), _scores(text, positives)
    )


@scorer("contains", "says the answer, before that of the other side", MATCH)
def _contains(text: str, item: Item) -> Verdict:
    positives, negatives = accepted(item)
    own, other = first_said(text, positives), first_said(text, negatives)
    side = _side(own is not None and (other is None or own <= other), other is not None)
    return Verdict(side, _scores(text, positives))


@scorer("regex", "a regular expression matches somewhere", answers=False)
def _regex(text: str, item: Item) -> Verdict:
    positives, negatives = accepted(item)
    return Verdict(_side(_matches(positives, text, item), _matches(negatives, text, item)))


@scorer("numeric", "the final number is the answer's")
def _numeric(text: str, item: Item) -> Verdict:
    found = final_number(text)
    positives, negatives = ([final_number(one) for one in side] for side in accepted(item))
    if found is None:
        return Verdict("neither", why="no number in it")
    return Verdict(_side(found in positives, found in negatives), why=f"the number {found}")


@scorer("squad", "the answer by SQuAD's normalisation; where there is none, abstention", MATCH)
def _squad(text: str, item: Item) -> Verdict:
    """Negative: says that there is no answer where there is one, or answers where there is none."""
    abstains = phrase_list("abstentions").found_in(text) is not None
    if item.positive == UNANSWERABLE:
        return Verdict(_side(abstains, True), {"exact_match": float(abstains), "f1": float(abstains)})
    positives, _ = accepted(item)
    return Verdict(_side(exact_match(text, positives), abstains), _scores(text, positives))


def _matches(patterns: Sequence[str], text: str, item: Item) -> bool:
    try:
        return any(re.search(pattern, text) for pattern in patterns)
    except re.error as error:
        raise JudgeError(f"item {item.id}: {error.pattern!r} is no regular expression ({error})") from None
