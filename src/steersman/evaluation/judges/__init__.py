"""Judges: which side of a behaviour a generated text is on."""

from steersman.evaluation.judges.classifier import ClassifierJudge
from steersman.evaluation.judges.endpoint import EndpointJudge
from steersman.evaluation.judges.guard import GuardJudge
from steersman.evaluation.judges.listed import ListJudge, PhraseList, phrase_list
from steersman.evaluation.judges.numerals import judge_numerals, judge_whole_answer
from steersman.evaluation.judges.opening import known_judges, load_judge
from steersman.evaluation.judges.phrases import (
    PhraseJudge,
    judge_answer,
    judge_refusal,
    judge_request,
    judge_right,
)
from steersman.evaluation.judges.scorers import ScorerJudge, known_scorers, scorer
from steersman.evaluation.judges.unjudged import Unjudged
from steersman.evaluation.judges.verdict import OUTCOMES, Judge, Outcome, Verdict

__all__ = [
    "OUTCOMES",
    "ClassifierJudge",
    "EndpointJudge",
    "GuardJudge",
    "Judge",
    "ListJudge",
    "Outcome",
    "PhraseJudge",
    "PhraseList",
    "ScorerJudge",
    "Unjudged",
    "Verdict",
    "judge_answer",
    "judge_numerals",
    "judge_refusal",
    "judge_request",
    "judge_right",
    "judge_whole_answer",
    "known_judges",
    "known_scorers",
    "load_judge",
    "phrase_list",
    "scorer",
]
