"""Studies on the lab: where models, pairs, texts and tasks come from, and what is known of the planting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steersman import lab
from steersman.certainty import LEAST_CONTROLS
from steersman.evaluation.arms import ArmResult, Subject
from steersman.evaluation.choice import GRID, Candidate, Choice, both_ways, candidates, settle
from steersman.evaluation.levers_study import LeversStudy, run_levers_study
from steersman.evaluation.natural_study import NaturalStudy, run_natural_study
from steersman.evaluation.study import Planting, Study, run_study
from steersman.evaluation.tasks import load_task
from steersman.evaluation.transplant_study import (
    Tasks,
    TransplantStudy,
    choose_dose,
    plan_at,
    prepare,
    run_transplant_study,
    steps_of,
    sweep,
)
from steersman.experts.counting import detect_experts
from steersman.pairs import load_pairs
from steersman.texts import load_texts

if TYPE_CHECKING:
    from steersman.experts.contrast import RoutingContrast

DEV_ITEMS = 100
ANSWER_TOKENS = 12
BATCH_SIZE = 150

PLANTED_SIDES = {"refusal": ("refuse", "comply"), "faithfulness": ("document", "memory")}
"""Behaviour → the planted labels of its positive and its negative side."""

Advance = Callable[[str, int], object]
"""Called with what has been done and how many steps it counts for."""


@dataclass(frozen=True)
class Plot:
    """What a study is about: a model of the lab, a behaviour, and the tasks that steering it may harm."""

    model: str
    behaviour: str
    costs: tuple[str, ...]


@dataclass(frozen=True)
class Passage:
    """What a transplantation is about: a concept, by its pairs and its task, from one model to another."""

    source: str
    target: str
    concept: str


class Laboratory:
    """Runs studies on models of one training seed; each is opened once, and run unsteered once a task."""

    DETECT_STEPS = 4
    CHOOSE_STEPS = 12
    MEASURE_STEPS = 10
    LEVERS_STEPS = 40

    def __init__(
        self,
        *,
        items: int,
        draws: int,
        control_items: int | None = None,
        seed: int = 0,
        model_seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.items = items
        self.control_items = control_items
        self.draws = draws
        self.seed = seed
        self.model_seed = model_seed
        self.progress = progress
        self._subjects: dict[str, Subject] = {}
        self._bases: dict[str, dict[str, ArmResult]] = {}

    @property
    def transplant_steps(self) -> int:
        """Steps that one transplantation counts for."""
        return steps_of(self.draws)

    @property
    def steps(self) -> int:
        """Steps that one study counts for."""
        return self.DETECT_STEPS + self.CHOOSE_STEPS + self.MEASURE_STEPS + self.draws

    def study(self, plot: Plot, advance: Advance, choice: Choice | None = None) -> Study:
        """Detect, choose the number of experts (unless `choice` is given), measure on test items."""
        contrast = self.detect(plot)
        advance("experts found", self.DETECT_STEPS)
        if choice is None:
            choice = settle([self.candidates(plot, contrast)])
        advance("number of experts chosen", self.CHOOSE_STEPS)
        tasks = [load_task(f"lab:{name}/test", limit=self.items) for name in (plot.behaviour, *plot.costs)]
        found = run_study(
            self.subject(plot.model),
            contrast,
            choice,
            tasks[0],
            tasks[1:],
            model=self._name(plot.model),
            planting=planting(plot),
            draws=self.draws,
            seed=self.seed,
            control_items=self.control_items,
            bases=self._bases.setdefault(plot.model, {}),
            advance=lambda steps: advance("random plans", steps),
        )
        advance("measured", self.MEASURE_STEPS)
        return found

    def transplant(self, passage: Passage, advance: Advance) -> TransplantStudy:
        """Refine, map, check, choose the strength on development items, measure on test items."""
        source, target = self.subject(passage.source), self.subject(passage.target)
        return run_transplant_study(
            source,
            target,
            load_pairs(f"lab:{passage.concept}/train"),
            load_pairs(f"lab:{passage.concept}/dev"),
            load_texts("lab:texts"),
            self._tasks(passage.concept),
            names=(self._name(passage.source), self._name(passage.target)),
            draws=self.draws,
            seed=self.seed,
            control_items=self.control_items,
            advance=advance,
        )

    def levers(self, plot: Plot, passage: Passage, items: int, advance: Advance) -> LeversStudy:
        """One plan for one model: experts of a behaviour's negative side, and a vector; each part chosen on
        development items.
        """
        target = self.subject(plot.model)
        contrast = self.detect(plot)
        _, experts = both_ways(contrast, settle([self.candidates(plot, contrast)]).count)
        advance("experts chosen", self.LEVERS_STEPS // 2)
        pairs, dev_pairs = (load_pairs(f"lab:{passage.concept}/{split}") for split in ("train", "dev"))
        found = prepare(self.subject(passage.source), target, pairs, dev_pairs, load_texts("lab:texts"))
        tasks = self._tasks(passage.concept)
        choice = choose_dose(sweep(target, *found, tasks.dev, tasks.ordinary_dev))
        study = run_levers_study(
            target,
            experts,
            plan_at(*found, choice.dose, layer=choice.layer),
            load_task(f"lab:{plot.behaviour}/test", limit=items),
            tasks.test[:items],
            tasks.ordinary_test[:items],
            model=self._name(plot.model),
            draws=min(self.draws, LEAST_CONTROLS),
            seed=self.seed,
            control_items=self.control_items,
        )
        advance("both levers measured", self.LEVERS_STEPS - self.LEVERS_STEPS // 2)
        return study

    def natural(self, name: str, items: int, draws: int, advance: Advance) -> NaturalStudy:
        """Screen and measure a model in which nothing was planted."""
        return run_natural_study(
            self.subject(name),
            model=self._name(name),
            items=items,
            draws=draws,
            control_items=self.control_items,
            seed=self.seed,
            advance=advance,
        )

    def _tasks(self, concept: str) -> Tasks:
        dev, test = DEV_ITEMS, self.items
        return Tasks(
            load_task(f"lab:{concept}/dev", limit=dev),
            load_task("lab:ordinary/dev", limit=dev),
            load_task(f"lab:{concept}/test", limit=test),
            load_task("lab:ordinary/test", limit=test),
        )

    def detect(self, plot: Plot) -> RoutingContrast:
        """The contrast over the training split's pairs."""
        subject = self.subject(plot.model)
        pairs = load_pairs(f"lab:{plot.behaviour}/train")
        return detect_experts(subject.model, subject.tokenizer, pairs, batch_size=64)

    def candidates(self, plot: Plot, contrast: RoutingContrast) -> tuple[Candidate, ...]:
        """Effect and cost of each number of experts, on the development split."""
        task, ordinary = (
            load_task(f"lab:{name}/dev", limit=DEV_ITEMS) for name in (plot.behaviour, "ordinary")
        )
        return candidates(self.subject(plot.model), contrast, task, ordinary, grid=GRID)

    def subject(self, model: str) -> Subject:
        """The opened model."""
        if model not in self._subjects:
            opened, tokenizer = lab.load(model, seed=self.model_seed, progress=self.progress)
            self._subjects[model] = Subject(
                opened, tokenizer, batch_size=BATCH_SIZE, max_new_tokens=ANSWER_TOKENS
            )
        return self._subjects[model]

    def _name(self, model: str) -> str:
        return f"lab:{model}" + (f"@{self.model_seed}" if self.model_seed else "")


def planting(plot: Plot) -> Planting:
    """+1 for every expert planted for the behaviour's positive side, −1 for its negative side."""
    positive, negative = PLANTED_SIDES[plot.behaviour]
    signs = {positive: 1, negative: -1}
    return {
        layer: {expert: signs[label] for expert, label in experts.items() if label in signs}
        for layer, experts in lab.planted(plot.model).items()
    }
