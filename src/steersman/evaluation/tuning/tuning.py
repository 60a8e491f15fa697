"""Tuning: the layer and dose, or the experts, that move a behaviour most at a cost that is bounded.

The candidates are searched on development items, beside controls that go through the same search; the one
that is chosen is looked at once on test items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from steersman.certainty import CANNOT_TELL, SHOWN, Control, Verdict, verdict
from steersman.edits import Scope, finite_number
from steersman.errors import PairsError, PlanError, check_kind, whole_number
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.judges.language import identifier
from steersman.evaluation.run_store import RunStore, key_of
from steersman.evaluation.screening.items import halves, some_of
from steersman.evaluation.statistics import RandomControl, clustered_mean, paired_difference, random_control
from steersman.evaluation.tasks import Task, load_task
from steersman.evaluation.tuning.candidates import Candidate, Lever
from steersman.evaluation.tuning.costs import (
    ANSWER_TOKENS,
    COSTS,
    EXAMPLE,
    Cost,
    CostBound,
    Kept,
    read_bounds,
)
from steersman.evaluation.tuning.effects import Answered, Effect, LogOdds, check_tokens, has_log_odds
from steersman.evaluation.tuning.levers import Tunable, lever_of
from steersman.evaluation.tuning.looks import count_look
from steersman.evaluation.tuning.plan_rows import Floats, PlanRows
from steersman.evaluation.tuning.result import Confirmed, Tuning
from steersman.evaluation.tuning.search import Searched, Tried, search
from steersman.models.attachment import refuse_steered
from steersman.models.decoding import require_repeatable
from steersman.models.loading import Named, open_named
from steersman.models.reading import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steersman.steering import Steering

TaskLike = str | Path | Task
Side = Literal["positive", "negative"]


@dataclass(frozen=True)
class Options:
    """How a tuning is made.

    Attributes:
        controls: Random counterparts that go through the same tuning.
        answer_controls: The first so many of them also answer the test items.
        finalists: Of the passing candidates the first so many answer the development items too.
        dev_items, test_items, cost_items: At most so many; None: all.
        whole_answers: Log-odds of whole answers, not of the first tokens that differ.
        answers: Whether finalists and the chosen plan answer at all.
    """

    controls: int = 19
    answer_controls: int = 19
    finalists: int = 3
    dev_items: int | None = 48
    test_items: int | None = None
    cost_items: int | None = None
    whole_answers: bool = False
    answers: bool = True
    batch_size: int = 32
    max_new_tokens: int = 32
    seed: int = 0


def tune(
    model: Named,
    tokenizer: PreTrainedTokenizerBase | None,
    what: Tunable,
    *,
    task: TaskLike,
    keep: TaskLike | Sequence[TaskLike],
    cost: str | Sequence[str] = ("kl <= 0.3",),
    test: TaskLike | None = None,
    side: Side = "positive",
    layers: Iterable[int] | None = None,
    scope: Scope | Sequence[Scope] = (),
    doses: Sequence[float] = (),
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> Tuning:
    """Find where and how hard to steer: of all candidates whose cost is kept the one that moves a task most,
    confirmed once on test items beside controls that were tuned alike.

    Vectors are tried at layers (a coarse grid, then a fine one around the best, with windows of contiguous
    layers) and doses; experts by kind (activated, deactivated, either) and number, up to a tenth of all.

    Args:
        model: A transformers model, and its tokenizer, or its name.
        what: A concept of the model (or several by name, of which the best is chosen), a map with concepts
            of its source, a routing contrast or a causal screen of the model.
        task: What is steered for: its development items choose, its test items confirm. Its own splits, where
            it has them; else halves by group. The effect is the change of the log-odds of its two sides (of
            right options against the others), where it has none of judged answers, on a reduced grid.
        keep: What steering is to leave as it is: one task, or several.
        cost: What it may cost on those: "kl <= 0.3" (nats a token), "lost <= 0.05" (share of right answers),
            "degenerate <= 0.05" (share of answers that repeat themselves or change language). The upper end
            of each one's one-sided 95 % interval, by group, must stay below.
        test: Test items, where `task` are the development ones.
        side: The side that is steered for.
        layers: Layers that are offered; all by default.
        scope: Which tokens, or several to choose from; `answer` for vectors, for experts the screen's, or
            `all`.
        doses: Of the coarse grid, as sizes; the library's own by default.
        checkpoint: A folder that keeps what is finished.
        resume: Go on from it.
        progress: Show a progress bar on stderr where it takes more than a second.
        options: As of `Options`: controls, answer_controls, finalists, dev_items, test_items, cost_items,
            whole_answers, answers, batch_size, max_new_tokens, seed.

    Returns:
        The tuning: `.steering` (None where nothing passes), `.verdict`, `.table()`, `.save(folder)`.

    Raises:
        PlanError: what cannot be tuned, a cost that cannot be read, fewer controls than asked for.
        PairsError: a task that is not known, too few items or groups for what is asked.
        ArchitectureMismatch, WeightsMismatch: what is tuned is of another model.

    Example:
        >>> pairs = steersman.load_pairs("lab:refusal/train")[:24]
        >>> concept = steersman.refine_concept("lab:source", None, pairs)
        >>> found = steersman.tune(
        ...     "lab:source", None, concept, task="lab:refusal", keep="lab:ordinary", controls=2,
        ...     dev_items=24, test_items=48, cost_items=24, answers=False, doses=(0.2, 0.4), layers=[1, 2],
        ... )
        >>> found.chosen.candidate.layers
        (...)
    """
    model, tokenizer = open_named(model, tokenizer)
    if side not in ("positive", "negative"):
        raise PlanError(f"side {side!r}: right is positive or negative")
    unknown = sorted(set(options) - {field.name for field in fields(Options)})
    if unknown:
        known = ", ".join(field.name for field in fields(Options))
        raise PlanError(f"{unknown[0]} is no option of tuning; there are {known}")
    for dose in doses:
        if finite_number(dose, "each dose") <= 0:
            raise PlanError(f"dose {dose!r}: right is a number above 0 (side says the direction)")
    lever, sources = lever_of(
        what, side=side, layers=layers, scopes=(scope,) if isinstance(scope, str) else scope, doses=doses
    )
    return tune_lever(
        model,
        tokenizer,
        lever,
        task=task,
        keep=keep,
        cost=cost,
        test=test,
        side=side,
        options=Options(**options),
        made_from=sources,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )


def tune_lever(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lever: Lever,
    *,
    task: TaskLike,
    keep: TaskLike | Sequence[TaskLike],
    cost: str | Sequence[str] = ("kl <= 0.3",),
    test: TaskLike | None = None,
    side: Side = "positive",
    options: Options | None = None,
    made_from: Sequence[Mapping[str, Any]] = (),
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Tuning:
    """Search a lever's candidates, choose one, and look at it once on test items: `tune` for any lever."""
    options = _checked(options or Options())
    bounds = read_bounds([cost] if isinstance(cost, str) else cost)
    if not bounds:
        raise PlanError(f"no cost is bounded, so that the strongest dose would win; right is {EXAMPLE}")
    if any(bound.name == "degenerate" for bound in bounds):
        identifier()
    refuse_steered(model, "tuning")
    require_repeatable(model)
    keeps = [keep] if isinstance(keep, str | Path | Task) else list(keep)
    if not keeps:
        raise PairsError(f"no task is kept (--keep), and {bounds[0]} is measured on the prompts of those")
    chats = bool(getattr(tokenizer, "chat_template", None))
    aim = _parted(task, test, options, chats)
    kept = [_parted(each, None, options, chats) for each in keeps]
    run = _Run(model, tokenizer, lever, aim, kept, bounds, side, options, made_from)
    run.open(checkpoint, resume)
    with evaluating(model):
        return run.all(progress)


