"""Measures: how what a model does with an item becomes a side and numbers."""

from steersman.evaluation.measures.answers import Answers
from steersman.evaluation.measures.measure import Measure, Measured, Metric

__all__ = ["Answers", "Measure", "Measured", "Metric"]
