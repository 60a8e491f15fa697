"""Objects in a session: one line each, tables in a notebook, arithmetic of plans, a dial for one block."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import contrasts
import families as f
import steersman
from concepts.mapped import *  # noqa: F403
from steersman import ArchitectureMismatch, PlanError, Steering, SteeringNotApplied, apply_rows, compose
from steersman.showing import LONGEST, Shown, cut, ranges


@functools.cache
def model() -> nn.Module:
    return f.tiny("olmoe")


def experts() -> Steering:
    return Steering.from_experts(model(), {0: [5], 1: [2]}, {2: [1, 3]}, strength=0.5)


def vectors(**options: Any) -> Steering:
    return Steering.from_vectors(model(), {1: torch.ones(32), 2: torch.arange(32.0)}, **options)