class _Run:
    """One tuning."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        lever: Lever,
        aim: tuple[Task, Task],
        kept: Sequence[tuple[Task, Task]],
        bounds: Sequence[CostBound],
        side: Side,
        options: Options,
        made_from: Sequence[Mapping[str, Any]],
    ) -> None:
        self.subject = Subject(
            model, tokenizer, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
        )
        self.rows = PlanRows(model, tokenizer)
        self.aim, self.kept_tasks, self.bounds = aim, kept, tuple(bounds)
        self.sign = 1.0 if side == "positive" else -1.0
        self.side = side
        self.options = options
        self.made_from = made_from
        self.by_log_odds = all(map(has_log_odds, aim))
        self.lever = lever if self.by_log_odds else lever.reduced()
        self.controls = self.lever.controls(options.controls, options.seed)
        for half in aim:
            if self.by_log_odds:
                check_tokens(half, tokenizer)
        self.judged = options.answers and self.by_log_odds
        unsteered = self.subject.condition(Arm("base", None), seed=options.seed)
        limit = options.cost_items
        self.kept = [
            Kept([_first(tasks[half], limit, options.seed) for tasks in kept], bounds, unsteered)
            for half in (0, 1)
        ]
        self.store = RunStore(None, {}, resume=False)
        self._effects: dict[str, Effect] = {}

    def open(self, checkpoint: str | Path | None, resume: bool) -> None:
        """Where progress is kept."""
        architecture = self.lever.plan(self.lever.coarse()[0]) if self.lever.coarse() else None
        run = {
            "kind": "tuning",
            "lever": self.lever.name,
            "made_from": [dict(source) for source in self.made_from],
            "weights": None if architecture is None else architecture.weights_id,
            "candidates": [one.to_json() for one in self.lever.coarse()],
            "tasks": [half.sha256 for tasks in (self.aim, *self.kept_tasks) for half in tasks],
            "bounds": [str(bound) for bound in self.bounds],
            "side": self.side,
            "options": vars(self.options),
        }
        self.store = RunStore(None if checkpoint is None else Path(checkpoint), run, resume=resume)

    def all(self, progress: bool) -> Tuning:
        """Search, choose, confirm."""
        with tqdm(
            total=3 + len(self.controls), desc="tune", unit="search", delay=1, disable=not progress
        ) as bar:
            for half in (0, 1) if {"kl", "degenerate"} & {bound.name for bound in self.bounds} else ():
                texts = self._remember(
                    ("base", half), lambda half=half: {"texts": self.kept[half].base_texts}
                )
                self.kept[half].base_texts = texts["texts"]
            found = self._searched(self.lever, every=True)
            bar.update(1)
            if not found.passing:
                return self._result(found, None, None, ())
            chosen, finalists = self._final(found)
            bar.update(1)
            if chosen is None:
                return self._result(found, None, None, finalists)
            tuned: list[tuple[Lever, Tried | None]] = []
            for number, control in enumerate(self.controls):
                searched = self._searched(control, every=False)
                answers = number < self.options.answer_controls
                tuned.append((control, self._final(searched)[0] if answers else searched.best))
                bar.update(1)
            confirmed = self._confirmed(chosen, tuned)
            bar.update(1)
            return self._result(found, chosen, confirmed, finalists)

    # ---------------------------------------------------------------- the search

    def _searched(self, lever: Lever, *, every: bool) -> Searched:
        groups = self._effect(0).task.groups
        return search(lever, self._changes, self._costs, groups, every=every, fine=self.by_log_odds)

    def _effect(self, half: int) -> Effect:
        """What steering is for, on the development or test items."""
        name = f"effect {half}"
        if name not in self._effects:
            task = self.aim[half]
            self._effects[name] = (
                LogOdds(self.rows, task, whole=self.options.whole_answers)
                if self.by_log_odds
                else Answered(self.subject, task, seed=self.options.seed)
            )
        return self._effects[name]

    def _changes(self, lever: Lever, candidates: Sequence[Candidate]) -> Floats:
        """Change of the effect's number against the unsteered model, toward the side that is steered for."""

        def work() -> dict[str, Any]:
            plans = [lever.plan(candidate) for candidate in candidates]
            return {"values": self._effect(0).values([None, *plans]).tolist()}

        named = [canonical(candidate) for candidate in candidates]
        values: Floats = np.array(self._remember(("effects", lever.name, *named), work)["values"])
        moved: Floats = self.sign * (values[1:] - values[0])
        return moved

    def _costs(self, lever: Lever, candidate: Candidate, half: int = 0) -> dict[str, Cost]:
        def work() -> dict[str, Any]:
            found = self.kept[half].measure(self.rows, lever.plan(candidate))
            return {name: cost.to_json() for name, cost in found.items()}

        return _costs_of(self._remember(("costs", half, lever.name, canonical(candidate)), work))

    # ---------------------------------------------------------------- finalists

    def _final(self, found: Searched) -> tuple[Tried | None, list[dict[str, Any]]]:
        """The passing candidate that is chosen, and what the finalists answer: the largest judged effect
        among those that are not degenerate, of equal ones the largest effect.
        """
        passing = found.passing[: self.options.finalists]
        told: list[tuple[float, Tried]] = []
        rows: list[dict[str, Any]] = []
        for one in passing:
            row: dict[str, Any] = {**one.candidate.to_json(), "effect": one.effect.mean}
            moved = 0.0
            if self.judged:
                base, steered = self._answers(0, None), self._answers(0, found.lever.plan(one.candidate))
                moved = self.sign * float(np.mean(steered) - np.mean(base))
                row |= {"answers_base": float(np.mean(base)), "answers": float(np.mean(steered))}
            kept = self._degenerate(0, found.lever.plan(one.candidate))
            if kept is not None:
                row["degenerate"] = kept.to_json()
            rows.append(row)
            if kept is None or kept.kept:
                told.append((moved, one))
        # `passing` is in order of effect, so the first of equals has the largest.
        best = max(told, key=lambda entry: round(entry[0], 9), default=None)
        return (None if best is None else best[1]), rows

    def _answers(self, half: int, plan: Steering | None) -> list[float]:
        """What the task's own measure makes of the answers under a plan, item by item."""

        def work() -> dict[str, Any]:
            effect = Answered(self.subject, self.aim[half], seed=self.options.seed)
            return {"values": effect.values([plan])[0].tolist(), "texts": effect.texts[0]}

        values: list[float] = self._remember(("answers", half, _named(plan)), work)["values"]
        return values

    def _degenerate(self, half: int, plan: Steering) -> Cost | None:
        """What a plan's answers to the kept prompts cost; None where that is not bounded."""
        bound = next((bound for bound in self.bounds if bound.name == "degenerate"), None)
        if bound is None:
            return None

        def work() -> dict[str, Any]:
            condition = self.subject.condition(Arm("tuned", plan), seed=self.options.seed)
            kept = self.kept[half]
            return {"texts": condition.answers(kept.contents, max_new_tokens=ANSWER_TOKENS)}

        texts = self._remember(("kept answers", half, _named(plan)), work)["texts"]
        return self.kept[half].degenerate(texts, bound.most)

    # ---------------------------------------------------------------- the test

    def _confirmed(self, chosen: Tried, tuned: Sequence[tuple[Lever, Tried | None]]) -> Confirmed:
        """The chosen candidate on the test items, beside the controls' own."""
        effect = self._effect(1)
        plan = self.lever.plan(chosen.candidate)
        plans = [lever.plan(best.candidate) for lever, best in tuned if best is not None]

        def work() -> dict[str, Any]:
            values = effect.values([None, plan, *plans])
            looks = count_look(self.aim[1].sha256, plan.weights_id)
            return {"values": values.tolist(), "looks": looks}

        kept = self._remember(("test", _named(plan), *map(_named, plans)), work)
        values = np.array(kept["values"])
        changes = self.sign * (values[1:] - values[0])
        draws = _spread_out(changes[1:].mean(axis=1).tolist(), [best for _, best in tuned])
        costs = dict(self._costs(self.lever, chosen.candidate, half=1))
        degenerate = self._degenerate(1, plan)
        if degenerate is not None:
            costs["degenerate"] = degenerate
        found = clustered_mean(changes[0], effect.task.groups)
        control = random_control(found.mean, draws) if draws else None
        return Confirmed(
            effect=found,
            base=float(values[0].mean()),
            control=control,
            costs=costs,
            answers=self._confirmed_answers(plan, tuned) if self.judged else None,
            looks=kept["looks"],
            verdict=_verdict(found.low, found.high, control, costs),
        )

    def _confirmed_answers(
        self, plan: Steering, tuned: Sequence[tuple[Lever, Tried | None]]
    ) -> dict[str, Any]:
        base, steered = self._answers(1, None), self._answers(1, plan)
        draws = []
        for lever, best in tuned[: self.options.answer_controls]:
            own = base if best is None else self._answers(1, lever.plan(best.candidate))
            draws.append(self.sign * float(np.mean(own) - np.mean(base)))
        before, after = (np.array(values) for values in (base, steered))
        binary = bool(np.isin([*before, *after], (0, 1)).all())
        moved = self.sign * float(after.mean() - before.mean())
        control = random_control(moved, draws) if draws else None
        groups = self.aim[1].groups
        if binary:
            rates = paired_difference(before, after, groups)
            ends = sorted((self.sign * rates.low, self.sign * rates.high))
        else:
            mean = clustered_mean(self.sign * (after - before), groups)
            ends = [mean.low, mean.high]
        texts = [self.store.get(key_of("answers", 1, _named(one))) or {} for one in (None, plan)]
        shown = [
            {"prompt": item.content, "base": one, "steered": other}
            for item, one, other in zip(self.aim[1], *(text["texts"] for text in texts), strict=True)
        ]
        return {
            "base": float(before.mean()),
            "steered": float(after.mean()),
            "moved": moved,
            "low": ends[0],
            "high": ends[1],
            "items": len(before),
            "control": None if control is None else control.to_json(),
            "verdict": _verdict(ends[0], ends[1], control, {}),
            "shown": shown[:SHOWN_ANSWERS],
        }

    def _result(
        self,
        found: Searched,
        chosen: Tried | None,
        confirmed: Confirmed | None,
        finalists: Sequence[Mapping[str, Any]],
    ) -> Tuning:
        made: dict[str, Any] = {
            "lever": self.lever.name,
            "effect": self._effect(0).in_words,
            "side": self.side,
            "bounds": [
                {"cost": bound.name, "most": bound.most, "what": COSTS[bound.name]} for bound in self.bounds
            ],
            "task": [_told(half) for half in self.aim],
            "keep": [[_told(half) for half in halves_] for halves_ in self.kept_tasks],
            "options": vars(self.options),
            "controls": [control.name for control in self.controls[:1]],
            "from": [dict(source) for source in self.made_from],
        }
        plan = None if chosen is None else self.lever.plan(chosen.candidate)
        if plan is not None and chosen is not None and confirmed is not None:
            told = {
                "chosen": chosen.candidate.to_json(),
                "task": made["task"],
                "keep": made["keep"],
                "bounds": [str(bound) for bound in self.bounds],
                "side": self.side,
                "confirmed": confirmed.to_json(brief=True),
            }
            plan = replace(plan, provenance={**plan.provenance, "tuning": told})
        return Tuning(made, found.tried, chosen, tuple(finalists), confirmed, plan)

    def _remember(self, key: tuple[str | int, ...], work: Any) -> dict[str, Any]:
        name = key_of(*key)
        known = self.store.get(name)
        return self.store.put(name, work()) if known is None else known


