"""Exact sums over clusters: products of counts as integers of any size, fast where 64 bits hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

INT64_MAX = int(np.iinfo(np.int64).max)
STORED_LIMB = 1 << 62
"""Integers of any size are stored in limbs below this."""
_LIMB_BITS = 24
_LIMB = (1 << _LIMB_BITS) - 1
_MOST_ROWS = 1 << 14
"""So many products of two limbs add up within 64 bits."""


def product_sum(x: Integers, y: Integers) -> Any:
    """Σᵢ xᵢ·yᵢ over the first axis, exactly, for integers from 0 to 2^63 - 1.

    Args:
        x: int64 [rows, …].
        y: int64 [rows, …], broadcast against x.

    Returns:
        int64 […] where every result fits for certain, else the same as Python integers (object).
    """
    rows, largest = len(x), _largest(x) * _largest(y)
    if largest * rows <= INT64_MAX:
        return (x * y).sum(axis=0)
    if rows > _MOST_ROWS:
        return sum(
            product_sum(x[start : start + _MOST_ROWS], y[start : start + _MOST_ROWS]).astype(object)
            for start in range(0, rows, _MOST_ROWS)
        )
    total: Any = 0
    for i, left in enumerate(_limbs(x)):
        for j, right in enumerate(_limbs(y)):
            total = total + ((left * right).sum(axis=0).astype(object) << _LIMB_BITS * (i + j))
    return total


def weighted_sum(weights: Integers, x: Integers) -> Integers:
    """Σᵢ weights[r, i]·xᵢ, exactly: int64 [replicates, …] from int64 [replicates, rows] and [rows, …].

    Raises:
        OverflowError: a result may not fit 64 bits.
    """
    most = int(weights.sum(axis=1).max(initial=0)) * _largest(x)
    if most > INT64_MAX:
        raise OverflowError("sums of replicates outgrow 64 bits")
    flat = x.reshape(len(x), -1)
    if most <= 1 << 53:  # float64 holds every partial sum: its matrix product is much faster
        product = (weights.astype(np.float64) @ flat.astype(np.float64)).astype(np.int64)
    else:
        product = weights @ flat
    return product.reshape(len(weights), *x.shape[1:])


def as_limbs(values: npt.NDArray[Any]) -> Integers:
    """Integers as they are (int64), or of any size as two limbs of 62 bits, [2, …] low first."""
    if values.dtype == np.int64:
        return values
    high = values // STORED_LIMB
    return np.stack([(values % STORED_LIMB).astype(np.int64), high.astype(np.int64)])


def from_limbs(values: Integers, dimensions: int) -> Any:
    """What `as_limbs` took: integers with so many dimensions."""
    if values.ndim == dimensions:
        return values
    return values[0].astype(object) + values[1].astype(object) * STORED_LIMB


def _largest(values: Integers) -> int:
    return int(values.max(initial=0))


def _limbs(values: Integers) -> list[Integers]:
    limbs = []
    rest = values
    while True:
        limbs.append(rest & _LIMB)
        rest = rest >> _LIMB_BITS
        if not rest.any():
            return limbs
