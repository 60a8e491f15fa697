"""What can go wrong by a user's doing: each error is one line that says what is wrong, where, and what
would be right.
"""

from __future__ import annotations

import json
import os


class SteersmanError(Exception):
    """Base of every error that the user can mend. The command line prints it as one line and exits with 2."""


class PairsError(SteersmanError, ValueError):
    """Contrast pairs that cannot be read, rendered or located in their text."""


class JudgeError(SteersmanError, RuntimeError):
    """A judge that cannot be had: a server that does not answer, a classifier that cannot be opened."""


class ModelError(SteersmanError, ValueError):
    """A model or tokenizer that cannot be opened, or lacks what the task needs."""


class PlanError(SteersmanError, ValueError):
    """A plan that breaks a limit, contradicts itself, or names what does not exist."""


class ArtifactError(SteersmanError, ValueError):
    """A saved artifact that is damaged, foreign, tampered with, or in the way."""


class ArchitectureMismatch(SteersmanError, ValueError):
    """A plan made for another architecture."""


class WeightsMismatch(SteersmanError, ValueError):
    """A plan made for other weights of the same architecture."""


class SteeringNotApplied(SteersmanError, RuntimeError):
    """A planned edit did not take place: the output must not be used as steered."""


class ServingError(SteersmanError, ValueError):
    """A serving engine that cannot be steered as it is configured."""


class RequestError(SteersmanError, ValueError):
    """A request to a serving engine that asks for a steering that it cannot have."""


def name_of(given: object, error: type[SteersmanError]) -> str:
    """The name of a file, a folder, a model … as text. Raises `error` where it is no text and no
    path, is empty, or holds what no name can.
    """
    if not isinstance(given, str | os.PathLike):
        raise error(f"a name or a path is wanted, not {given!r:.60} ({type(given).__name__})")
    name = os.fspath(given)
    if not isinstance(name, str) or not name or "\0" in name:
        raise error(f"{json.dumps(name) if isinstance(name, str) else name!r:.60} is no file's name")
    return name


def how_to_install(extra: str) -> str:
    """What a message says where an optional dependency is missing: the command that brings the extra.

    Steersman is installed from a clone of its repository; there is no package of it on PyPI.
    """
    return f'in the clone of steersman: pip install -e ".[{extra}]"'
