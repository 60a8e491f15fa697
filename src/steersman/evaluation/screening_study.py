"""Studies of screening: what the sets of a screen do on test items, beside the risk difference's own best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.choice import GRID, Choice, both_ways, candidates, settle
from steersman.evaluation.comparison import BASE, REVERSED, TOWARD, Comparison, compare
from steersman.evaluation.controls import effect, effects, random_plans
from steersman.evaluation.screening.screen import screen_experts
from steersman.evaluation.statistics import RandomControl, random_control
from steersman.evaluation.study import plan_json
from steersman.evaluation.tasks import Task, load_task
from steersman.experts.counting import detect_experts
from steersman.pairs import load_pairs

if TYPE_CHECKING:
    from steersman.experts.causal import CausalScreen
    from steersman.experts.contrast import RoutingContrast
    from steersman.steering import Steering

OBSERVED, OBSERVED_REVERSED = "risk difference toward", "risk difference reversed"
DEV_ITEMS = 100


@dataclass(frozen=True)
class Question:
    """What is screened for: the task, contrast pairs for the risk difference, and the tasks to measure on.

    Names are the lab's, without their splits; `measured` begins with the task itself.
    """

    task: str
    keep: tuple[str, ...]
    measured: tuple[str, ...]


FAITHFULNESS = Question(
    "faithfulness",
    ("ordinary", "closed-book", "refusal"),
    ("faithfulness", "conflicts", "refusal", "closed-book", "ordinary"),
)
REFUSAL = Question(
    "refusal",
    ("ordinary", "closed-book", "faithfulness"),
    ("refusal", "faithfulness", "closed-book", "ordinary"),
)


@dataclass(frozen=True)
class ScreeningStudy:
    """What was screened, and what came of it on test items; without comparisons where nothing was found."""

    model: str
    question: Question
    screen: CausalScreen
    choice: Choice | None
    comparisons: Mapping[str, Comparison]
    control: RandomControl | None

    def difference(self, task: str, arm: str) -> Any:
        """The paired difference of an arm against the base on a task."""
        return self.comparisons[task].differences[arm]

    def to_json(self) -> dict[str, Any]:
        plans = {
            direction: plan_json(self.screen.select(reverse=direction == "reversed"))
            for direction, chosen in self.screen.sets.items()
            if self.screen.found and chosen.picks
        }
        return {
            "model": self.model,
            "task": self.question.task,
            "found": self.screen.found,
            "reason": self.screen.reason,
            "sets": {direction: chosen.to_json() for direction, chosen in self.screen.sets.items()},
            "plans": plans,
            "risk_difference": None if self.choice is None else self.choice.to_json(),
            "agreement_with_risk_difference": self.screen.agreement(),
            "comparisons": {name: found.to_json() for name, found in self.comparisons.items()},
            "random_control": None if self.control is None else self.control.to_json(),
        }


def run_screening_study(
    subject: Subject,
    question: Question,
    *,
    model: str,
    items: int = 300,
    draws: int = 199,
    control_items: int = 100,
    advance: Callable[[str], object] = lambda _: None,
    **options: Any,
) -> ScreeningStudy:
    """Screen on train, settle the risk difference's number of experts on dev, measure both on test.

    Args:
        items: Test items of each task.
        draws: Random plans with the set's number of experts, signs and layers; compared on `control_items`.
        advance: Called with what was done.
        options: Of `screen_experts`.
    """
    contrast = detect_experts(
        subject.model, subject.tokenizer, load_pairs(f"lab:{question.task}/train"), batch_size=64
    )
    screen = screen_experts(
        subject.model,
        subject.tokenizer,
        f"lab:{question.task}/train",
        keep=[f"lab:{name}/train" for name in question.keep],
        contrast=contrast,
        batch_size=subject.batch_size,
        **options,
    )
    advance(f"{model}: screened for {question.task}: {screen.reason}")
    chosen = {name: screen.sets[name] for name in ("toward", "reversed")}
    if not screen.found or not all(found.picks for found in chosen.values()):
        return ScreeningStudy(model, question, screen, None, {}, None)
    toward, reverse = screen.select(), screen.select(reverse=True)
    choice = _settled(subject, question, contrast)
    observed = both_ways(contrast, choice.count)
    arms = [
        Arm(name, plan)
        for name, plan in zip(
            (TOWARD, REVERSED, OBSERVED, OBSERVED_REVERSED), (toward, reverse, *observed), strict=True
        )
    ]
    comparisons: dict[str, Comparison] = {}
    for name in question.measured:
        comparisons[name] = compare(subject, load_task(f"lab:{name}/test", limit=items), arms)
        advance(f"{model}: {question.task} measured on {name}")
    task = load_task(f"lab:{question.task}/test", limit=control_items)
    control = _control(subject, contrast, task, toward, reverse, draws)
    advance(f"{model}: {question.task}: random p = {control.p:.3f}")
    return ScreeningStudy(model, question, screen, choice, comparisons, control)


def _settled(subject: Subject, question: Question, contrast: RoutingContrast) -> Choice:
    task, ordinary = (load_task(f"lab:{name}/dev", limit=DEV_ITEMS) for name in (question.task, "ordinary"))
    return settle([candidates(subject, contrast, task, ordinary, grid=GRID)])


def _control(
    subject: Subject,
    contrast: RoutingContrast,
    task: Task,
    toward: Steering,
    reverse: Steering,
    draws: int,
) -> RandomControl:
    forks = subject.forks(task)
    plans = random_plans(contrast, toward, reverse, draws=draws)
    return random_control(effect(subject, forks, toward, reverse), effects(subject, forks, plans))


def in_markdown(studies: Sequence[ScreeningStudy]) -> str:
    """A table: rows are tasks of studies, columns the arms' rates and their differences with intervals."""
    lines = [
        "| model | screened for | measured on | base | screen toward | screen reversed | risk difference "
        "toward | … reversed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for study in studies:
        if not study.comparisons:
            lines.append(f"| {study.model} | {study.question.task} | nothing found | | | | | |")
        for name, found in study.comparisons.items():
            cells = [f"{d.difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in found.differences.values()]
            base = f"{found.rate(BASE):.3f}"
            lines.append(f"| {study.model} | {study.question.task} | {name} | {base} | {' | '.join(cells)} |")
    return "\n".join(lines)
