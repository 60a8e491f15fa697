"""The model that an engine serves, as plans see it: its structure and the identity of its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from steersman.models.apply import Match, check_model
from steersman.models.loading import load_structure
from steersman.steering import Steering


def checker(model_config: Any, match: Match) -> Callable[[Steering], None]:
    """What raises where a plan is not for the model of an engine's configuration.

    The structure is opened when the first plan is checked.
    """
    structure = functools.cache(lambda: load_structure(model_config.model, revision=model_config.revision))

    def check(steering: Steering) -> None:
        check_model(steering, structure(), match)

    return check
