"""What can go wrong by a user's doing: each error is one line that says what is wrong, where, and what
would be right.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from numbers import Integral
from typing import TypeVar

T = TypeVar("T")


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


def told(given: object) -> str:
    """Something of a wrong kind, for a message of one line."""
    kind = type(given).__name__
    if isinstance(given, str | int | float | None):
        return f"{given!r:.60} ({kind})"
    return a_kind(kind)


def a_kind(kind: str) -> str:
    """A kind of object by its class's name: "an AffineMap", "a list"."""
    return f"a{'n' if kind[:1] in 'AEIOaeio' else ''} {kind}"


def check_kind(given: object, kind: type, error: type[SteersmanError]) -> None:
    """Raise `error` where something else than a `kind` is given."""
    if not isinstance(given, kind):
        raise error(f"{a_kind(kind.__name__)} is wanted, not {told(given)}")


def whole_number(what: str, given: object, least: int, error: type[SteersmanError]) -> int:
    """A setting as a plain int, NumPy's too. Raises `error` where it is no whole number, or too small."""
    if isinstance(given, bool) or not isinstance(given, Integral) or given < least:
        shown = given if isinstance(given, Integral) else told(given)
        raise error(f"{what} is {shown}: give a whole number, {least} or more")
    return int(given)


def each_of(given: Iterable[T], kind: type[T], error: type[SteersmanError]) -> list[T]:
    """What is given, one after the other. Raises `error` where something else than a `kind` is among it."""
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise error(f"a list of {kind.__name__} is wanted, not {told(given)}")
    found = list(given)
    for one in found:
        check_kind(one, kind, error)
    return found


def valid_name(given: object, error: type[SteersmanError]) -> str:
    """The name of a file, a folder, a model … as text. Raises `error` where it is no text and no path, is
    empty, or holds what no name can.
    """
    if not isinstance(given, str | os.PathLike):
        raise error(f"a name or a path is wanted, not {told(given)}")
    name = os.fspath(given)
    try:
        possible = bool(name) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half a character
        possible = False
    if not possible or not isinstance(name, str):
        raise error(f"{json.dumps(str(name))} is no name of a file or of anything else")
    return name


def how_to_install(extra: str) -> str:
    """What a message says where an optional dependency is missing: the command that brings the extra.

    Steersman is installed from a clone of its repository; there is no package of it on PyPI.
    """
    return f'in the clone of steersman: pip install -e ".[{extra}]"'
