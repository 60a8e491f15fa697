"""What a reader demands of values in a manifest and of tensors: each complaint is one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from steersman.artifacts.folder import TENSORS
from steersman.errors import ArtifactError, PlanError

Tensors = dict[str, np.ndarray[Any, Any]]


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Let every complaint about an artifact's content name its file."""
    try:
        yield
    except (ArtifactError, PlanError) as error:
        raise ArtifactError(f"{path}: {one_line(error)}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ArtifactError(f"{path}: not of the expected form ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    """What an error says, on one line that a hostile artifact cannot make long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} …"


def take(tensors: Tensors, name: str, dtype: Any, dimensions: int) -> np.ndarray[Any, Any]:
    array = tensors.pop(name, None)
    if array is None:
        raise ArtifactError(f"tensor {name!r} is missing from {TENSORS}")
    if array.dtype != dtype or array.ndim != dimensions:
        raise ArtifactError(f"tensor {name!r} is {array.dtype} with {array.ndim} dimensions")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ArtifactError(f"tensor {name!r} holds NaN or infinity")
    return array


def exact_keys(value: Any, keys: Set[str], name: str) -> None:
    if not isinstance(value, Mapping):
        raise ArtifactError(f"{name} is not an object")
    unknown, missing = sorted(value.keys() - keys), sorted(keys - value.keys())
    if unknown or missing:
        what = f"unknown key {unknown[0]!r}" if unknown else f"key {missing[0]!r} is missing"
        raise ArtifactError(f"{name}: {what}")


def whole(value: Any, name: str, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ArtifactError(f"{name} is not a whole number")
    if most is not None and value > most:
        raise ArtifactError(f"{name} is larger than {most}")
    return value


def text_in(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ArtifactError(f"{name} is not a string")
    return value


def one_of(value: Any, name: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise ArtifactError(f"{name} is {value!r}, not one of {', '.join(known)}")
    return value


def mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"{name} is not an object")
    return value


def strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ArtifactError(f"{name} is not a list of strings")
    return value


def nothing_left(tensors: Tensors) -> None:
    """Raise `ArtifactError` where a reader that has taken all tensors it knows is left with others."""
    if tensors:
        raise ArtifactError(f"unknown tensor {min(tensors)!r} in {TENSORS}")
