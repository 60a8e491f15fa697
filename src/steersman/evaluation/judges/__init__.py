"""Judges: which side of a behaviour a generated text is on."""

from steersman.evaluation.judges.numerals import judge_numerals, judge_whole_answer
from steersman.evaluation.judges.phrases import (
    PhraseJudge,
    judge_answer,
    judge_refusal,
    judge_request,
    judge_right,
)
from steersman.evaluation.judges.verdict import OUTCOMES, Judge, Outcome, Verdict

__all__ = [
    "OUTCOMES",
    "Judge",
    "Outcome",
    "PhraseJudge",
    "Verdict",
    "judge_answer",
    "judge_numerals",
    "judge_refusal",
    "judge_request",
    "judge_right",
    "judge_whole_answer",
]
