"""Studies of transplantation: a concept of one model in another, its strength chosen on development items,
measured on test items beside its controls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steersman.concepts.dose import Strength
from steersman.concepts.fitting import fit_affine_map
from steersman.concepts.refinement import refine_concept
from steersman.concepts.transplant import plan_of
from steersman.concepts.transplant_check import check_transplant
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.comparison import Comparison, compare
from steersman.evaluation.statistics import Rate
from steersman.evaluation.tasks import Task
from steersman.evaluation.vector_controls import (
    DrawnControl,
    drawn_control,
    random_vectors,
    shuffled_vectors,
    unmapped_vector,
    with_vector,
)

if TYPE_CHECKING:
    from steersman.concepts.affine_map import AffineMap
    from steersman.concepts.concept import ConceptVector
    from steersman.concepts.transplant_check import TransplantCheck
    from steersman.pairs import ContrastPairs
    from steersman.steering import Steering
    from steersman.texts import Texts

TRANSPLANTED, UNMAPPED, OWN = "transplanted", "unmapped", "own"
DOSES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8)
EFFECT_DOSE = 0.25
LEAST_RIGHT, MOST_REFUSED = 0.95, 0.03
"""What the rule asks of ordinary development items: stricter than what the test is to show."""


@dataclass(frozen=True)
class SweepPoint:
    """One dose at one layer on development items: the behaviour's share, ordinary items right and refused."""

    dose: float
    positive: Rate
    ordinary_right: Rate
    ordinary_refused: Rate
    layer: int = 0

    @property
    def admissible(self) -> bool:
        """Whether the rule allows it."""
        return self.ordinary_right.rate >= LEAST_RIGHT and self.ordinary_refused.rate <= MOST_REFUSED

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "dose": self.dose,
            "positive": self.positive.to_json(),
            "ordinary_right": self.ordinary_right.to_json(),
            "ordinary_refused": self.ordinary_refused.to_json(),
            "admissible": self.admissible,
        }


@dataclass(frozen=True)
class DoseChoice:
    """The chosen dose and layer, all doses that were tried there, the rule in words, and what was tried at
    other layers.
    """

    dose: float
    sweep: tuple[SweepPoint, ...]
    rule: str
    layer: int = 0
    elsewhere: tuple[SweepPoint, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "dose": self.dose,
            "rule": self.rule,
            "sweep": [point.to_json() for point in self.sweep],
            "elsewhere": [point.to_json() for point in self.elsewhere],
        }


@dataclass(frozen=True)
class Tasks:
    """What is measured: the behaviour and ordinary requests, on development and on test items."""

    dev: Task
    ordinary_dev: Task
    test: Task
    ordinary_test: Task


@dataclass(frozen=True)
class TransplantStudy:
    """Everything measured of one transplantation."""

    source: str
    target: str
    concept: ConceptVector
    bridge: AffineMap
    check: TransplantCheck
    choice: DoseChoice
    plan: Steering
    effect: Comparison
    cost: Comparison
    controls: tuple[DrawnControl, ...]

    @property
    def layer(self) -> int:
        """The target layer that is edited."""
        return self.plan.edits[0].layers[0]

    def to_json(self) -> dict[str, Any]:
        of_layer = self.bridge.layer_map(self.layer)
        return {
            "source": self.source,
            "target": self.target,
            "behaviour": self.effect.task.behaviour.title,
            "concept": {"pairs": self.concept.pairs, "clusters": self.concept.clusters},
            "map": {
                "texts": self.bridge.texts,
                "rows": self.bridge.rows,
                "source_layer": of_layer.source_layer,
                "target_layer": self.layer,
                "r2": of_layer.r2,
                "r2_control": of_layer.r2_control,
            },
            "check": self.check.to_json(),
            "choice": self.choice.to_json(),
            "plan": self.plan.fingerprint,
            "effect": self.effect.to_json(),
            "cost": self.cost.to_json(),
            "ordinary_refused": {
                name: arm.rates["negative"].to_json() for name, arm in self.cost.arms.items()
            },
            "controls": {control.name: control.to_json() for control in self.controls},
        }


def prepare(
    source: Subject, target: Subject, pairs: ContrastPairs, dev_pairs: ContrastPairs, texts: Texts
) -> tuple[ConceptVector, AffineMap, TransplantCheck]:
    """Refine a concept at the source, fit the map on texts, and check on other pairs whether it carries
    over: all before anything is steered.
    """
    concept = refine_concept(source.model, source.tokenizer, pairs, batch_size=64)
    bridge = fit_affine_map(
        (source.model, source.tokenizer),
        (target.model, target.tokenizer),
        texts,
        concept=concept,
        batch_size=64,
    )
    check = check_transplant(bridge, concept, (target.model, target.tokenizer), dev_pairs, batch_size=64)
    return concept, bridge, check


