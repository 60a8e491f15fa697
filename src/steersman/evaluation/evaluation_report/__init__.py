"""Reports of evaluations: a page, Markdown, the steering card; all from the data of evaluation.json alone."""

from steersman.evaluation.evaluation_report.attaching import evidence_in_words, with_evidence
from steersman.evaluation.evaluation_report.card import card_evidence, steering_card
from steersman.evaluation.evaluation_report.reading import (
    check_evaluation,
    evaluation_schema,
    read_evaluation,
)
from steersman.evaluation.evaluation_report.writing import REPORTS, write_evaluation_report

__all__ = [
    "REPORTS",
    "card_evidence",
    "check_evaluation",
    "evaluation_schema",
    "evidence_in_words",
    "read_evaluation",
    "steering_card",
    "with_evidence",
    "write_evaluation_report",
]
