"""What tuning chooses between: layers and doses of vectors, kinds and numbers of experts; and the controls
that go through the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from steersman.concepts.dose import Strength, residual_edits
from steersman.concepts.dose import doses as doses_of
from steersman.edits import ExpertEdit, Scope
from steersman.errors import PlanError
from steersman.evaluation.controls import BIN_SIZE, TRIES, exchanges
from steersman.evaluation.screening.exact import Floats
from steersman.evaluation.screening.sizes import KINDS, LARGEST_SHARE, Kind, Ranking, sizes_up_to
from steersman.experts.selection import choose
from steersman.showing import count_of, ranges
from steersman.steering import Architecture, Steering

if TYPE_CHECKING:
    from torch import Tensor

    from steersman.concepts.norms import NormHistogram

DOSES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
"""Of the coarse grid: below, little moved in the models that were looked at; at 1 their text broke."""
COARSE_LAYERS = 12
WIDTHS = (3, 5)
"""Layers of windows around the best one, over which its dose is split evenly."""


class Candidate(Protocol):
    """One way to steer."""

    @property
    def order(self) -> tuple[Any, ...]:
        """Breaks ties: what steers less comes first."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Its settings as plain values."""
        ...

    def in_words(self) -> str:
        """The same in words."""
        ...


class Lever(Protocol):
    """A family of candidates, and of controls for it."""

    @property
    def name(self) -> str:
        """What it is, in words."""
        ...

    def coarse(self) -> list[Candidate]:
        """The first grid."""
        ...

    def fine(self, best: Candidate) -> list[Candidate]:
        """Candidates around one of them."""
        ...

    def reduced(self) -> Lever:
        """The same with a smaller first grid, for effects that must be generated and judged."""
        ...

    def kin(self, candidate: Candidate, count: int) -> Any:
        """Which of so many parts of the lever a candidate is of, by which finalists are unlike each other."""
        ...

    def plan(self, candidate: Candidate) -> Steering:
        """The plan of a candidate. Raises PlanError where it cannot be had."""
        ...

    def controls(self, count: int, seed: int) -> list[Lever]:
        """Random counterparts, with nothing of the behaviour. Raises PlanError where there are fewer."""
        ...


@dataclass(frozen=True)
class VectorCandidate:
    """A concept's vectors at contiguous layers; `dose` is their sum, which the layers share evenly, below 0
    to steer away.
    """

    concept: str
    layers: tuple[int, ...]
    dose: float
    scope: Scope

    @property
    def order(self) -> tuple[Any, ...]:
        return abs(self.dose), len(self.layers), self.layers, self.concept, self.scope, self.dose

    def to_json(self) -> dict[str, Any]:
        return {
            "concept": self.concept,
            "layers": list(self.layers),
            "dose": self.dose,
            "scope": self.scope,
        }

    def in_words(self) -> str:
        named = f"{self.concept}, " if self.concept else ""
        noun = "layer" if len(self.layers) == 1 else "layers"
        return f"{named}{noun} {ranges(self.layers)}, dose {self.dose:.3g}, scope {self.scope}"


