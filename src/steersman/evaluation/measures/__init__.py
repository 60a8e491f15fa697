"""Measures: how what a model does with an item becomes a side and numbers."""

from steersman.evaluation.measures.answers import Answers
from steersman.evaluation.measures.choice import Choice
from steersman.evaluation.measures.measure import Measure, Measured, Metric
from steersman.evaluation.measures.reading import ReadTexts

__all__ = ["Answers", "Choice", "Measure", "Measured", "Metric", "ReadTexts"]
