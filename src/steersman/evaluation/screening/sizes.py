"""How far sets of experts move d, by their size, beside random sets of the same shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from steersman.certainty import CANNOT_TELL, Control, Verdict, verdict
from steersman.edits import Scope
from steersman.errors import ModelError, PlanError, whole_number
from steersman.evaluation.controls import TRIES, exchanges
from steersman.evaluation.screening.exact import Edit, Floats, Instrument
from steersman.evaluation.screening.items import Items, some_of, told_apart
from steersman.evaluation.screening.screen import Runs, opened_items
from steersman.evaluation.screening.texts import Batch, Reading, by_item, preferences, require_room
from steersman.evaluation.statistics import clustered_mean
from steersman.experts.causal_effects import DIRECTIONS, Direction
from steersman.experts.recording import recording
from steersman.experts.selection import choose
from steersman.limits import Router, broken_limit
from steersman.models.architecture import find_routers
from steersman.models.attachment import refuse_steered
from steersman.models.loading import Named, open_named
from steersman.ties import MEASURED

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedTokenizerBase

Kind = Literal["activated", "deactivated", "both"]
KINDS: tuple[Kind, ...] = ("activated", "deactivated", "both")
Ranking = Sequence[tuple[int, int, float]]
"""(layer, expert, score), best first; a positive score is for activation."""
LARGEST_SHARE = 0.1
"""Of all experts, those that a set may hold."""
_ASKED: dict[Kind, str] = {"activated": "activate", "deactivated": "deactivate", "both": "top"}


@dataclass(frozen=True)
class SizedSet:
    """The first `size` experts of a ranking that are of a kind, but for what breaks a router's limit."""

    direction: Direction
    kind: Kind
    size: int
    edits: tuple[Edit, ...]

    @property
    def strengths(self) -> dict[int, dict[int, float]]:
        """{layer: {expert: λ}}"""
        found: dict[int, dict[int, float]] = {}
        for layer, expert, strength in self.edits:
            found.setdefault(layer, {})[expert] = strength
        return found


@dataclass(frozen=True, eq=False)
class SizeSweep:
    """Changes of d in nats, item by item, under sets of growing size and under random ones of their shape.

    Attributes:
        sets: What was steered.
        changes: Of each set, float64 [sets, items].
        random: Of each draw, float64 [draws, sets, items]. Draw b of a set has other experts of the same
            layers, as many of each kind, and of like use; the smaller sets of a draw are parts of the larger.
        unsteered: d, float64 [items].
        groups: The items' clusters.
        task: The items' name.
    """

    sets: tuple[SizedSet, ...]
    changes: Floats
    random: Floats
    unsteered: Floats
    groups: tuple[str, ...]
    task: str

    def rows(self) -> list[dict[str, Any]]:
        """One row a set: the mean change with its 95 % interval over groups, the random sets' mean and the
        band of 95 % of them, the share p of all sets, itself counted, that go as far that way, and what may
        be said of it.
        """
        found: list[dict[str, Any]] = []
        for number, one in enumerate(self.sets):
            sign = 1.0 if one.direction == "toward" else -1.0
            mean = clustered_mean(self.changes[number], self.groups)
            drawn = self.random[:, number].mean(axis=1)
            as_far = _as_far(sign * mean.mean, sign * drawn)
            control = Control(len(drawn), (1 + as_far) / (1 + len(drawn)))
            band = np.quantile(drawn, (0.025, 0.975)).tolist() if len(drawn) else [None, None]
            found.append(
                {
                    "direction": one.direction,
                    "kind": one.kind,
                    "size": one.size,
                    "experts": len(one.edits),
                    "change": mean.mean,
                    "low": _number(mean.low),
                    "high": _number(mean.high),
                    "random": float(drawn.mean()) if len(drawn) else None,
                    "random_low": band[0],
                    "random_high": band[1],
                    "as_far": as_far,
                    "draws": len(drawn),
                    "p": control.p,
                    "verdict": _verdict(mean.low, mean.high, sign, control),
                }
            )
        return found

    def table(self) -> pandas.DataFrame:
        """The same as a table."""
        import pandas

        return pandas.DataFrame(self.rows())

    def to_json(self) -> dict[str, Any]:
        """Everything but the items' own numbers, as plain values."""
        return {
            "task": self.task,
            "items": len(self.groups),
            "groups": len(set(self.groups)),
            "unsteered": float(self.unsteered.mean()),
            "sets": [
                {**row, "edits": [list(edit) for edit in one.edits]}
                for row, one in zip(self.rows(), self.sets, strict=True)
            ],
        }


