"""lab:natural, where nothing was planted, on five training seeds: screened sets beat random ones both ways.

The figures are written as JSON to the file that STEERSMAN_NATURAL_FIGURES names, if it names one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from steersman import lab
from steersman.errors import PlanError
from steersman.evaluation.arms import Arm, ArmResult, Subject
from steersman.evaluation.controls import random_plans
from steersman.evaluation.screening.screen import screen_experts
from steersman.evaluation.statistics import paired_difference
from steersman.evaluation.tasks import Task, load_task
from steersman.experts.contrast import RoutingContrast
from steersman.experts.counting import detect_experts
from steersman.lab.numbers_world import STYLES
from steersman.pairs import load_pairs
from steersman.steering import Steering

pytestmark = pytest.mark.long

SEEDS = tuple(int(seed) for seed in os.environ.get("STEERSMAN_NATURAL_SEEDS", "0 1 2 3 4").split())
DRAWS = 20
AT_MOST = 6
SIDES = {"digits": "positive", "words": "negative"}
WHOLE_LAYER = 64  # stand-ins are drawn from all experts of the layer

Plans = dict[str, Steering]
"""Style that is steered toward → plan."""


@dataclass(frozen=True)
class Items:
    """What is measured on: requests for numbers, judged by style and by being right, and everyday ones."""

    digits: Task
    numbers: Task
    everyday: Task

    @classmethod
    def of(cls, split: str, limit: int) -> Items:
        return cls(
            *(load_task(f"lab:{name}/{split}", limit=limit) for name in ("digits", "numbers", "everyday"))
        )

    def instructed(self, style: str) -> Items:
        """The same after a system message that asks for a style."""
        return Items(*(_instructed(task, style) for task in (self.digits, self.numbers, self.everyday)))


def _instructed(task: Task, style: str) -> Task:
    told = {"role": "system", "content": STYLES[style]}
    return Task(task.name, (replace(item, content=[told, *item.content]) for item in task), task.behaviour)


class Seed:
    """What is measured on the model of one training seed."""

    def __init__(self, seed: int) -> None:
        model, tokenizer = lab.load("natural", seed, progress=True)
        self.subject = Subject(model, tokenizer, batch_size=100, max_new_tokens=12)
        # A number's style is in its first word: three words tell it, and cost a quarter of twelve.
        self.brief = Subject(model, tokenizer, batch_size=100, max_new_tokens=3)
        self.contrast = detect_experts(model, tokenizer, load_pairs("lab:digits/train"), batch_size=64)
        self.test, self.dev = Items.of("test", 420), Items.of("dev", 120)
        self.base = self.brief.run(self.test.digits, Arm("base", None))

    def figures(self) -> dict[str, Any]:
        count, observed = self.best_count()
        screened = self.screened()
        harmless = self.plans_of(screened)
        plain = {style: screened.select(activate=AT_MOST, reverse=style == "words") for style in SIDES}
        return {
            "base": self.arm(None, self.test),
            "screened, harm-aware": self.both(harmless),
            "screened, the six largest": self.both(plain),
            "risk difference": {"experts": count, **self.both(observed)},
            "prompt": {style: self.arm(None, self.test.instructed(style), style) for style in SIDES},
            "random": self.random(harmless),
            "agreement": screened.agreement(),
        }

    def screened(self) -> Any:
        return screen_experts(
            self.subject.model,
            self.subject.tokenizer,
            "lab:digits/train",
            keep=["lab:everyday/train"],
            contrast=self.contrast,
            signs="activate",
            at_most=AT_MOST,
            limit=800,
            # A few sums are fragile, so that few gains are certain; what is chosen is measured on test.
            least_t=1,
        )

    def plans_of(self, screen: Any) -> Plans:
        return {style: screen.select(reverse=style == "words") for style in SIDES}

    def best_count(self) -> tuple[str, Plans]:
        """The risk difference's own best: the largest gap between the directions on dev, among numbers of
        experts that keep nine tenths of the right everyday answers.
        """
        right = self.everyday_right(None, self.dev)
        found: list[tuple[bool, float, str, Plans]] = []
        for kind in ("activate", "top"):
            for count in (1, 2, 4, 6, 8, 12, 16):
                plans = _selected(self.contrast, kind, count)
                if plans is None:
                    continue
                toward, away = (self.brief.run(self.dev.digits, Arm("", plan)) for plan in plans.values())
                kept = min(self.everyday_right(plan, self.dev) for plan in plans.values()) >= 0.9 * right
                found.append(
                    (kept, _rate(toward, "digits") - _rate(away, "digits"), f"{kind} {count}", plans)
                )
        *_, name, plans = max(found, key=lambda entry: entry[:2])
        return name, plans

    def both(self, plans: Plans) -> dict[str, Any]:
        return {style: self.arm(plan, self.test, style) for style, plan in plans.items()}

    def arm(self, plan: Steering | None, items: Items, style: str | None = None) -> dict[str, Any]:
        """Rates of each style (right or wrong, and right), of right everyday answers, and what changed."""
        run = self.brief.run(items.digits, Arm("", plan))
        texts = self.subject.generate(items.numbers, plan)
        right = items.numbers.judge(texts)
        found: dict[str, Any] = {
            "rate": {name: run.rates[side].to_json() for name, side in SIDES.items()},
            "right": {name: right.count(side) / len(right) for name, side in SIDES.items()},
            "everyday": self.everyday_right(plan, items),
            "experts": 0
            if plan is None
            else sum(len(e) for edit in plan.edits for e in edit.strengths.values()),
        }
        if style is not None:
            side = SIDES[style]
            change = paired_difference(self.base.on(side), run.on(side), items.digits.groups)
            found["change"] = change.to_json()
        return found

    def random(self, plans: Plans) -> dict[str, list[float]]:
        """Rates under plans with other experts of the same layers, as many, with the same sign."""
        drawn = random_plans(self.contrast, *plans.values(), draws=DRAWS, seed=0, bin_size=WHOLE_LAYER)
        return {
            "digits": [self.rate(plan.toward, "digits") for plan in drawn],
            "words": [self.rate(plan.reverse, "words") for plan in drawn],
        }

    def rate(self, plan: Steering, style: str) -> float:
        return _rate(self.brief.run(self.test.digits, Arm("", plan)), style)

    def everyday_right(self, plan: Steering | None, items: Items) -> float:
        return self.subject.run(items.everyday, Arm("", plan)).rates["positive"].rate


def _rate(result: ArmResult, style: str) -> float:
    return result.rates[SIDES[style]].rate


def _selected(contrast: RoutingContrast, kind: str, count: int) -> Plans | None:
    try:
        return {style: contrast.select(**{kind: count}, reverse=style == "words") for style in SIDES}
    except PlanError:  # fewer experts than asked for go that way
        return None


@pytest.fixture(scope="module")
def by_seed() -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for seed in SEEDS:
        found[seed] = Seed(seed).figures()
        print(seed, json.dumps(found[seed]), flush=True)
        if out := os.environ.get("STEERSMAN_NATURAL_FIGURES"):
            Path(out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def beats_random(figures: dict[str, Any], style: str) -> bool:
    return figures["screened, harm-aware"][style]["rate"][style]["rate"] > max(figures["random"][style])


def test_on_four_of_five_seeds_screened_sets_beat_all_random_ones_both_ways(
    by_seed: dict[int, dict[str, Any]],
) -> None:
    beaten = [seed for seed, found in by_seed.items() if all(beats_random(found, style) for style in SIDES)]
    assert len(beaten) >= 0.8 * len(SEEDS), beaten
    assert all(len(found["random"][style]) == DRAWS for found in by_seed.values() for style in SIDES)


@pytest.mark.parametrize("seed", SEEDS)
def test_everyday_answers_stay_right_with_six_experts_or_fewer(
    by_seed: dict[int, dict[str, Any]], seed: int
) -> None:
    found = by_seed[seed]
    for arm in found["screened, harm-aware"].values():
        assert arm["everyday"] >= found["base"]["everyday"] - 0.05
        assert 1 <= arm["experts"] <= AT_MOST


@pytest.mark.parametrize("seed", SEEDS)
def test_more_right_answers_come_in_the_style_that_is_steered_toward(
    by_seed: dict[int, dict[str, Any]], seed: int
) -> None:
    found = by_seed[seed]
    for style, arm in found["screened, harm-aware"].items():
        assert arm["change"]["low"] > 0
        assert arm["right"][style] > found["base"]["right"][style]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_model_is_able_and_an_instruction_decides(by_seed: dict[int, dict[str, Any]], seed: int) -> None:
    base = by_seed[seed]["base"]
    assert 0.3 <= base["rate"]["digits"]["rate"] <= 0.7
    assert base["everyday"] >= 0.85
    assert sum(base["right"].values()) >= 0.8
    for style, arm in by_seed[seed]["prompt"].items():
        assert arm["rate"][style]["rate"] >= 0.9
