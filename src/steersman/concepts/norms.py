"""Norms of states in a histogram of fixed size: medians of streams, to within 0.3 %, that merge exactly."""

from __future__ import annotations

import torch
from torch import Tensor

BINS_PER_OCTAVE = 128
"""A bin is 2^(1/128) wide: its middle is within 0.28 % of all that is in it."""
LOWEST_OCTAVE, OCTAVES = -24, 64
BINS = BINS_PER_OCTAVE * OCTAVES


class NormHistogram:
    """Counts of norms in log-spaced bins from 2^-24 to 2^40; what is smaller or larger is in the outer bins.

    Args:
        counts: int64 [8192]; None for an empty one.

    Raises:
        ValueError: counts of another shape or kind, or below 0.
    """

    def __init__(self, counts: Tensor | None = None) -> None:
        if counts is None:
            counts = torch.zeros(BINS, dtype=torch.int64)
        if counts.dtype != torch.int64 or counts.shape != (BINS,) or bool((counts < 0).any()):
            raise ValueError(f"a histogram of norms has {BINS} int64 counts of at least 0")
        if float(counts.double().sum()) >= 2.0**53:
            raise ValueError("a histogram of norms counts more than there can be")
        self._counts = counts.cpu().clone()

    def add(self, norms: Tensor) -> None:
        """Count norms, of any shape and float dtype. Raises ValueError where one is not finite."""
        values = norms.detach().double().reshape(-1)
        if not bool(torch.isfinite(values).all()):
            raise ValueError("a norm is not finite")
        octaves = torch.log2(values.clamp(min=2.0**LOWEST_OCTAVE)) - LOWEST_OCTAVE
        bins = (octaves * BINS_PER_OCTAVE).long().clamp(max=BINS - 1)
        self._counts += torch.bincount(bins, minlength=BINS).cpu()

    @property
    def count(self) -> int:
        """How many norms were added."""
        return int(self._counts.sum())

    @property
    def median(self) -> float:
        """The lower median, to within 0.3 %; NaN where nothing was added."""
        total = self.count
        if not total:
            return float("nan")
        place = int(torch.searchsorted(self._counts.cumsum(0), (total + 1) // 2))
        return float(2.0 ** (LOWEST_OCTAVE + (place + 0.5) / BINS_PER_OCTAVE))

    def __add__(self, other: NormHistogram) -> NormHistogram:
        return NormHistogram(self._counts + other._counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NormHistogram) and torch.equal(self._counts, other._counts)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"NormHistogram({self.count} norms, median {self.median:.4g})"

    def to_tensor(self) -> Tensor:
        """Counts int64 [8192]."""
        return self._counts.clone()

    @classmethod
    def from_tensor(cls, counts: Tensor) -> NormHistogram:
        """A histogram of such counts. Raises ValueError as the constructor does."""
        return cls(counts)