def sweep_sizes(
    model: Named,
    tokenizer: PreTrainedTokenizerBase | None,
    items: Items,
    rankings: Mapping[Direction, Ranking],
    *,
    sizes: Sequence[int] | None = None,
    kinds: Sequence[Kind] = KINDS,
    draws: int = 19,
    rates: Mapping[int, Floats] | None = None,
    whole: bool = False,
    scope: Scope = "all",
    limit: int = 400,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
    runs: Runs | None = None,
) -> SizeSweep:
    """How far the first experts of a ranking move d = log p(positive answer) − log p(negative answer), by
    their number, and how far random experts do that are matched in layer, kind and use.

    Every set is a row of a batch for each item, computed from its first edited layer on.

    Args:
        model: A transformers Mixture-of-Experts model, or its name.
        tokenizer: Its tokenizer; None takes that of a model named.
        items: A task whose items have both answers, or contrast pairs that differ in the last answer alone.
        rankings: For each direction the candidates in the order in which they are taken, as
            `CausalScreen.order(reverse=…)` and `RoutingContrast.ranking(reverse=…)` give them.
        sizes: Numbers of experts; None: powers of two, and a tenth of all experts. A size that a ranking has
            too few experts of a kind for is left out.
        kinds: Which experts of a ranking sets are made of. Where all of them go one way, `both` is left out.
        draws: Random sets for each set; 19 or more can show something.
        rates: {layer: share of tokens that use each expert [experts]}, as `controls.base_rates` of a
            contrast; None: as on these items, unsteered.
        whole: d of whole answers, instead of the first token where they differ.
        scope: Which tokens are steered.
        limit: Read at most so many items, of as many groups as there are.
        seed: Of the items and the draws.
        batch_size: Texts in one forward at most; fewer where memory asks for it.
        progress: Show a progress bar on stderr where it takes more than a second.
        runs: What runs the measurements, as of `screen_experts`.

    Raises:
        PlanError: no direction, kind or size is left to try, or random sets break a router's limit.
        PairsError: the items have no d.
        ModelError: the model has no router that can be steered, or gives no finite d.

    Example:
        >>> pairs = steersman.load_pairs("lab:refusal/train")[:24]
        >>> ranking = steersman.detect_experts("lab:moe", None, pairs).ranking()
        >>> found = steersman.sweep_sizes(
        ...     "lab:moe", None, "lab:refusal/dev", {"toward": ranking}, sizes=[2], draws=2, limit=20
        ... )
        >>> found.changes.shape
        (3, 20)
    """
    model, tokenizer = open_named(model, tokenizer)
    refuse_steered(model, "a sweep over sizes")
    draws = whole_number("draws", draws, 0, PlanError)
    sites = [site for site in find_routers(model) if site.facts.reason is None]
    if not sites:
        raise ModelError("the model has no router that can be steered: there are no sets to try")
    routers = {site.facts.layer: site.facts for site in sites}
    sets = sized_sets(rankings, routers, sizes, kinds)
    if not sets:
        raise PlanError("no ranking has experts of these kinds for any of these sizes")
    if sizes is not None and (beyond := set(sizes) - {one.size for one in sets}):
        raise PlanError(
            f"size {min(beyond)} is more experts than any ranking has of these kinds; right is at most "
            f"{max(len(ranking) for ranking in rankings.values())}"
        )
    task = some_of(told_apart(opened_items(items, tokenizer), tokenizer), limit, seed)
    reading = preferences(task, tokenizer, whole=whole)
    require_room(reading, model)
    opened = (runs or Runs()).instrument
    with opened(model, tokenizer, sites, scope=scope, batch_size=batch_size) as tool:
        batches = tool.batches(reading)
        used = rates if rates is not None else usage(tool, batches)
        plans = [one.edits for one in sets]
        for other in _stand_ins(used, routers, sets, draws, seed):
            plans += [tuple((layer, int(other[layer][e]), s) for layer, e, s in one.edits) for one in sets]
        values = values_of_sets(tool, reading, batches, plans, progress=progress)
    changes = values[1:] - values[0]
    shape = (draws, len(sets), reading.items)
    return SizeSweep(
        tuple(sets),
        changes[: len(sets)],
        changes[len(sets) :].reshape(shape),
        values[0],
        reading.groups,
        task.name,
    )