SHOWN_ANSWERS = 8
"""Answers to test items that the report shows side by side."""


def canonical(candidate: Candidate) -> str:
    """A name for what is kept of a candidate."""
    return candidate.in_words()


def _named(plan: Steering | None) -> str:
    return "" if plan is None else plan.fingerprint


def _costs_of(entry: Mapping[str, Any]) -> dict[str, Cost]:
    return {
        name: Cost(**{**found, "upper": float("nan") if found["upper"] is None else found["upper"]})
        for name, found in entry.items()
    }


def _spread_out(effects: Sequence[float], best: Sequence[Tried | None]) -> list[float]:
    """A control's effect on the test items each; 0 where nothing of it passed."""
    known = iter(effects)
    return [0.0 if one is None else next(known) for one in best]


def _verdict(low: float, high: float, control: RandomControl | None, costs: Mapping[str, Cost]) -> Verdict:
    """Shown where the effect is clear of 0 and beyond its controls, and every cost is kept on test items."""
    due = Control(0, 1.0) if control is None else Control(len(control.draws), control.p)
    found = verdict(low, high, controls=[due])
    return found if found != SHOWN or all(cost.kept for cost in costs.values()) else CANNOT_TELL


def _told(task: Task) -> dict[str, Any]:
    return {"name": task.name, "sha256": task.sha256, "items": len(task), "groups": len(set(task.groups))}


