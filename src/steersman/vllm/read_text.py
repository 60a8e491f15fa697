"""Texts that are read and not written: their answers are given, and steered as if the model wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PROMPT = "prompt"
"""Where the engine is told, in what it is told of a request, how much of what it is given is prompt."""


@dataclass(frozen=True)
class ReadText:
    """What a caller in this process puts into `extra_args["steersman"]` of a request that is to be read.

    No client can: what comes over HTTP is JSON, which makes no object of this class.

    Attributes:
        prompt_length: The first so many tokens are the prompt; those after it are an answer's.
    """

    prompt_length: int


def prompt_length(told: Mapping[str, Any] | None, given: int) -> int:
    """P of a request that gives the engine so many tokens."""
    return given if told is None else int(told.get(PROMPT, given))
