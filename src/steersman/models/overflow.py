"""Overflow of float16 by an edit: seen on the device where the number is made, read when it matters.

A vector and a state may each fit where their sum does not (float16 ends at 65504). What was not finite before
the edit is the model's own. Edited states that fit may still overflow in a later layer; whether that is the
plan's doing, the same forward without edits tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from steersman.errors import SteeringNotApplied

FITS = -1.0
"""What stands for the largest number that an edit made overflow, where none did."""

MEND = "run the model in bfloat16 or float32, or steer with a smaller strength"


class Watcher(Protocol):
    """Who is told what an edit in float16 has made of the numbers that it was given."""

    def enter(self, site: tuple[str, int], largest: Tensor, reach: float = 0.0) -> None:
        """Take note of what `overflown` has found at a site whose edit adds `reach` at most."""


def overflown(given: Tensor, edited: Tensor) -> Tensor:
    """Float32 [2]: the largest size among finite numbers that an edit made infinite (`FITS`: there is none),
    and the largest size among edited numbers.
    """
    given, edited = given.detach(), edited.detach()
    if not edited.numel():
        return torch.full((2,), FITS, device=edited.device)
    kept = edited.isfinite() | ~given.isfinite()
    return torch.stack([torch.where(kept, FITS, given.abs().float()).amax(), edited.abs().amax().float()])


def scores_overflown(given: Tensor, edited: Tensor) -> Tensor:
    """`overflown` for the scores of routers, which are moved to the largest or the smallest of a token's."""
    return overflown(given.abs().amax(dim=-1, keepdim=True), edited)


class Overflows:
    """What the edits of a forward, or of a call of `generate`, did to numbers in float16.

    Empty where none ran in float16: then nothing is looked at.
    """

    def __init__(self) -> None:
        self._largest: dict[tuple[str, int], Tensor] = {}
        self._reach: dict[tuple[str, int], float] = {}
        self._later: Tensor | None = None
        self._broken_alone: Callable[[], bool] | None = None

    def __bool__(self) -> bool:
        return bool(self._largest)

    def enter(self, site: tuple[str, int], largest: Tensor, reach: float = 0.0) -> None:
        """See `Watcher`; does not wait for the device."""
        known = self._largest.get(site)
        self._largest[site] = largest if known is None else torch.maximum(known, largest)
        self._reach[site] = reach

    def follow(self, broken: Tensor, broken_alone: Callable[[], bool] | None) -> None:
        """Take note whether the output of a forward is not finite for a steered token, bool [].

        `broken_alone` tells whether it is so without edits too (None: that cannot be told); of several
        forwards the first one's is kept.
        """
        self._later = broken if self._later is None else self._later | broken
        self._broken_alone = self._broken_alone or broken_alone

    def add(self, other: Overflows) -> None:
        """Take over what another forward has found."""
        for site, largest in other._largest.items():
            self.enter(site, largest, other._reach[site])
        if other._later is not None:
            self.follow(other._later, other._broken_alone)

    def check(self) -> None:
        """Raise `SteeringNotApplied` where numbers have overflown by the edits; waits for the device."""
        highest = {}
        for (point, layer), largest in sorted(self._largest.items()):
            size, most = largest.tolist()
            if point == "block_output":
                highest[layer] = most
            if size != FITS:
                reach = self._reach[point, layer]
                added = f"what the plan adds to it, up to {reach:.5g}," if reach else "the plan's edit of it"
                raise SteeringNotApplied(
                    f"{point}:{layer}: {size:.5g} and {added} go beyond float16, which ends at 65504: {MEND}"
                )
        if not highest or self._later is None or not bool(self._later):
            return
        if self._broken_alone is not None and self._broken_alone():
            return  # the model's own doing
        layer = max(highest, key=lambda layer: (highest[layer], -layer))
        told = (
            " (whether they would without the plan cannot be told here)" if self._broken_alone is None else ""
        )
        raise SteeringNotApplied(
            f"layer {layer}: states of up to {highest[layer]:.5g} after the edit fit float16, which ends at "
            f"65504, but those of a layer after it do not{told}: {MEND}"
        )


def states_of_output(output: Any) -> Tensor | None:
    """What a model, or its decoder, gives for each token, [rows, columns, numbers]; None: nothing known."""
    for name in ("last_hidden_state", "logits"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) and first.dim() == 3 else None


def broken_tokens(states: Tensor) -> Tensor:
    """Which tokens are not finite, bool [rows, columns]; −∞ beside finite numbers is a mask."""
    return ~states.detach().amax(dim=-1).isfinite()
