"""The lab: a small world, models trained in it with a known mechanism or with none, pairs and tasks."""

from __future__ import annotations

from steersman.lab.carving import carve
from steersman.lab.datasets import DATA, pairs, task
from steersman.lab.models import MODELS, checkpoint, load, planted
from steersman.lab.texts import texts
from steersman.lab.training import train
from steersman.lab.world import INSTRUCTIONS, SPLITS

__all__ = [
    "DATA",
    "INSTRUCTIONS",
    "MODELS",
    "SPLITS",
    "carve",
    "checkpoint",
    "load",
    "pairs",
    "planted",
    "task",
    "texts",
    "train",
]
