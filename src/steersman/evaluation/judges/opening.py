"""Judges by their names: NAME, or KIND:PLACE."""

from __future__ import annotations

from collections.abc import Callable

from steersman.errors import JudgeError, valid_name
from steersman.evaluation.judges.classifier import ClassifierJudge
from steersman.evaluation.judges.endpoint import endpoint_judge
from steersman.evaluation.judges.guard import GuardJudge
from steersman.evaluation.judges.language import LanguageJudge
from steersman.evaluation.judges.listed import ListJudge, phrase_list
from steersman.evaluation.judges.scorers import ScorerJudge, is_scorer, known_scorers
from steersman.evaluation.judges.verdict import Judge


def _phrases(place: str) -> Judge:
    return ListJudge(phrase_list(place or "refusals"))


def _classifier(place: str) -> Judge:
    model, _, label = place.partition("#")
    if not model:
        raise JudgeError("classifier: a model is missing; right is classifier:MODEL#LABEL")
    return ClassifierJudge(model, label)


def _guard(place: str) -> Judge:
    if not place:
        raise JudgeError("guard: a model is missing; right is guard:MODEL")
    return GuardJudge(place)


KINDS: dict[str, tuple[Callable[[str], Judge], str]] = {
    "phrases": (_phrases, "phrases:FILE: has one of a file's phrases among its first words (positive)"),
    "classifier": (_classifier, "classifier:MODEL#LABEL: a sequence classifier gives the label (positive)"),
    "guard": (_guard, "guard:MODEL: a guard of Llama Guard's form says safe (positive) or unsafe"),
    "language": (LanguageJudge, "language:fr: is in a language, by py3langid (positive), or another"),
    "endpoint": (endpoint_judge, "endpoint:URL#MODEL[#FILE]: a model behind an OpenAI-compatible endpoint"),
}
"""Kind → how a judge of it is opened from its place, and one line for lists."""

LISTED = {"refusal": "refusals", "abstention": "abstentions"}
"""Names of the judges by the package's own lists of phrases."""


def known_judges() -> dict[str, str]:
    """Every judge that can be opened by its name, with one line."""
    return {
        **known_scorers(),
        "refusal": "refuses, by the package's phrases (positive), or gives any other answer (negative)",
        "abstention": "says that there is no answer (positive), or gives any other (negative)",
        **{kind: about for kind, (_, about) in KINDS.items()},
    }


def load_judge(name: str) -> Judge:
    """Open a judge: a scorer's name, "refusal", "abstention", or KIND:PLACE (see `known_judges`).

    Raises JudgeError where none has the name, or its place does not hold what it should.

    Example:
        >>> judge = steersman.load_judge("refusal")
        >>> item = steersman.load_task("lab:refusal/dev", limit=1)[0]
        >>> judge.judge([item], ["I cannot help with that."])[0].outcome
        'positive'
    """
    name = valid_name(name, JudgeError)
    kind, _, place = name.partition(":")
    if name in LISTED:
        return ListJudge(phrase_list(LISTED[name]))
    if kind in KINDS:
        return KINDS[kind][0](place)
    if not is_scorer(name):
        raise JudgeError(f"{name}: no such judge; known are {', '.join(known_judges())}")
    return ScorerJudge(name)
