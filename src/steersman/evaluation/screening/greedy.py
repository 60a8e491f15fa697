"""Sets of experts by greedy forward choice: the best next one, measured beside those chosen before, until
none is worth it.

What it is worth weighs both sides of the bargain, in nats: how far d moves the way that is steered, and how
much less probable becomes what is to be kept: right answers to ordinary prompts, and what the unsteered model
answers where another behaviour has two sides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_expit

from steersman.evaluation.screening.estimate import estimates
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
    """One reading that a set is chosen by; `kept` where the unsteered answer between two shall stay, `sign`
    −1 where less is better.
    """

    reading: Reading
    kept: bool = False
    sign: float = 1.0

    def worth(self, values: Floats, unsteered: Floats) -> Floats:
        """What values [..., items] are worth, in nats: themselves (d, or log probabilities of right answers),
        or −KL of the choice between two answers from what it is unsteered.
        """
        return -divergence(unsteered, values) if self.kept else self.sign * values


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
        advance: Told how many picks more there are.
    """

    def __init__(
        self,
        instrument: Instrument,
        remember: Remember,
        aims: Sequence[Aim],
        name: str,
        least_t: float = LEAST_T,
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._advance = advance
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
                return ChosenSet(tuple(picks), self._falls_short(gain), len(candidates))
            picks.append(Pick(*left[best], *_figures(gain, best)))
            self._advance(1)
        return ChosenSet(
            tuple(picks), f"as many as asked for: {count_of(at_most, 'expert')}", len(candidates)
        )

    def choose_in_rounds(self, candidates: Sequence[Edit], *, at_most: int) -> ChosenSet:
        """Choice of many: what each candidate adds is estimated for all at once, as many join as there are
        already, and the next round estimates beside them. What a round added is then measured; where that is
        not worth it, half as many join, and in the end none.

        Raises:
            CannotEstimate: as of `estimates`.
        """
        picks: list[Pick] = []
        step = 1
        while len(picks) < at_most:
            plan = tuple(_edit(pick) for pick in picks)
            left = [edit for edit in candidates if self._may_join(edit, plan)]
            if not left:
                return ChosenSet(tuple(picks), "no candidate is left", len(candidates))
            name = f"round at {len(picks)}"
            gain = self._gain(*self._estimated(name, plan, left))
            enough = [n for n in range(len(left)) if gain.t[n] >= self._least_t and gain.mean[n] > 0]
            order = sorted(enough, key=ranks(gain.mean, absolute=GAIN_TIE).__getitem__)
            step = min(step, at_most - len(picks))
            joined = self._joined(name, picks, [Pick(*left[n], *_figures(gain, n)) for n in order], step)
            if not joined:
                reason = "nothing more adds anything that is sure" if order else self._falls_short(gain)
                return ChosenSet(tuple(picks), reason, len(candidates))
            picks += joined
            self._advance(len(joined))
            step = len(picks)
        return ChosenSet(
            tuple(picks), f"as many as asked for: {count_of(at_most, 'expert')}", len(candidates)
        )

    def _joined(self, name: str, picks: list[Pick], more: list[Pick], step: int) -> list[Pick]:
        """The first of them, so many that what they add together is sure when it is measured."""
        before = [values[0] for values in self._values(f"{name}, before", tuple(map(_edit, picks)), ())]
        while step:
            joined: list[Pick] = []
            for pick in more:
                if len(joined) < step and self._may_join(_edit(pick), [*map(_edit, (*picks, *joined))]):
                    joined.append(pick)
            if not joined:
                return []
            plan = tuple(map(_edit, (*picks, *joined)))
            gain = self._gain(self._values(f"{name}, with {len(joined)} more", plan, ()), before)
            if gain.mean[0] >= LEAST_GAIN and gain.t[0] >= self._least_t:
                return joined
            step = len(joined) // 2
        return []

    def _estimated(
        self, step: str, plan: tuple[Edit, ...], more: Sequence[Edit]
    ) -> tuple[list[Floats], list[Floats]]:
        """Of each aim: values [edits, items] when each edit joins a plan, to first order, and those now."""
        values, now = [], []
        for number, aim in enumerate(self._aims):
            name = f"{self._name}, {step}, estimate of aim {number}"
            found = estimates_beside(self._instrument, aim.reading, plan, more, name, self._remember)
            values.append(found[1:])
            now.append(found[0])
        return values, now

    def _falls_short(self, gain: Gain) -> str:
        most = int(np.argmax(gain.mean))
        return (
            f"the best of {len(gain.mean)} more adds {gain.mean[most]:.3f} nats, t = {gain.t[most]:.1f} "
            f"(a pick needs {LEAST_GAIN} and {self._least_t:g}: --least-t)"
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


def _figures(gain: Gain, number: int) -> tuple[float, float]:
    return float(gain.mean[number]), float(gain.error[number])


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
    for batch in instrument.batches(reading):
        base = functools.cache(functools.partial(instrument.base, batch, plan))
        found[0, batch.texts] = remember(f"{name}, batch {batch.name}", functools.partial(_values_of, base))
        for layer, places in layers.items():
            edits = [more[place] for place in places]
            work = functools.partial(_singles, instrument, batch, base, edits)
            found[np.array(places)[:, None] + 1, batch.texts[None]] = remember(
                f"{name}, batch {batch.name}, layer {layer}", work
            )
    return by_item(reading, found)


def estimates_beside(
    instrument: Instrument,
    reading: Reading,
    plan: tuple[Edit, ...],
    more: Sequence[Edit],
    name: str,
    remember: Remember,
) -> Floats:
    """A reading's values under a plan, and to first order when each edit joins it alone: float64 [1 + edits,
    items].
    """
    layers = {edit[0]: [other for other in more if other[0] == edit[0]] for edit in more}
    place = {edit: 1 + number for number, edit in enumerate(more)}
    order = [0, *(place[edit] for of_layer in layers.values() for edit in of_layer)]
    found = np.zeros((1 + len(more), len(reading.texts)))

    def work(batch: Batch) -> Floats:
        values, changes = estimates(instrument, batch, layers, plan)
        return np.concatenate([values[None], *(values + change for change in changes.values())])

    for batch in instrument.batches(reading):
        values = remember(f"{name}, batch {batch.name}", functools.partial(work, batch))
        found[np.array(order)[:, None], batch.texts[None]] = values
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
