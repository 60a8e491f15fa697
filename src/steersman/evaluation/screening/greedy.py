"""Sets of experts by greedy forward choice: the best next one, measured beside those chosen before, until
none is worth it.

What is worth it weighs both sides of the bargain, in nats: how much more probable the answers of the side that
is steered toward become, and how much less probable what is to be kept: right answers to ordinary prompts, and
what the unsteered model answers where another behaviour has two sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_expit

from steersman.evaluation.screening.exact import Base, Edit, Floats, Instrument
from steersman.evaluation.screening.texts import Batch, Reading, by_item
from steersman.evaluation.statistics import clustered_mean
from steersman.experts.causal import ChosenSet, Pick
from steersman.limits import broken_limit

LEAST_T = 3.0
LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Aim:
    """One reading that a set is chosen by; `kept` where the unsteered answer between two shall stay."""

    reading: Reading
    kept: bool = False

    def worth(self, values: Floats, unsteered: Floats) -> Floats:
        """What values [..., items] are worth, in nats: themselves (log probabilities of right answers), or
        −KL of the choice between two answers from what it is unsteered.
        """
        return -divergence(unsteered, values) if self.kept else values


def divergence(before: Floats, after: Floats) -> Floats:
    """KL(before ‖ after) in nats of choices between two answers, given as d = log p(one) − log p(other)."""
    first, second = log_expit(before), log_expit(-before)
    found: Floats = np.exp(first) * (first - log_expit(after)) + np.exp(second) * (second - log_expit(-after))
    return np.maximum(found, 0.0)


@dataclass(frozen=True)
class Gain:
    """Of several edits: the worth they add, float64 [edits], with its cluster-robust standard error."""

    mean: Floats
    error: Floats

    @property
    def t(self) -> Floats:
        """mean / error; 0 where there is no change at all."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.mean == 0, 0.0, self.mean / self.error)


Remember = Callable[[str, Callable[[], Floats]], Floats]
"""Gives what a named piece of work gave, from a saved run where it is there."""


class Chooser:
    """Chooses sets on some readings of one model."""

    def __init__(self, instrument: Instrument, remember: Remember) -> None:
        self._instrument = instrument
        self._remember = remember

    def choose(
        self,
        name: str,
        aims: Sequence[Aim],
        candidates: Sequence[Edit],
        *,
        at_most: int,
        start: Sequence[Edit] = (),
    ) -> ChosenSet:
        """The set for one direction. `start` is chosen beforehand, and what is not worth it left out again."""
        unsteered = [
            self._values(f"{name}/unsteered/{number}", aim, (), ()) for number, aim in enumerate(aims)
        ]
        chosen: list[Edit] = list(start)
        picks: list[Pick] = []
        now = unsteered
        while len(chosen) < at_most:
            left = [edit for edit in candidates if self._may_join(edit, chosen)]
            if not left:
                reason = "no candidate is left" if candidates else "no expert's effect passes the gate"
                break
            found = [
                self._values(f"{name}/{len(chosen)}/{number}", aim, tuple(chosen), left)
                for number, aim in enumerate(aims)
            ]
            now = [values[0] for values in found]
            gain = gains(aims, [values[1:] for values in found], now, [u[0] for u in unsteered])
            sure = gain.t >= LEAST_T
            best = int(np.argmax(np.where(sure, gain.mean, -np.inf)))
            if not sure[best] or gain.mean[best] < LEAST_GAIN:
                best = int(np.argmax(gain.mean))
                reason = (
                    f"the best of {len(left)} more adds {gain.mean[best]:.3f} nats, t = {gain.t[best]:.1f} "
                    f"(a pick needs {LEAST_GAIN} and {LEAST_T:g})"
                )
                break
            layer, expert, strength = left[best]
            picks.append(Pick(layer, expert, strength, float(gain.mean[best]), float(gain.error[best])))
            chosen.append(left[best])
        else:
            reason = f"{at_most} experts are as many as asked for"
        return ChosenSet(tuple(picks), reason, len(candidates))

    def _may_join(self, edit: Edit, chosen: Sequence[Edit]) -> bool:
        layer, expert, strength = edit
        held = {e: s for at, e, s in chosen if at == layer}
        if expert in held:
            return False
        return broken_limit(self._instrument.sites[layer].facts, {**held, expert: strength}) is None

    def _values(self, name: str, aim: Aim, plan: tuple[Edit, ...], more: Sequence[Edit]) -> Floats:
        """Values [1 + edits, items] under a plan, and when each edit joins it."""
        return values_beside(self._instrument, aim.reading, plan, more, name, self._remember)


def values_beside(
    instrument: Instrument,
    reading: Reading,
    plan: tuple[Edit, ...],
    more: Sequence[Edit],
    name: str,
    remember: Remember,
) -> Floats:
    """A reading's values under a plan, and when each edit joins it alone: float64 [1 + edits, items]."""
    found = np.zeros((1 + len(more), len(reading.texts)))
    layers = {
        layer: [number for number, edit in enumerate(more) if edit[0] == layer]
        for layer in sorted({edit[0] for edit in more})
    }
    for number, batch in enumerate(instrument.batches(reading)):
        kept: list[Base] = []

        def base(batch: Batch = batch, kept: list[Base] = kept) -> Base:
            if not kept:
                kept.append(instrument.base(batch, plan))
            return kept[0]

        found[0, batch.texts] = remember(f"{name}/{number}", lambda base=base: base().values)
        for layer, places in layers.items():

            def work(batch: Batch = batch, places: list[int] = places, base: Any = base) -> Floats:
                return instrument.singles(batch, base(), [more[place] for place in places])

            found[np.array(places)[:, None] + 1, batch.texts[None]] = remember(
                f"{name}/{number}/{layer}", work
            )
    return by_item(reading, found)


def gains(
    aims: Sequence[Aim], values: Sequence[Floats], now: Sequence[Floats], unsteered: Sequence[Floats]
) -> Gain:
    """What each edit adds to the worth of what is now, over all aims.

    Args:
        values: Of each aim, [edits, items].
        now, unsteered: Of each aim, [items].
    """
    mean, variance = np.zeros(len(values[0])), np.zeros(len(values[0]))
    for aim, of_aim, before, base in zip(aims, values, now, unsteered, strict=True):
        added = aim.worth(of_aim, base) - aim.worth(before, base)
        for number, items in enumerate(added):
            found = clustered_mean(items, aim.reading.groups)
            mean[number] += found.mean
            variance[number] += found.standard_error**2 if math.isfinite(found.standard_error) else math.inf
    return Gain(mean, np.sqrt(variance))
