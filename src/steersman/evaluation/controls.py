"""Random controls: plans of the same shape with other experts, to see what any plan would do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from steersman.edits import ExpertEdit
from steersman.errors import PlanError

if TYPE_CHECKING:
    from steersman.evaluation.arms import Subject
    from steersman.evaluation.prompts import Fork
    from steersman.steering import Steering

BIN_SIZE = 8
"""Experts of one layer and of like base activation rate that stand in for each other."""

TRIES = 1_000
"""Draws that may break a router's limit before a control is given up."""

Exchange = dict[int, NDArray[np.intp]]
"""Layer → the expert that stands in for each expert of the layer."""


class Counts(Protocol):
    """What a control needs of a `RoutingContrast`: its counts (−1 where there is no such expert)."""

    @property
    def activations(self) -> NDArray[np.int64]: ...
    @property
    def tokens(self) -> NDArray[np.int64]: ...
    @property
    def layers(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class RandomPlan:
    """The plan and its reverse with the same experts exchanged for others in both."""

    toward: Steering
    reverse: Steering


def base_rates(contrast: Counts) -> dict[int, NDArray[np.float64]]:
    """Layer → share of all target tokens, both sides together, that used each of its experts."""
    tokens = int(np.asarray(contrast.tokens).sum())
    positive, negative = np.asarray(contrast.activations)
    totals, present = positive + negative, positive >= 0
    return {layer: totals[row][present[row]] / tokens for row, layer in enumerate(contrast.layers)}


def rate_bins(rates: NDArray[np.float64], bin_size: int = BIN_SIZE) -> list[NDArray[np.intp]]:
    """The experts of a layer in bins of neighbouring base rate, about `bin_size` each."""
    order = np.argsort(rates, kind="stable")
    return list(np.array_split(order, max(1, round(len(order) / bin_size))))


def exchanges(
    rates: Mapping[int, NDArray[np.float64]], seed: int, bin_size: int = BIN_SIZE
) -> Iterator[Exchange]:
    """Random permutations of the experts within each layer's bins, without end.

    A permutation keeps count, sign and layer of every edit, and its base activation rate as far as the bin is
    narrow. Nothing is left out: an expert may stay, or be exchanged for another one of the plan. So the plan
    is one of the set that is drawn from, and its p-value is exact if experts of a bin are alike.
    """
    generator = np.random.default_rng(seed)
    bins = {layer: rate_bins(values, bin_size) for layer, values in rates.items()}
    while True:
        exchange: Exchange = {}
        for layer, groups in bins.items():
            stand_in = np.empty(len(rates[layer]), dtype=np.intp)
            for group in groups:
                stand_in[group] = generator.permutation(group)
            exchange[layer] = stand_in
        yield exchange


def random_plans(
    contrast: Counts,
    toward: Steering,
    reverse: Steering,
    *,
    draws: int,
    seed: int = 0,
    bin_size: int = BIN_SIZE,
) -> list[RandomPlan]:
    """`draws` random plans matched in count, sign, layer and base activation rate, each with its reverse.

    Raises PlanError where hardly any exchange keeps the routers' limits.
    """
    source = exchanges(base_rates(contrast), seed, bin_size)
    plans: list[RandomPlan] = []
    tries = 0
    while len(plans) < draws:
        exchange = next(source)
        try:
            plans.append(RandomPlan(exchanged(toward, exchange), exchanged(reverse, exchange)))
        except PlanError:
            tries += 1  # an exchange across the groups of a group-limited router
            if tries > TRIES:
                raise PlanError(f"{TRIES} random plans broke a router's limits: no random control") from None
    return plans


def exchanged(steering: Steering, exchange: Exchange) -> Steering:
    """The same plan with other experts; vectors stay as they are.

    Raises PlanError where that breaks a router's limit.
    """
    edits = tuple(
        edit
        if not isinstance(edit, ExpertEdit)
        else replace(
            edit,
            strengths={
                layer: {int(exchange[layer][expert]): strength for expert, strength in experts.items()}
                for layer, experts in edit.strengths.items()
            },
        )
        for edit in steering.edits
    )
    return replace(steering, edits=edits, provenance={"made": "random control"}, evidence=())


def effect(subject: Subject, forks: Sequence[Fork], toward: Steering, reverse: Steering) -> float:
    """D: mean d toward minus mean d reversed, in nats (see `Subject.preference`)."""
    return float(subject.preference(forks, toward).mean() - subject.preference(forks, reverse).mean())


def effects(
    subject: Subject,
    forks: Sequence[Fork],
    plans: Sequence[RandomPlan],
    advance: Callable[[int], object] = lambda _: None,
) -> list[float]:
    """D of each random plan; `advance(1)` is called after each."""
    found: list[float] = []
    for plan in plans:
        found.append(effect(subject, forks, plan.toward, plan.reverse))
        advance(1)
    return found
