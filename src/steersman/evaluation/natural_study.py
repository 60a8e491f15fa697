"""A study where nothing was planted: experts found by screening, beside risk difference and prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steersman.evaluation.evaluate import evaluate
from steersman.evaluation.screening.screen import screen_experts
from steersman.evaluation.tasks import load_task
from steersman.experts.counting import detect_experts
from steersman.lab.numbers_world import STYLES
from steersman.pairs import load_pairs

if TYPE_CHECKING:
    from steersman.evaluation.arms import Subject
    from steersman.evaluation.result import Evaluation
    from steersman.experts.causal import CausalScreen
    from steersman.steering import Steering

SCREENED, OBSERVED = "screened", "risk difference"
EFFECT, SIDE = "lab:digits/test", "lab:everyday/test"
AT_MOST = 6
SCREEN_ITEMS = 400
NEW_TOKENS = 12
STEPS = 25
"""Steps that one study counts for on a bar."""


@dataclass(frozen=True)
class NaturalStudy:
    """Screened plans and those of the risk difference, in both directions, with the prompt beside them."""

    model: str
    screen: CausalScreen
    plans: Mapping[str, Steering]
    """Those toward digits; the reversed arms are in the evaluation. None is screened where none was found."""
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        told = self.evaluation.to_json()
        for task in told["tasks"]:
            task["shown"] = []
        return {
            "model": self.model,
            "found": self.screen.found,
            "reason": self.screen.reason,
            "sets": {direction: chosen.to_json() for direction, chosen in self.screen.sets.items()},
            "plans": {name: plan.fingerprint for name, plan in self.plans.items()},
            "evaluation": told,
        }


def run_natural_study(
    subject: Subject,
    *,
    model: str,
    items: int,
    draws: int,
    control_items: int | None,
    seed: int,
    advance: Callable[[str, int], object] = lambda *_: None,
) -> NaturalStudy:
    """Find the experts that cause digits or words in `lab:natural`, and measure what they do.

    Experts are activated, at most six a direction, chosen so that right ordinary answers stay; the risk
    difference gets as many. Train and test items share no prompt.
    """
    contrast = detect_experts(subject.model, subject.tokenizer, load_pairs("lab:digits/train"), batch_size=64)
    advance("experts counted", 3)
    screen = screen_experts(
        subject.model,
        subject.tokenizer,
        "lab:digits/train",
        keep=["lab:everyday/train"],
        contrast=contrast,
        signs="activate",
        at_most=AT_MOST,
        limit=SCREEN_ITEMS,
        seed=seed,
    )
    advance("experts screened", 10)
    plans, backs = (
        {**_chosen(screen, reverse), OBSERVED: contrast.select(activate=AT_MOST, reverse=reverse)}
        for reverse in (False, True)
    )
    found = evaluate(
        subject.model,
        subject.tokenizer,
        plans,
        task=load_task(EFFECT, limit=items),
        side_tasks=load_task(SIDE, limit=items),
        reverse=backs,
        instruction=STYLES["digits"],
        random=draws,
        control_items=items if control_items is None else max(control_items, 2),
        batch_size=subject.batch_size,
        max_new_tokens=NEW_TOKENS,
        seed=seed,
        contrast=contrast,
        screen=screen,
        model_name=model,
    )
    advance("measured", STEPS - 13)
    return NaturalStudy(model, screen, plans, found)


def _chosen(screen: CausalScreen, reverse: bool) -> dict[str, Steering]:
    """The screened plan of a direction; none where neither direction, or only one, has one."""
    if not all(chosen.picks for chosen in screen.sets.values()):
        return {}
    return {SCREENED: screen.select(reverse=reverse)}