@dataclass(frozen=True)
class Vectors:
    """Concept vectors of one model.

    Attributes:
        vectors: Concept → {layer: direction [width]}.
        norms: {layer: norms of states in scope}, for doses.
        shuffled: Concept → label-shuffled ones, each {layer: direction}: the controls.
        reverse: Whether to steer away from the concept; None: either way, as a control may.
        made_of: What plans say of where they come from, by concept.
    """

    vectors: Mapping[str, Mapping[int, Tensor]]
    norms: Mapping[int, NormHistogram]
    shuffled: Mapping[str, Sequence[Mapping[int, Tensor]]]
    architecture: Architecture
    weights_id: str
    model: str = ""
    revision: str | None = None
    scopes: tuple[Scope, ...] = ("answer",)
    doses: tuple[float, ...] = DOSES
    coarse_layers: int = COARSE_LAYERS
    reverse: bool | None = False
    made_of: Mapping[str, Any] | None = None
    number: int | None = None

    @property
    def name(self) -> str:
        if self.number is not None:
            return f"label-shuffled {self.number}"
        return ", ".join(name for name in self.vectors if name) or "concept"

    @property
    def layers(self) -> list[int]:
        """The layers offered, ascending."""
        return sorted(set().union(*self.vectors.values()))

    def coarse(self) -> list[Candidate]:
        layers = self.layers
        places = np.linspace(0, len(layers) - 1, min(self.coarse_layers, len(layers))).round().astype(int)
        return self._grid([(layers[place],) for place in sorted({*places.tolist()})], self.doses)

    def fine(self, best: Candidate) -> list[Candidate]:
        """Every layer up to the coarse grid's next, windows around the best, and doses in between."""
        if not isinstance(best, VectorCandidate):
            return []
        layers, middle = self.layers, best.layers[len(best.layers) // 2]
        at = layers.index(middle)
        reach = math.ceil((len(layers) - 1) / max(1, min(self.coarse_layers, len(layers)) - 1)) - 1
        near = [(layer,) for layer in layers[max(0, at - reach) : at + reach + 1]]
        around = (range(middle - width // 2, middle + width // 2 + 1) for width in WIDTHS)
        windows = [tuple(window) for window in around if {*window} <= {*layers}]
        size = abs(best.dose)
        below = max((dose for dose in self.doses if dose < size - 1e-9), default=size / 2)
        above = min((dose for dose in self.doses if dose > size + 1e-9), default=size * 1.5)
        less, more = _short(math.sqrt(below * size)), _short(math.sqrt(size * above))
        alone = self.only(best)
        wider = (less, size, more, _short(1.5 * size), _short(2 * size))
        return alone._grid(near, wider[:3]) + alone._grid(windows, wider)

    def reduced(self) -> Vectors:
        """A third of the layers, and of the library's own doses every second; others stay as asked for."""
        doses = DOSES[1::2] if self.doses == DOSES else self.doses
        return replace(self, coarse_layers=max(2, self.coarse_layers // 3), doses=doses)

    def kin(self, candidate: Candidate, count: int) -> Any:
        """Which of so many stretches of the layers its middle layer is in."""
        if not isinstance(candidate, VectorCandidate):
            return None
        return self.layers.index(candidate.layers[len(candidate.layers) // 2]) * count // len(self.layers)

    def only(self, best: VectorCandidate) -> Vectors:
        """The same lever, of a candidate's concept, scope and direction alone."""
        return replace(
            self,
            vectors={best.concept: self.vectors[best.concept]},
            scopes=(best.scope,),
            reverse=best.dose < 0,
        )

    def _grid(self, windows: Sequence[tuple[int, ...]], doses: Sequence[float]) -> list[Candidate]:
        signs = (1.0, -1.0) if self.reverse is None else (-1.0,) if self.reverse else (1.0,)
        return [
            VectorCandidate(concept, layers, sign * dose, scope)
            for concept, of_concept in self.vectors.items()
            for layers in windows
            if all(layer in of_concept for layer in layers)
            for scope in dict.fromkeys(self.scopes)
            for dose in dict.fromkeys(doses)
            for sign in signs
        ]

    def plan(self, candidate: Candidate) -> Steering:
        if not isinstance(candidate, VectorCandidate):
            raise PlanError(f"{candidate.in_words()}: vectors are steered by layer and dose")
        chosen = {layer: self.vectors[candidate.concept][layer] for layer in candidate.layers}
        dial = Strength(candidate.dose / len(candidate.layers), is_dose=True)
        edits = residual_edits(chosen, dial, self.norms, candidate.scope, "add")
        return Steering(
            edits=edits,
            architecture=self.architecture,
            weights_id=self.weights_id,
            model=self.model,
            revision=self.revision,
            provenance={
                "made": "tuning",
                "strength": str(dial),
                "doses": doses_of(edits, self.norms),
                **(self.made_of or {}).get(candidate.concept, {}),
            },
        )

    def controls(self, count: int, seed: int) -> list[Lever]:
        """The first of the concepts' label-shuffled ones, each of which may steer either way."""
        fewest = min((len(some) for some in self.shuffled.values()), default=0)
        if fewest < count:
            raise PlanError(
                f"{self.name}: keeps {count_of(fewest, 'label-shuffled concept')}, and {count} controls are "
                "asked for; ask for at most those (--controls), or refine it again, of more groups"
            )
        return [
            replace(
                self,
                vectors={name: of_concept[number] for name, of_concept in self.shuffled.items()},
                shuffled={},
                reverse=None,
                made_of=None,
                number=number + 1,
            )
            for number in range(count)
        ]


def _short(dose: float) -> float:
    """Three digits of it: what a person would type."""
    return float(f"{dose:.3g}")


@dataclass(frozen=True)
class ExpertCandidate:
    """The first so many experts of a ranking that are activated, deactivated, or either."""

    kind: Kind
    count: int
    scope: Scope

    @property
    def order(self) -> tuple[Any, ...]:
        return self.count, KINDS.index(self.kind), self.scope

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "experts": self.count, "scope": self.scope}

    def in_words(self) -> str:
        kind = "activated or deactivated" if self.kind == "both" else self.kind
        return f"{count_of(self.count, 'expert')} {kind}, scope {self.scope}"


@dataclass(frozen=True)
class Experts:
    """Experts of one model in the order in which they are taken.

    Attributes:
        ranking: (layer, expert, score), best first.
        rates: {layer: share of tokens that use each expert}: experts of like use stand in for each other in
            controls; None: any of the layer.
        number: Of a control, which one it is.
        sparse: Whether the first grid has every second size alone.
    """

    ranking: Ranking
    architecture: Architecture
    weights_id: str
    model: str = ""
    revision: str | None = None
    scopes: tuple[Scope, ...] = ("all",)
    made_of: Mapping[str, Any] | None = None
    rates: Mapping[int, Floats] | None = None
    number: int | None = None
    sparse: bool = False

    @property
    def name(self) -> str:
        return "experts" if self.number is None else f"random experts {self.number}"

    @property
    def largest(self) -> int:
        """The most experts that a candidate has: a tenth of all, rounded up."""
        return math.ceil(
            LARGEST_SHARE * sum(router.experts for router in self.architecture.routers if router.steerable)
        )

    def coarse(self) -> list[Candidate]:
        return self._grid(sizes_up_to(self.largest)[:: 2 if self.sparse else 1])

    def reduced(self) -> Experts:
        """Every second size."""
        return replace(self, sparse=True)

    def fine(self, best: Candidate) -> list[Candidate]:
        """Numbers between a power of two and the next."""
        if not isinstance(best, ExpertCandidate):
            return []
        size = best.count
        steps = {round(size * factor) for factor in (0.59, 0.71, 0.84, 1.19, 1.41, 1.68)} - {size}
        alone = replace(self, scopes=(best.scope,))
        sizes = sorted(step for step in steps if 1 <= step <= self.largest)
        return [
            one for one in alone._grid(sizes) if isinstance(one, ExpertCandidate) and one.kind == best.kind
        ]

    def kin(self, candidate: Candidate, count: int) -> Any:
        """Its kind."""
        return candidate.kind if isinstance(candidate, ExpertCandidate) else None

    def _grid(self, sizes: Sequence[int]) -> list[Candidate]:
        there = {
            "activated": sum(score > 0 for *_, score in self.ranking),
            "deactivated": sum(score < 0 for *_, score in self.ranking),
            "both": len(self.ranking),
        }
        # Where all go one way, "both" is that way once more.
        kinds = [kind for kind in KINDS if kind != "both" or min(there["activated"], there["deactivated"])]
        return [
            ExpertCandidate(kind, size, scope)
            for kind in kinds
            for size in sizes
            if size <= there[kind]
            for scope in dict.fromkeys(self.scopes)
        ]

    def plan(self, candidate: Candidate) -> Steering:
        if not isinstance(candidate, ExpertCandidate):
            raise PlanError(f"{candidate.in_words()}: experts are steered by kind and number")
        routers = {router.layer: router for router in self.architecture.routers}
        names = {"activated": "activate", "deactivated": "deactivate", "both": "top"}
        asked: dict[str, Any] = {names[candidate.kind]: candidate.count}
        choice = choose(list(self.ranking), routers, **asked)
        return Steering(
            edits=(ExpertEdit(choice.signs, candidate.scope),),
            architecture=self.architecture,
            weights_id=self.weights_id,
            model=self.model,
            revision=self.revision,
            provenance={"made": "tuning", **asked, "skipped": list(choice.skipped), **(self.made_of or {})},
        )

    def controls(self, count: int, seed: int) -> list[Lever]:
        """Rankings in which other experts of the layer, of like use, stand in for those that were found: as
        many of each layer, in the same order of layers and kinds. Raises PlanError where hardly any keeps
        the routers' limits.
        """
        sizes = {router.layer: router.experts for router in self.architecture.routers}
        rates = self.rates or {layer: np.zeros(experts) for layer, experts in sizes.items()}
        source = exchanges(rates, seed, BIN_SIZE if self.rates else max(sizes.values()))
        found: list[Lever] = []
        tries = 0
        while len(found) < count:
            other = next(source)
            ranking = [(layer, int(other[layer][expert]), score) for layer, expert, score in self.ranking]
            control = replace(self, ranking=ranking, made_of=None, number=len(found) + 1)
            if self._as_many(control):
                found.append(control)
                continue
            tries += 1  # an exchange across the groups of a group-limited router
            if tries > TRIES:
                raise PlanError(f"{TRIES} random sets of experts broke a router's limits: no control")
        return found

    def _as_many(self, control: Experts) -> bool:
        """Whether a control's first grid steers as many experts of each layer and kind."""
        return all(
            _counts(self.plan(candidate)) == _counts(control.plan(candidate)) for candidate in self.coarse()
        )


def _counts(plan: Steering) -> dict[int, list[float]]:
    return {layer: sorted(of_layer.values()) for layer, of_layer in plan.strengths.items()}
