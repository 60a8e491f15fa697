"""Measures: how what a model does with an item becomes a side and numbers."""

from steersman.evaluation.measures.answers import Answers
from steersman.evaluation.measures.choice import Choice
from steersman.evaluation.measures.measure import Measure, Measured, Metric
from steersman.evaluation.measures.naming import Naming
from steersman.evaluation.measures.reading import ReadTexts
from steersman.evaluation.measures.samples import Samples

__all__ = ["Answers", "Choice", "Measure", "Measured", "Metric", "Naming", "ReadTexts", "Samples"]