def sized_sets(
    rankings: Mapping[Direction, Ranking],
    routers: Mapping[int, Router],
    sizes: Sequence[int] | None = None,
    kinds: Sequence[Kind] = KINDS,
) -> list[SizedSet]:
    """The sets of each direction, kind and size, as far as there are experts for them; see `sweep_sizes`."""
    kinds = tuple(dict.fromkeys(kinds))
    for kind in kinds:
        if kind not in KINDS:
            raise PlanError(f"kind {kind!r} is unknown: use {', '.join(KINDS)}")
    if unknown := [direction for direction in rankings if direction not in DIRECTIONS]:
        raise PlanError(f"direction {unknown[0]!r} is unknown: use {', '.join(DIRECTIONS)}")
    wanted = sizes_up_to(_tenth(routers)) if sizes is None else sizes
    wanted = sorted({whole_number("size", size, 1, PlanError) for size in wanted})
    found: list[SizedSet] = []
    for direction, ranking in rankings.items():
        there = {
            "activated": sum(score > 0 for *_, score in ranking),
            "deactivated": sum(score < 0 for *_, score in ranking),
            "both": len(ranking),
        }
        for kind in kinds:
            if kind == "both" and not (there["activated"] and there["deactivated"]):
                continue
            for size in wanted:
                if size <= there[kind]:
                    choice = choose(list(ranking), dict(routers), **{_ASKED[kind]: size})
                    edits = [(layer, e, s) for layer, of in choice.signs.items() for e, s in of.items()]
                    found.append(SizedSet(direction, kind, size, tuple(sorted(edits))))
    return found


def sizes_up_to(most: int) -> list[int]:
    """Powers of two below a number, and the number."""
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


def _tenth(routers: Mapping[int, Router]) -> int:
    return math.ceil(LARGEST_SHARE * sum(router.experts for router in routers.values()))


def values_of_sets(
    tool: Instrument,
    reading: Reading,
    batches: Sequence[Batch],
    plans: Sequence[Sequence[Edit]],
    *,
    progress: bool = False,
) -> Floats:
    """A reading's values unsteered, and under each plan: float64 [1 + plans, items]."""
    found = np.zeros((1 + len(plans), len(reading.texts)))
    total = len(reading.texts) * sum(map(bool, plans))
    with tqdm(total=total, desc="sets", unit=" texts", disable=not progress, delay=1, leave=False) as bar:
        for batch in batches:
            base = tool.base(batch)
            found[0, batch.texts] = base.values
            found[1:, batch.texts] = tool.sets(batch, base, plans, bar.update)
    return by_item(reading, found)


def usage(tool: Instrument, batches: Sequence[Batch]) -> dict[int, Floats]:
    """Layer → share of the steered tokens that use each of its experts, unsteered; all alike on an engine."""
    sites = list(tool.sites.values())
    if not tool.has_gradients:  # an engine does not tell what it chose
        return {site.facts.layer: np.ones(site.facts.experts) for site in sites}
    counts = {site.facts.layer: np.zeros(site.facts.experts) for site in sites}
    tokens = 0
    for batch in batches:
        held = batch.in_scope.reshape(-1)
        tokens += int(held.sum())

        def collect(number: int, ids: Any, held: Any = held) -> None:
            facts = sites[number].facts
            of_held = ids[held.to(ids.device)].reshape(-1).cpu().numpy()
            counts[facts.layer] += np.bincount(of_held, minlength=facts.experts)

        with recording(sites, collect):
            tool.base(batch)
    return {layer: of_layer / max(tokens, 1) for layer, of_layer in counts.items()}


def _stand_ins(
    rates: Mapping[int, Floats],
    routers: Mapping[int, Router],
    sets: Sequence[SizedSet],
    draws: int,
    seed: int,
) -> Iterator[Mapping[int, Any]]:
    """Draws of {layer: the expert that stands in for each}, under which all sets keep the routers' limits."""
    source, tries, found = exchanges(rates, seed), 0, 0
    while found < draws:
        exchange = next(source)
        if _keeps_limits(routers, sets, exchange):
            found += 1
            yield exchange
            continue
        tries += 1  # an exchange across the groups of a group-limited router
        if tries > TRIES:
            raise PlanError(f"{TRIES} random sets broke a router's limits: no random control")


def _keeps_limits(
    routers: Mapping[int, Router], sets: Sequence[SizedSet], exchange: Mapping[int, Any]
) -> bool:
    return not any(
        broken_limit(routers[layer], {int(exchange[layer][expert]): s for expert, s in experts.items()})
        for one in sets
        for layer, experts in one.strengths.items()
    )


def _as_far(found: float, drawn: Floats) -> int:
    """Draws that go as far, up to rounding."""
    return int((drawn >= found - MEASURED * max(abs(found), 1.0)).sum())


def _verdict(low: float, high: float, sign: float, control: Control) -> Verdict:
    """What goes the other way than it was chosen for is not shown by that."""
    low, high = (low, high) if sign > 0 else (-high, -low)
    return verdict(low, high, controls=[control]) if low > 0 else CANNOT_TELL


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
