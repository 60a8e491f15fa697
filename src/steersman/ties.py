"""Orders of measured numbers in which what differs only by rounding is a tie, so that content can break it.

The last digits of a measured number depend on what stood beside it in a batch, on threads and on the
processor's instructions; which of two nearly equal ones is larger says nothing, and must not decide what a
user gets. Promised: numbers that would be equal but for rounding are never told apart, and numbers further
apart than the tolerance always are. What happens in between is not: "nearly equal" is not transitive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

MEASURED = 1e-5
"""Relative tolerance for what float32 measured."""
COMPUTED = 1e-12
"""Relative tolerance for what float64 computed from counts: 0.3 - 0.1 is not 0.2."""


def ranks(values: npt.ArrayLike, relative: float = MEASURED, absolute: float = 0.0) -> npt.NDArray[np.int64]:
    """Ranks along the last axis, 0 for the largest; NaN counts as the smallest.

    In descending order, a number within the tolerance of the one before has its rank: a chain of many small
    steps is one tie.

    Args:
        values: [..., n].
        relative: Of the larger of two sizes.
        absolute: In the unit of the values; the larger of both tolerances holds.
    """
    given = np.array(values, np.float64)
    given[np.isnan(given)] = -np.inf
    order = np.argsort(-given, axis=-1, kind="stable")
    ordered = np.take_along_axis(given, order, axis=-1)
    before, after = ordered[..., :-1], ordered[..., 1:]
    finite = np.isfinite(before) & np.isfinite(after)
    with np.errstate(invalid="ignore"):
        near = before - after <= np.maximum(relative * np.maximum(np.abs(before), np.abs(after)), absolute)
    steps = np.zeros(given.shape, np.int64)
    steps[..., 1:] = np.where(finite, ~near, before != after)
    found = np.empty_like(steps)
    np.put_along_axis(found, order, steps.cumsum(axis=-1), axis=-1)
    return found


def largest(
    items: Iterable[T], by: Callable[[T], Any], relative: float = MEASURED, absolute: float = 0.0
) -> list[T]:
    """The items whose number is the largest or within the tolerance of it, in the order given.

    Of several, what else is known decides: `largest(largest(items, first), second)[0]` is the first item of
    those that the first number leaves and the second does. NaN counts as the smallest.
    """
    known = list(items)
    values = [-np.inf if (value := float(by(item))) != value else value for item in known]
    top = max(values)
    if not np.isfinite(top):
        return [item for item, value in zip(known, values, strict=True) if value == top]
    least = top - max(relative * abs(top), absolute)
    return [item for item, value in zip(known, values, strict=True) if value >= least]
