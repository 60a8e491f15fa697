"""One tuning: the search on development items, the finalists, the one look at test items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from steersman.chat_record import CHATS, to_json
from steersman.errors import PlanError
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.prompts import chats_of
from steersman.evaluation.run_store import RunStore, key_of
from steersman.evaluation.statistics import clustered_mean
from steersman.evaluation.tasks import Task
from steersman.evaluation.tuning.candidates import Candidate, Experts, Lever
from steersman.evaluation.tuning.confirming import answers_moved, control_of, verdict_of
from steersman.evaluation.tuning.costs import ANSWER_TOKENS, COSTS, Cost, CostBound, Kept
from steersman.evaluation.tuning.degenerate import repeats
from steersman.evaluation.tuning.effects import Answered, Effect, LogOdds, has_log_odds
from steersman.evaluation.tuning.levers import by_use
from steersman.evaluation.tuning.looks import count_look
from steersman.evaluation.tuning.result import Confirmed, Tuning
from steersman.evaluation.tuning.search import Searched, Tried, search
from steersman.evaluation.tuning.shared_prompts import SharedPrompts
from steersman.evaluation.tuning.splits import Split
from steersman.models.apply import check_model
from steersman.models.plan_rows import Floats, PlanRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steersman.steering import Steering

Side = Literal["positive", "negative"]


@dataclass(frozen=True)
class Options:
    """How a tuning is made.

    Attributes:
        controls: Random counterparts that go through the same tuning.
        answer_controls: The first so many of them also answer the test items.
        finalists: Of the passing candidates the first so many answer the development items too.
        dev_items, test_items: Of the task at most so many; None: all.
        cost_items: Of each kept task and part at most so many; None: all, but 48 in the search where KL alone
            is bounded.
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


KL_ITEMS = 48
"""Of each kept task, those that KL is measured on in the search, where no share is bounded."""
SHOWN_ANSWERS = 8
"""Answers to test items that the report shows side by side."""


