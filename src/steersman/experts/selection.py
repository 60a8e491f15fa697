"""Choosing experts from a ranking: the first ones by size of effect, as far as each router's limits allow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steersman.errors import PlanError, whole_number
from steersman.limits import Router, broken_limit
from steersman.showing import count_of
from steersman.ties import COMPUTED, ranks


@dataclass(frozen=True)
class Choice:
    """What was chosen: {layer: {expert: ±1}}, and what had to be left out with the reason."""

    signs: dict[int, dict[int, float]]
    skipped: tuple[dict[str, object], ...]

    def count(self, sign: float) -> int:
        """How many experts were chosen with this sign."""
        return sum(value == sign for experts in self.signs.values() for value in experts.values())


def ranked(
    scores: npt.NDArray[np.float64], layers: list[int], merit: npt.NDArray[np.float64] | None = None
) -> list[tuple[int, int, float]]:
    """(layer, expert, score) by merit descending, ties (up to rounding) by layer and expert; scores NaN and 0
    are left out.

    Args:
        scores: [layers, experts], signed.
        layers: The true index of each row.
        merit: [layers, experts], what is best first; None: |score|.
    """
    rows, experts = np.nonzero(~np.isnan(scores) & (scores != 0))
    values, true_layers = scores[rows, experts], np.array(layers)[rows]
    best = np.abs(values) if merit is None else merit[rows, experts]
    order = np.lexsort((experts, true_layers, ranks(best, COMPUTED)))
    columns = (true_layers[order].tolist(), experts[order].tolist(), values[order].tolist())
    return list(zip(*columns, strict=True))


def choose(
    ranking: list[tuple[int, int, float]],
    routers: dict[int, Router],
    *,
    activate: int | None = None,
    deactivate: int | None = None,
    top: int | None = None,
    strength: float = 1.0,
) -> Choice:
    """Take the first of a ranking, then apply the limits in rank order, without replacement.

    Args:
        ranking: (layer, expert, signed score), best first. A positive score is for activation.
        routers: The router of each layer.
        activate: How many of the first with a positive score.
        deactivate: How many of the first with a negative score.
        top: How many of the first, whatever their sign; instead of the other two.
        strength: The size of every λ, above 0: a soft activation leaves more groups for routing to pick.

    Raises:
        PlanError: fewer experts than asked for, a negative number, or nothing asked for.
    """
    asked_sizes(activate=activate, deactivate=deactivate, top=top)
    if (top is None) == (activate is None and deactivate is None):
        raise PlanError("say how many experts: either `top`, or `activate` and/or `deactivate`")
    if top is not None:
        wanted = _first(ranking, top, "with a difference in use")
    else:
        positive = _first([e for e in ranking if e[2] > 0], activate or 0, "to activate")
        negative = _first([e for e in ranking if e[2] < 0], deactivate or 0, "to deactivate")
        order = {entry: place for place, entry in enumerate(ranking)}
        wanted = sorted(positive + negative, key=order.__getitem__)
    return _within_limits(wanted, routers, strength)


def asked_sizes(**given: int | None) -> dict[str, int | None]:
    """How many experts are asked for, by name, as plain ints. Raises PlanError for what is none."""
    return {name: n if n is None else whole_number(name, n, 0, PlanError) for name, n in given.items()}


def stability(
    choice: Choice,
    scores: Iterable[npt.NDArray[np.float64]],
    merits: Iterable[npt.NDArray[np.float64] | None],
    routers: dict[int, Router],
    *,
    activate: int | None = None,
    deactivate: int | None = None,
    top: int | None = None,
    strength: float = 1.0,
) -> dict[int, dict[int, float]]:
    """For each expert of a choice the share of replicates in which the same choice takes it, with its sign.

    A replicate with fewer experts than asked for takes those there are.

    Args:
        scores: Of each replicate, [layers, experts], signed.
        merits: Of each replicate, as in `ranked`.
    """
    layers = sorted(routers)
    hits = {layer: dict.fromkeys(experts, 0) for layer, experts in choice.signs.items()}
    replicates = list(zip(scores, merits, strict=True))
    for of_replicate, merit in replicates:
        ranking = ranked(of_replicate, layers, merit)
        there = (sum(entry[2] > 0 for entry in ranking), sum(entry[2] < 0 for entry in ranking))
        again = choose(
            ranking,
            routers,
            activate=None if activate is None else min(activate, there[0]),
            deactivate=None if deactivate is None else min(deactivate, there[1]),
            top=None if top is None else min(top, len(ranking)),
            strength=strength,
        )
        for layer, experts in choice.signs.items():
            for expert, sign in experts.items():
                hits[layer][expert] += again.signs.get(layer, {}).get(expert) == sign
    return {
        layer: {expert: count / len(replicates) for expert, count in experts.items()}
        for layer, experts in hits.items()
    }


def _first(entries: list[tuple[int, int, float]], number: int, what: str) -> list[tuple[int, int, float]]:
    if len(entries) < number:
        raise PlanError(f"{count_of(number, 'expert')} {what} were asked for, but there are {len(entries)}")
    return entries[:number]


def _within_limits(
    wanted: list[tuple[int, int, float]], routers: dict[int, Router], strength: float
) -> Choice:
    signs: dict[int, dict[int, float]] = {}
    skipped: list[dict[str, object]] = []
    for layer, expert, score in wanted:
        tried = {**signs.get(layer, {}), expert: 1.0 if score > 0 else -1.0}
        reason = broken_limit(routers[layer], {name: sign * strength for name, sign in tried.items()})
        if reason is None:
            signs[layer] = tried
        else:
            skipped.append({"layer": layer, "expert": expert, "reason": reason})
    return Choice(signs, tuple(skipped))