def sweep(
    target: Subject,
    concept: ConceptVector,
    bridge: AffineMap,
    check: TransplantCheck,
    task: Task,
    ordinary: Task,
    doses: Sequence[float] | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> tuple[SweepPoint, ...]:
    """Measure each dose (`DOSES`, where none are given) at each layer that the gate finds as good as the
    best, on development items. `advance(1)` is called after each dose.

    Raises PlanError: the gate refuses the concept.
    """
    points = []
    for dose in doses or DOSES:
        for layer in check.as_good:
            arm = Arm(TRANSPLANTED, plan_at(concept, bridge, check, dose, layer=layer))
            shares, costs = target.run(task, arm).rates, target.run(ordinary, arm).rates
            points.append(SweepPoint(dose, shares["positive"], costs["positive"], costs["negative"], layer))
        advance(1)
    return tuple(points)


def choose_dose(points: Sequence[SweepPoint]) -> DoseChoice:
    """Of the doses and layers that keep ordinary answers, the one with the largest effect; the smaller dose
    on a tie, then the lower layer. If none keeps them, the one that keeps most.
    """
    admissible = [point for point in points if point.admissible]
    if admissible:
        best = max(admissible, key=lambda point: (point.positive.rate, -point.dose, -point.layer))
    else:
        best = max(points, key=lambda point: (point.ordinary_right.rate, -point.dose, -point.layer))
    rule = (
        f"Of the doses {', '.join(f'{dose:g}' for dose in dict.fromkeys(point.dose for point in points))}"
        f"{_at_layers(points)}: the one with the largest share on "
        f"development items, among those that answer at least {LEAST_RIGHT:.0%} of ordinary requests right "
        f"and refuse at most {MOST_REFUSED:.0%}; the smaller one on a tie. If none does, the one that "
        "answers most of them right."
    )
    there, elsewhere = (
        tuple(point for point in points if (point.layer == best.layer) == here) for here in (True, False)
    )
    return DoseChoice(best.dose, there, rule, best.layer, elsewhere)


def _at_layers(points: Sequence[SweepPoint]) -> str:
    layers = sorted({point.layer for point in points})
    return f" at layers {', '.join(map(str, layers))}, which pass alike" if len(layers) > 1 else ""


def plan_at(
    concept: ConceptVector,
    bridge: AffineMap,
    check: TransplantCheck,
    dose: float,
    *,
    layer: int | None = None,
    force: bool = False,
) -> Steering:
    """The transplanted concept at a dose, and at its default layer where none is named. Raises PlanError: the
    gate refuses it.
    """
    layers = None if layer is None else [layer]
    return plan_of(bridge, concept, Strength(dose, is_dose=True), layers, check, force=force)


def measured_effect(
    target: Subject,
    concept: ConceptVector,
    bridge: AffineMap,
    check: TransplantCheck,
    task: Task,
    dose: float = EFFECT_DOSE,
) -> float:
    """What a concept does at a dose of its best layer, in nats, comparable between concepts: half of mean d
    toward it minus mean d away from it (`Subject.preference`), whether or not the gate lets it through. What
    any push does to d, whichever way it goes, cancels.
    """
    forks = target.forks(task)
    toward, away = (
        float(target.preference(forks, plan_at(concept, bridge, check, sign * dose, force=True)).mean())
        for sign in (1, -1)
    )
    return (toward - away) / 2


def run_transplant_study(
    source: Subject,
    target: Subject,
    pairs: ContrastPairs,
    dev_pairs: ContrastPairs,
    texts: Texts,
    tasks: Tasks,
    *,
    names: tuple[str, str],
    draws: int,
    seed: int,
    control_items: int | None = None,
    advance: Callable[[str, int], object] = lambda *_: None,
) -> TransplantStudy:
    """Refine, map, check, choose a dose on development items, measure on test items beside the controls.

    Args:
        pairs: To refine the concept from; `dev_pairs` to check it with.
        names: Of source and target.
        draws: Random vectors, and as many label-shuffled concepts.
        seed: Of the random vectors.
        control_items: Ask each drawn vector the first so many test items; None: all.
        advance: Called with what has been done and how many steps it counts for (`steps_of`).

    Raises:
        PlanError: the gate refuses the concept.
    """
    concept, bridge, check = prepare(source, target, pairs, dev_pairs, texts)
    advance("concept refined and mapped", PREPARE_STEPS)
    points = sweep(
        target,
        concept,
        bridge,
        check,
        tasks.dev,
        tasks.ordinary_dev,
        advance=lambda steps: advance("strengths tried", steps),
    )
    choice = choose_dose(points)
    plan = plan_at(concept, bridge, check, choice.dose, layer=choice.layer)
    (layer,) = plan.edits[0].layers
    own = refine_concept(target.model, target.tokenizer, pairs, layers=[layer], batch_size=64)
    arms = (
        Arm(TRANSPLANTED, plan),
        Arm(UNMAPPED, with_vector(plan, unmapped_vector(bridge, concept, layer), "control: unmapped")),
        Arm(OWN, with_vector(plan, own.vectors[layer], "the target's own vector")),
    )
    effect = compare(target, tasks.test, arms)
    cost = compare(target, tasks.ordinary_test, arms)
    advance("measured", MEASURE_STEPS)
    shuffled = shuffled_vectors(bridge, concept, layer, draws)
    drawn = {
        "random": (random_vectors(bridge, layer, draws, seed), True),
        "shuffled": (shuffled, False),
        "shuffled, as long": (shuffled, True),
    }
    test, ordinary = tasks.test[:control_items], tasks.ordinary_test[: _half(control_items)]
    controls = tuple(
        drawn_control(
            target,
            plan,
            vectors,
            name,
            test,
            ordinary,
            as_long=as_long,
            advance=lambda steps: advance("controls", steps),
        )
        for name, (vectors, as_long) in drawn.items()
    )
    return TransplantStudy(*names, concept, bridge, check, choice, plan, effect, cost, controls)


PREPARE_STEPS, MEASURE_STEPS = 6, 4


def steps_of(draws: int) -> int:
    """Steps that one study counts for."""
    return PREPARE_STEPS + len(DOSES) + MEASURE_STEPS + 3 * draws


def _half(items: int | None) -> int | None:
    return None if items is None else max(1, items // 2)
