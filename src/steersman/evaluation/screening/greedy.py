"""Sets of experts by greedy forward choice: the best next one, measured beside those chosen before, until
none is worth it.

What it is worth weighs both sides of the bargain, in nats: how much more probable the answers of the side
that is steered toward become, and how much less probable what is to be kept: right answers to ordinary
prompts, and what the unsteered model answers where another behaviour has two sides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_expit

from steersman.evaluation.screening.exact import Base, Edit, Floats, Instrument
from steersman.evaluation.screening.texts import Batch, Reading, by_item
from steersman.evaluation.statistics import clustered_mean
from steersman.experts.causal_effects import ChosenSet, Pick
from steersman.limits import broken_limit
from steersman.showing import count_of
from steersman.ties import largest, ranks

LEAST_T = 3.0
LEAST_GAIN = 0.01
GAIN_TIE = 1e-5
"""Two gains that differ by fewer nats are equal: float32 tells no less."""
TOGETHER = 6
"""Candidates whose harm is measured together."""


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
    found = np.exp(first) * (first - log_expit(after)) + np.exp(second) * (second - log_expit(-after))
    return np.asarray(np.maximum(found, 0.0))


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

    def best(self, among: Sequence[int], least_t: float = LEAST_T) -> int | None:
        """The largest mean of those that are large enough and not chance, of equals the first; None where
        there is none.
        """
        enough = sorted(n for n in among if self.t[n] >= least_t and self.mean[n] >= LEAST_GAIN)
        return largest(enough, self.mean.__getitem__, absolute=GAIN_TIE)[0] if enough else None


Remember = Callable[[str, Callable[[], Floats]], Floats]
"""Gives what a named piece of work gave, from a saved run where it is there."""


class Chooser:
    """Chooses sets on some readings of one model.

    Args:
        instrument: Measures.
        remember: Keeps what was measured.
        aims: What a set is chosen by.
        name: Of the choice, for what is kept.
        least_t: What t a pick must reach.
    """

    def __init__(
        self,
        instrument: Instrument,
        remember: Remember,
        aims: Sequence[Aim],
        name: str,
        least_t: float = LEAST_T,
    ) -> None:
        self._least_t = least_t
        self._instrument = instrument
        self._remember = remember
        self._aims = aims
        self._name = name
        self._unsteered = [found[0] for found in self._values("unsteered", (), ())]

    def choose(self, candidates: Sequence[Edit], *, at_most: int, start: Sequence[Edit] = ()) -> ChosenSet:
        """Forward choice among candidates. It begins with `start`, of which stays what is worth it."""
        picks = self._worth_keeping(list(start))
        while len(picks) < at_most:
            chosen = [_edit(pick) for pick in picks]
            left = [edit for edit in candidates if self._may_join(edit, chosen)]
            if not left:
                return ChosenSet(tuple(picks), "no candidate is left", len(candidates))
            gain, best = self._best(f"pick {len(picks)}", tuple(chosen), left)
            if best is None:
                most = int(np.argmax(gain.mean))
                reason = (
                    f"the best of {len(left)} more adds {gain.mean[most]:.3f} nats, t = {gain.t[most]:.1f} "
                    f"(a pick needs {LEAST_GAIN} and {self._least_t:g})"
                )
                return ChosenSet(tuple(picks), reason, len(candidates))
            picks.append(Pick(*left[best], float(gain.mean[best]), float(gain.error[best])))
        return ChosenSet(
            tuple(picks), f"as many as asked for: {count_of(at_most, 'expert')}", len(candidates)
        )

    def _best(self, step: str, plan: tuple[Edit, ...], left: Sequence[Edit]) -> tuple[Gain, int | None]:
        """What candidates add, and the best that is sure.

        What is kept is measured for the most promising first, and for no more than can still win: it is
        worth 0 at most, so that nothing adds more to it than it has lost. The others' gains are as if they
        added all of that.
        """
        first, *kept = self._aims
        (found,) = self._values(step, plan, left, [first])
        now = [found[0], *(values[0] for values in self._values(f"{step}, kept now", plan, (), kept))]
        gain = gains([first], [found[1:]], now[:1], self._unsteered[:1])
        order = np.argsort(ranks(gain.mean, absolute=GAIN_TIE), kind="stable")
        for aim, values, unsteered in zip(kept, now[1:], self._unsteered[1:], strict=True):
            gain.mean[:] -= aim.worth(values, unsteered).mean()
        for start in range(0, len(order) if kept else 0, TOGETHER):
            some = order[start : start + TOGETHER]
            best = gain.best(order[:start].tolist(), self._least_t)
            if gain.mean[some].max() < (LEAST_GAIN if best is None else gain.mean[best] - GAIN_TIE):
                return gain, best
            edits = [left[number] for number in some]
            beside = self._values(f"{step}, kept from {start}", plan, edits, kept)
            values_of_all = [found[1 + some], *(values[1:] for values in beside)]
            exact = gains(self._aims, values_of_all, now, self._unsteered)
            gain.mean[some], gain.error[some] = exact.mean, exact.error
        return gain, gain.best(order.tolist(), self._least_t)

    def _worth_keeping(self, chosen: list[Edit]) -> list[Pick]:
        """Leave out, one by one, what a set does as well without; what the others add, least first."""
        while chosen:
            whole = [found[0] for found in self._values(f"start of {len(chosen)}", tuple(chosen), ())]
            added = []
            for number, edit in enumerate(chosen):
                rest = tuple(other for other in chosen if other != edit)
                without = self._values(f"start of {len(chosen)} without {number}", rest, ())
                gain = self._gain([values[None] for values in whole], [found[0] for found in without])
                added.append(Pick(*edit, float(gain.mean[0]), float(gain.error[0])))
            places = ranks([pick.gain for pick in added], absolute=GAIN_TIE)
            least = int(np.argmax(places))
            if added[least].gain >= LEAST_GAIN and added[least].t >= self._least_t:
                return [added[number] for number in np.argsort(places, kind="stable")]
            del chosen[least]
        return []

    def _may_join(self, edit: Edit, chosen: Sequence[Edit]) -> bool:
        layer, expert, strength = edit
        held = {e: s for at, e, s in chosen if at == layer}
        if expert in held:
            return False
        return broken_limit(self._instrument.sites[layer].facts, {**held, expert: strength}) is None

    def _gain(self, values: Sequence[Floats], now: Sequence[Floats]) -> Gain:
        return gains(self._aims, values, now, self._unsteered)

    def _values(
        self, step: str, plan: tuple[Edit, ...], more: Sequence[Edit], aims: Sequence[Aim] | None = None
    ) -> list[Floats]:
        """Of each aim (None: of all), values [1 + edits, items] under a plan, and when each edit joins it."""
        return [
            values_beside(
                self._instrument,
                aim.reading,
                plan,
                more,
                f"{self._name}, {step}, aim {number}",
                self._remember,
            )
            for number, aim in enumerate(self._aims if aims is None else aims)
        ]


def _edit(pick: Pick) -> Edit:
    return pick.layer, pick.expert, pick.strength


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
        base = functools.cache(functools.partial(instrument.base, batch, plan))
        found[0, batch.texts] = remember(f"{name}, batch {number}", functools.partial(_values_of, base))
        for layer, places in layers.items():
            edits = [more[place] for place in places]
            work = functools.partial(_singles, instrument, batch, base, edits)
            found[np.array(places)[:, None] + 1, batch.texts[None]] = remember(
                f"{name}, batch {number}, layer {layer}", work
            )
    return by_item(reading, found)


def _values_of(base: Callable[[], Base]) -> Floats:
    return base().values


def _singles(instrument: Instrument, batch: Batch, base: Callable[[], Base], edits: Sequence[Edit]) -> Floats:
    return instrument.singles(batch, base(), edits)


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