class Run:
    """One tuning.

    Raises:
        PlanError: there is no candidate, fewer controls than asked for, or a scope that steers nothing.
        PairsError: items that cannot be read, or too few of them.
        ArchitectureMismatch, WeightsMismatch: what is tuned is of another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        lever: Lever,
        aim: Split,
        kept: Sequence[Split],
        bounds: Sequence[CostBound],
        side: Side,
        options: Options,
        made_from: Sequence[Mapping[str, Any]],
    ) -> None:
        self.subject = Subject(
            model, tokenizer, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
        )
        self.subject.shared_prompts = SharedPrompts(model)
        self.rows = PlanRows(model, tokenizer)
        self.aim, self.bounds, self.side, self.options = aim, tuple(bounds), side, options
        self.sign = 1.0 if side == "positive" else -1.0
        self.made_from = made_from
        self.by_log_odds = all(map(has_log_odds, aim.halves))
        self.judged = options.answers and self.by_log_odds
        if not self.by_log_odds and (options.whole_answers or not options.answers):
            raise PlanError(
                f"{aim.dev.name}: is measured by judged answers, since its items have neither answers for "
                "both sides nor options; --whole-answers and --no-answers do not go with it"
            )
        self.effects: list[Effect] = [self._effect_on(half) for half in aim.halves]
        lever = lever if self.by_log_odds else lever.reduced()
        self._check(lever)
        if isinstance(lever, Experts) and options.controls:
            lever = by_use(lever, model, tokenizer, aim.dev)
        self.lever = lever
        self.controls = lever.controls(options.controls, options.seed)
        shares = {"lost", "degenerate"} & {bound.name for bound in bounds}
        searched = KL_ITEMS if options.cost_items is None and not shares else options.cost_items
        self.kept_splits = [split.first(searched, options.cost_items, options.seed) for split in kept]
        unsteered = self.subject.condition(Arm("base", None), seed=options.seed)
        self.kept = [
            Kept([split.halves[half] for split in self.kept_splits], bounds, unsteered) for half in (0, 1)
        ]
        halves = [half for split in (aim, *self.kept_splits) for half in split.halves]
        self._chat = chats_of(tokenizer, (item.content for half in halves for item in half))
        self.store = RunStore(None, {}, resume=False)

    def _effect_on(self, task: Task) -> Effect:
        """What steering is for, on development or test items."""
        if not self.by_log_odds:
            return Answered(self.subject, task, seed=self.options.seed)
        return LogOdds(self.rows, task, whole=self.options.whole_answers)

    def _check(self, lever: Lever) -> None:
        """Raise before any work where nothing could come of it."""
        candidates = lever.coarse()
        if not candidates:
            raise PlanError(f"{lever.name}: there is no candidate to try")
        plan = lever.plan(candidates[0])
        check_model(plan, self.subject.model, self.rows.match)
        scopes = {edit.scope for candidate in candidates for edit in lever.plan(candidate).edits}
        for effect in self.effects:
            if "generated" in scopes and isinstance(effect, LogOdds) and not effect.feeds_back:
                raise PlanError(
                    f"scope generated steers nothing before the first tokens that differ, of which "
                    f"{effect.task.name}'s log-odds are; right is another scope, or whole answers "
                    "(--whole-answers)"
                )

    def open(self, checkpoint: str | Path | None, resume: bool) -> None:
        """Where progress is kept."""
        first = self.lever.plan(self.lever.coarse()[0])
        run = {
            "kind": "tuning",
            "lever": self.lever.name,
            "made_from": [dict(source) for source in self.made_from],
            "weights": first.weights_id,
            "candidates": [one.to_json() for one in self.lever.coarse()],
            "tasks": [half.sha256 for split in (self.aim, *self.kept_splits) for half in split.halves],
            "bounds": [str(bound) for bound in self.bounds],
            "side": self.side,
            "options": vars(self.options),
            **self.subject.held(),
            CHATS: to_json(self._chat),
        }
        self.store = RunStore(None if checkpoint is None else Path(checkpoint), run, resume=resume)

    def all(self, progress: bool) -> Tuning:
        """Search, choose, confirm."""
        with tqdm(
            total=3 + len(self.controls), desc="tune", unit="search", delay=1, disable=not progress
        ) as bar:
            self._answer_kept_prompts()
            found = search(
                self.lever, self._changes, self._costs, self._groups, every=True, fine=self.by_log_odds
            )
            bar.update(1)
            chosen, finalists = self._final(found, self.judged)
            bar.update(1)
            if chosen is None:
                return self._result(found, None, None, finalists)
            tuned: list[tuple[Lever, Tried | None]] = []
            for number, control in enumerate(self.controls):
                tuned.append((control, self._tuned(control, number < self.options.answer_controls)))
                bar.update(1)
            confirmed = self._confirmed(chosen, tuned)
            bar.update(1)
            return self._result(found, chosen, confirmed, finalists)

    def _answer_kept_prompts(self) -> None:
        """What the unsteered model says to the kept prompts, which KL and degenerate text are told by."""
        if not {"kl", "degenerate"} & {bound.name for bound in self.bounds}:
            return
        for half, kept in enumerate(self.kept):

            def work(kept: Kept = kept) -> dict[str, Any]:
                return {"texts": kept.base_texts}

            kept.base_texts = self._remember(("base", half), work)["texts"]

    # ---------------------------------------------------------------- the search

    @property
    def _groups(self) -> Sequence[str]:
        return self.effects[0].task.groups

    def _tuned(self, control: Lever, answers: bool) -> Tried | None:
        """A control's own best, found as the chosen candidate was."""
        found = search(control, self._changes, self._costs, self._groups, every=False, fine=self.by_log_odds)
        return self._final(found, self.judged)[0] if answers else found.best

    def _changes(self, lever: Lever, candidates: Sequence[Candidate]) -> Floats:
        """Change of the effect's number against the unsteered model, toward the side that is steered for."""

        def work() -> dict[str, Any]:
            plans = [lever.plan(candidate) for candidate in candidates]
            return {"values": self.effects[0].values([None, *plans]).tolist()}

        named = [candidate.in_words() for candidate in candidates]
        values: Floats = np.array(self._remember(("effects", lever.name, *named), work)["values"])
        moved: Floats = self.sign * (values[1:] - values[0])
        return moved

    def _costs(self, lever: Lever, candidate: Candidate, half: int = 0) -> dict[str, Cost]:
        def work() -> dict[str, Any]:
            found = self.kept[half].measure(self.rows, lever.plan(candidate))
            return {name: cost.to_json() for name, cost in found.items()}

        return _costs_of(self._remember(("costs", half, lever.name, candidate.in_words()), work))

    # ---------------------------------------------------------------- finalists

    def _final(self, found: Searched, judged: bool) -> tuple[Tried | None, list[dict[str, Any]]]:
        """The passing candidate that is chosen, and what the finalists answer: the largest judged effect
        among the finalists, of equal ones the largest effect. Finalists are the candidates with the largest
        effects that pass and are not degenerate, first one of each part of the lever (`Lever.kin`): the
        largest log-odds are often neighbours, whose answers break alike.
        """
        wanted = self.options.finalists if judged else 1
        told: list[tuple[float, float, Tried]] = []
        rows: list[dict[str, Any]] = []
        looked: set[Candidate] = set()
        kin: set[Any] = set()
        for unlike in (True, False):
            for one in found.tried:
                if len(told) == wanted or one.effect.mean <= 0:
                    break
                part = found.lever.kin(one.candidate, wanted)
                if one.candidate in looked or (unlike and part in kin):
                    continue
                looked.add(one.candidate)
                if one.costs is None:  # a control's, which the search did not need
                    one = replace(one, costs=self._costs(found.lever, one.candidate))
                if not one.passes:
                    continue
                row, moved = self._as_finalist(found.lever, one, judged and wanted > 1)
                rows.append(row)
                if moved is not None:
                    kin.add(part)
                    told.append((round(moved, 9), one.effect.mean, one))
        best = max(told, key=lambda entry: entry[:2], default=None)
        return (None if best is None else best[-1]), rows

    def _as_finalist(self, lever: Lever, one: Tried, judged: bool) -> tuple[dict[str, Any], float | None]:
        """A row of the finalists, and how far its answers to the development items moved, of which those that
        repeat themselves did not; None where those to the kept prompts are degenerate.
        """
        plan = lever.plan(one.candidate)
        row: dict[str, Any] = {**one.candidate.to_json(), "effect": one.effect.mean}
        kept = self._degenerate(0, plan)
        if kept is not None:
            row["degenerate"] = kept.to_json()
            if not kept.kept:
                return row, None
        if not judged:  # of one there is nothing to choose
            return row, 0.0
        base, steered = (self._answered(0, each) for each in (None, plan))
        before, after = (np.array(each["values"]) for each in (base, steered))
        broken = [
            repeats(text) and not repeats(old)
            for text, old in zip(steered["texts"], base["texts"], strict=True)
        ]
        row |= {
            "answers_base": float(before.mean()),
            "answers": float(after.mean()),
            "repeats": float(np.mean(broken)),
        }
        return row, float(self.sign * np.where(broken, 0.0, after - before).mean())

    def _answers(self, half: int, plan: Steering | None) -> list[float]:
        """What the task's own measure makes of the answers under a plan, item by item."""
        values: list[float] = self._answered(half, plan)["values"]
        return values

    def _answered(self, half: int, plan: Steering | None) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            effect = Answered(self.subject, self.aim.halves[half], seed=self.options.seed)
            return {"values": effect.values([plan])[0].tolist(), "texts": effect.texts[0]}

        return self._remember(("answers", half, _named(plan)), work)

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
        effect = self.effects[1]
        plan = self.lever.plan(chosen.candidate)
        plans = [lever.plan(best.candidate) for lever, best in tuned if best is not None]

        def work() -> dict[str, Any]:
            values = effect.values([None, plan, *plans])
            return {"values": values.tolist(), "looks": count_look(self.aim.pool, plan.weights_id)}

        kept = self._remember(("test", _named(plan), *map(_named, plans)), work)
        values = np.array(kept["values"])
        changes = self.sign * (values[1:] - values[0])
        known = iter(changes[1:].mean(axis=1).tolist())
        draws = [0.0 if best is None else next(known) for _, best in tuned]  # nothing of it passed
        costs = dict(self._costs(self.lever, chosen.candidate, half=1))
        degenerate = self._degenerate(1, plan)
        if degenerate is not None:
            costs["degenerate"] = degenerate
        found = clustered_mean(changes[0], effect.task.groups)
        control = control_of(found.mean, draws)
        return Confirmed(
            effect=found,
            base=float(values[0].mean()),
            control=control,
            costs=costs,
            answers=self._confirmed_answers(plan, tuned) if self.judged else None,
            looks=kept["looks"],
            verdict=verdict_of(found.low, control, costs),
        )

    def _confirmed_answers(
        self, plan: Steering, tuned: Sequence[tuple[Lever, Tried | None]]
    ) -> dict[str, Any]:
        base, steered = (self._answered(1, each) for each in (None, plan))
        draws = []
        for lever, best in tuned[: self.options.answer_controls]:
            own = base["values"] if best is None else self._answers(1, lever.plan(best.candidate))
            draws.append(self.sign * float(np.mean(own) - np.mean(base["values"])))
        items = self.aim.test
        shown = [
            {"prompt": item.content, "base": one, "steered": other}
            for item, one, other in zip(items, base["texts"], steered["texts"], strict=True)
        ]
        found = answers_moved(base["values"], steered["values"], items.groups, draws, self.sign)
        repeated = {
            name: float(np.mean([repeats(text) for text in each["texts"]]))
            for name, each in (("repeats_base", base), ("repeats", steered))
        }
        return {**found, **repeated, "shown": shown[:SHOWN_ANSWERS]}

    def _result(
        self,
        found: Searched,
        chosen: Tried | None,
        confirmed: Confirmed | None,
        finalists: Sequence[Mapping[str, Any]],
    ) -> Tuning:
        made: dict[str, Any] = {
            "lever": self.lever.name,
            "effect": self.effects[0].in_words,
            "side": self.side,
            "bounds": [
                {"cost": bound.name, "most": bound.most, "what": COSTS[bound.name]} for bound in self.bounds
            ],
            "task": [_told(half) for half in self.aim.halves],
            "keep": [[_told(half) for half in split.halves] for split in self.kept_splits],
            "options": vars(self.options),
            "controls": [control.name for control in self.controls],
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

    def _remember(self, key: tuple[str | int, ...], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        name = key_of(*key)
        known = self.store.get(name)
        return self.store.put(name, work()) if known is None else known


def _named(plan: Steering | None) -> str:
    return "" if plan is None else plan.fingerprint


def _costs_of(entry: Mapping[str, Any]) -> dict[str, Cost]:
    return {
        name: Cost(**{**found, "upper": float("nan") if found["upper"] is None else found["upper"]})
        for name, found in entry.items()
    }


def _told(task: Task) -> dict[str, Any]:
    return {"name": task.name, "sha256": task.sha256, "items": len(task), "groups": len(set(task.groups))}