def _parted(source: TaskLike, test: TaskLike | None, options: Options, chats: bool) -> tuple[Task, Task]:
    """Development and test items: the task's own splits, else halves by group."""
    if test is not None:
        parts = _opened(source, chats), _opened(test, chats)
        both = {*parts[0].groups} & {*parts[1].groups}
        if both:
            raise PairsError(
                f"{parts[1].name}: the group {min(both)!r} is among the development items of "
                f"{parts[0].name} too; right is a test of other groups"
            )
    elif isinstance(source, str) and source.startswith("lab:") and "/" not in source:
        parts = _opened(f"{source}/dev", chats), _opened(f"{source}/test", chats)
    else:
        parts = halves(_opened(source, chats), options.seed)
    limits = options.dev_items, options.test_items
    dev, held = (_first(part, limit, options.seed) for part, limit in zip(parts, limits, strict=True))
    return dev, held


def _opened(source: TaskLike, chats: bool) -> Task:
    task = source if isinstance(source, Task) else load_task(source)
    return task if chats else task.as_texts()


def _first(task: Task, limit: int | None, seed: int) -> Task:
    return task if limit is None else some_of(task, limit, seed)


def _checked(options: Options) -> Options:
    check_kind(options, Options, PlanError)
    for name in ("controls", "answer_controls"):
        whole_number(name, getattr(options, name), 0, PlanError)
    for name in ("finalists", "batch_size", "max_new_tokens"):
        whole_number(name, getattr(options, name), 1, PlanError)
    for name in ("dev_items", "test_items", "cost_items"):
        if getattr(options, name) is not None:
            whole_number(name, getattr(options, name), 2, PlanError)
    return options
