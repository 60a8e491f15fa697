"""Screening: the effect of every expert on a behaviour, a gate, and sets chosen on other items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from tqdm import tqdm

from steersman.chat_record import CHATS
from steersman.errors import ArchitectureMismatch, ModelError, PlanError, WeightsMismatch, check_kind
from steersman.evaluation.arms import Subject
from steersman.evaluation.prompts import chats_of
from steersman.evaluation.screening.effects import STRENGTHS, edits_of, effects_of, place_of
from steersman.evaluation.screening.exact import Edit, Floats, Instrument, instrument
from steersman.evaluation.screening.expert_calls import CannotEstimate
from steersman.evaluation.screening.greedy import Aim, Chooser, estimates_beside, values_beside
from steersman.evaluation.screening.harm import harm_of
from steersman.evaluation.screening.items import (
    Items,
    describe,
    halves,
    open_items,
    require_answers,
    require_clusters,
    require_judged,
    some_of,
    told_apart,
)
from steersman.evaluation.screening.ledger import Ledger
from steersman.evaluation.screening.options import Options
from steersman.evaluation.screening.subsets import subset_effects
from steersman.evaluation.screening.texts import Reading, answers, preferences, require_room
from steersman.evaluation.statistics import clustered_mean
from steersman.evaluation.tasks import Task
from steersman.experts.causal import CausalScreen
from steersman.experts.causal_effects import DIRECTIONS, SIGNS, ChosenSet, Direction, Effects
from steersman.experts.contrast import RoutingContrast
from steersman.models.architecture import RouterSite, find_routers, read_architecture
from steersman.models.attachment import refuse_steered
from steersman.models.identity import has_weights, model_name, weights_id
from steersman.models.loading import Named, open_named
from steersman.pairs import ContrastPairs
from steersman.ties import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CANDIDATES = 24
"""At most so many experts a direction are tried for sets, those with the largest effects."""
KEPT_ITEMS = 200
"""At most so many items of each task that is to be kept."""


@dataclass(frozen=True)
class Runs:
    """What runs a screen's measurements: transformers in this process, or an engine.

    Attributes:
        instrument: Opens what scores texts, as `exact.instrument` does.
        subject: Makes what answers the tasks of harm, as `Subject`.
        engine: The engine's name and version; None: transformers.
    """

    instrument: Callable[..., AbstractContextManager[Instrument]] = instrument
    subject: Callable[..., Subject] = Subject
    engine: str | None = None


def screen_experts(
    model: Named,
    tokenizer: PreTrainedTokenizerBase | None,
    items: Items,
    *,
    keep: Sequence[Items] = (),
    harm: Sequence[Items] = (),
    contrast: RoutingContrast | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    runs: Runs = Runs(),
    **options: Any,
) -> CausalScreen:
    """Find the experts that cause a behaviour: the effect of each on d = log p(positive answer) −
    log p(negative answer) when it alone is kept out of every token's top-k, or put in, and sets of them.

    Half of the items' groups screen; on the other half a set is chosen for each direction, as long as a pick
    gains .01 nats with t of 3 or more. What it gains: d, the same that experts are screened by, and what is
    to be kept (`keep`) as it is.

    Args:
        model: A transformers Mixture-of-Experts model, or its name.
        tokenizer: Its tokenizer; None takes that of a model named.
        items: A task whose items have both answers, or contrast pairs that differ in the last answer alone.
        keep: Tasks that a set must not harm: right answers, or for tasks with two sides what the unsteered
            model would answer.
        harm: Tasks on which the sets are measured in the end, by what the model then answers.
        contrast: Of the same model, so that risk differences stand beside the effects.
        method: `exact` runs every expert; `estimate` makes do with one forward and backward; `auto` estimates
            all and runs the best `exact_runs`, half of them for each sign.
        signs: `deactivate`, `activate` or `both`: what experts are screened with, and sets are made of.
        by: What experts are screened by and sets are chosen by: `d` at the first token where the answers
            differ, or of the whole `answer`.
        subsets: Random subsets an item, for experts that stand in for each other; 0: none.
        choose: How sets are chosen: `greedy` tries each candidate beside those chosen before, one pick at a
            time; `rounds` estimates what all experts add to those chosen before, twice as many a round, for
            sets of up to a tenth of all experts.
        at_most: Experts a direction; 0: choose no sets.
        gate: What an effect must reach: q and size.
        least_t: What t a pick of a set must reach. Lower it where what is to be kept is fragile, so that a
            few items make all gains uncertain.
        scope: Which tokens are steered.
        limit: Read at most so many items of each task, of as many groups as there are; of those to `keep` at
            most 200, of those of `harm` at most `harm_limit`.
        seed: Of every random choice.
        batch_size: Texts in one forward.
        checkpoint: A folder to save progress in. It is yours to remove when the result is safe.
        resume: Go on from what is saved in `checkpoint`, if anything is; otherwise that is an error.
        progress: Show a progress bar on stderr where it takes more than a second.
        runs: What runs the measurements: `on_engine(engine)` of `steersman.vllm.screening` asks an engine,
            and of the model knows its structure alone; effects are all exact there.

    Raises:
        ModelError: the model has no routers, gives no finite d, or (method `estimate`) its experts cannot be
            called one by one.
        PairsError: the items have no d, too few groups, or both answers of each are the same tokens (where
            only some are, a warning names them, and they are left out).
        PlanError: an option is unknown or out of range.
        WeightsMismatch, ArchitectureMismatch: the contrast is another model's.
        ArtifactError: `checkpoint` holds progress that is not to be resumed, or another run's.

    Example:
        >>> steersman.screen_experts("lab:moe", None, "lab:refusal/dev", limit=24, at_most=0)
        <CausalScreen: 24 items in 22 groups; layers 0–3; ... experts passed the gate; of lab:moe>
    """
    model, tokenizer = open_named(model, tokenizer)
    given = Options(**options)
    refuse_steered(model, "screening")
    opened = partial(opened_items, tokenizer=tokenizer)
    keep, harm = _several(keep), _several(harm)
    task = some_of(told_apart(opened(items), tokenizer), given.limit, given.seed)
    kept = [some_of(require_answers(opened(each)), min(KEPT_ITEMS, given.limit), given.seed) for each in keep]
    most = min(given.harm_limit, given.limit)
    harmed = [some_of(require_judged(opened(each)), most, given.seed) for each in harm]
    parts(task, given)  # before the work: there may be too few
    sites = [site for site in find_routers(model) if site.facts.reason is None]
    if not sites:
        raise ModelError("the model has no router that can be steered: there is nothing to screen")
    identity = weights_id(model)
    if contrast is not None:
        check_kind(contrast, RoutingContrast, PlanError)
        require_of_model(contrast, model, "the contrast")
    chat = chats_of(tokenizer, (item.content for each in (task, *kept, *harmed) for item in each))
    run = {
        "weights_id": identity,
        "tasks": [each.sha256 for each in (task, *kept, *harmed)],
        "roles": [len(kept), len(harmed)],
        **{name: value for name, value in vars(given).items() if name != "gate"},
        "gate": vars(given.gate),
        **({} if chat is None else {CHATS: chat.to_json()}),
        **({} if runs.engine is None else {"engine": runs.engine}),
    }
    ledger = Ledger(checkpoint, run, resume=resume)
    with (
        runs.instrument(model, tokenizer, sites, scope=given.scope, batch_size=given.batch_size) as tool,
        tqdm(desc="screening", total=1, disable=not progress, delay=1, leave=False) as bar,
    ):
        screening = _Screening(tool, sites, given, ledger, bar)
        found = screening.run(task, kept)
    name, revision = model_name(model)
    screen = replace(
        found,
        weights_id=identity,
        architecture=read_architecture(model),
        model=name,
        revision=revision,
        chat=chat,
        made_from=(
            describe(task, "items")
            | ({"by": given.by} if given.whole else {})
            | ({} if runs.engine is None else {"engine": runs.engine}),
            *(describe(each, "keep") for each in kept),
            *(describe(each, "harm") for each in harmed),
            *(({"kind": "routing_contrast", "sha256": contrast.sha256},) if contrast is not None else ()),
        ),
        risk_difference=None if contrast is None else contrast.risk_difference,
    )
    with tqdm(desc="harm", disable=not progress, delay=1, leave=False) as bar:
        subject = runs.subject(
            model, tokenizer, batch_size=given.batch_size, max_new_tokens=given.max_new_tokens
        )
        measured = harm_of(subject, screen, harmed, ledger, bar)
    ledger.save(at_once=True)
    return replace(screen, harm=measured)


def parts(task: Task, options: Options) -> tuple[Task, Task]:
    """The items that screen, and those that sets are chosen by: halves, or all where there are no sets.

    Raises PairsError where there are too few groups.
    """
    if options.at_most:
        return halves(task, options.seed)
    require_clusters(len(set(task.groups)), task.name)
    return task, task


class _Screening:
    """One screen, step by step; each measurement is made once."""

    def __init__(
        self, tool: Instrument, sites: list[RouterSite], options: Options, ledger: Ledger, bar: tqdm[Any]
    ) -> None:
        self._tool = tool
        self._routers = [site.facts for site in sites]
        self._options = options
        self._ledger = ledger
        self._bar = bar
        self._notes: list[str] = []
        self._counts = True
        """Whether the bar counts measurements, or else picks."""

    def run(self, task: Task, kept: list[Task]) -> CausalScreen:
        options, tokenizer = self._options, self._tool.tokenizer
        first, second = parts(task, options)
        reading = preferences(first, tokenizer, whole=options.whole)
        # Before the work: what is wrong with any item is said at once.
        chooser_reading = preferences(second, tokenizer, whole=options.whole)
        aims = {direction: self._aims(chooser_reading, kept, direction) for direction in DIRECTIONS}
        for one in (reading, *(aim.reading for of in aims.values() for aim in of)):
            require_room(one, self._tool.model)
        if options.choose == "rounds" and options.at_most and not self._tool.has_gradients:
            raise PlanError("sets in rounds need gradients, which an engine does not give: use choose greedy")
        effects, exact = self._effects(reading)
        subsets = None
        if options.subsets:
            turns = (1 + options.subsets) * len(options.chosen_signs)
            self._begin("subsets", len(self._tool.batches(reading)) * turns)
            subsets = subset_effects(
                self._tool,
                self._routers,
                reading,
                options.chosen_signs,
                options.subsets,
                options.seed,
                self._remember,
            )
        screen = CausalScreen(
            effects=effects,
            exact=exact,
            gate=options.gate,
            sets={},
            items=reading.items,
            clusters=len(set(reading.groups)),
            choosing_items=chooser_reading.items if options.at_most else 0,
            method=options.method,
            scope=options.scope,
            architecture=read_architecture(self._tool.model),
            weights_id="",
            subsets=subsets,
            notes=tuple(self._notes),
        )
        if not options.at_most:
            return screen
        sets = {
            direction: self._choose(direction, screen, aims[direction], chooser_reading)
            for direction in DIRECTIONS
        }
        return replace(screen, sets=sets)

    def _aims(self, reading: Reading, kept: list[Task], direction: Direction) -> list[Aim]:
        tokenizer = self._tool.tokenizer
        return [
            Aim(reading, sign=1.0 if direction == "toward" else -1.0),
            *(
                Aim(preferences(each, tokenizer), kept=True)
                if each.two_sided
                else Aim(answers(each, tokenizer))
                for each in kept
            ),
        ]

    # ------------------------------------------------------------ effects

    def _effects(self, reading: Reading) -> tuple[Effects, Any]:
        """Effects, and which of them are exact, bool [2, layers, experts]."""
        options = self._options
        edits = edits_of(self._routers, options.chosen_signs)
        changes: dict[Edit, Floats] = {}
        runs = edits
        if options.method != "exact":
            try:
                changes = self._estimated(reading, edits)
            except CannotEstimate as reason:
                if options.method == "estimate":
                    raise ModelError(
                        f"effects cannot be estimated for this model: {reason}; use method exact"
                    ) from None
                self._notes.append(f"run exactly, all of them: {reason}")
            else:
                runs = self._best(changes, edits) if options.method == "auto" else {}
        changes |= self._exact(reading, runs)
        exact = np.zeros((len(SIGNS), len(self._routers), max(r.experts for r in self._routers)), bool)
        for of_layer in runs.values():
            for edit in of_layer:
                exact[place_of(self._routers, edit)] = True
        return effects_of(self._routers, changes, reading.groups), exact

    def _best(self, changes: dict[Edit, Floats], edits: dict[int, list[Edit]]) -> dict[int, list[Edit]]:
        """Those to run: of each sign the largest, as many of the one as of the other."""
        best: set[Edit] = set()
        signs = self._options.chosen_signs
        for turn, sign in enumerate(signs):
            every = [edit for edit in changes if edit[2] == STRENGTHS[sign]]
            order = np.argsort(ranks([abs(changes[edit].mean()) for edit in every]), kind="stable")
            runs = (self._options.exact_runs + turn) // len(signs)
            best |= {every[place] for place in order[:runs]}
        return {layer: [edit for edit in of_layer if edit in best] for layer, of_layer in edits.items()}

    def _estimated(self, reading: Reading, edits: dict[int, list[Edit]]) -> dict[Edit, Floats]:
        if not self._tool.has_gradients:
            raise CannotEstimate("an engine gives no gradients")
        every = [edit for of_layer in edits.values() for edit in of_layer]
        self._begin("estimating", len(self._tool.batches(reading)))
        found = estimates_beside(self._tool, reading, (), every, "estimate", self._remember)
        return dict(zip(every, found[1:] - found[0], strict=True))

    def _exact(self, reading: Reading, edits: dict[int, list[Edit]]) -> dict[Edit, Floats]:
        every = [edit for of_layer in edits.values() for edit in of_layer]
        if not every:
            return {}
        layers = len({edit[0] for edit in every})
        self._begin("screening", len(self._tool.batches(reading)) * (1 + layers))
        found = values_beside(self._tool, reading, (), every, "exact", self._remember)
        return dict(zip(every, found[1:] - found[0], strict=True))

    # ------------------------------------------------------------ sets

    def _choose(
        self, direction: Direction, screen: CausalScreen, aims: list[Aim], reading: Reading
    ) -> ChosenSet:
        options, reverse = self._options, direction == "reversed"
        self._begin(f"choosing {direction}", options.at_most)
        self._counts = False
        rounds = options.choose == "rounds"
        ranking = screen.ranking(reverse=reverse, significant=rounds)
        candidates = [(layer, expert, 1.0 if score > 0 else -1.0) for layer, expert, score in ranking]
        if not candidates:
            reason = "no effect in this direction passes the gate" if screen.found else screen.reason
            return ChosenSet((), reason, 0)
        chooser = Chooser(
            self._tool, self._remember, aims, direction, options.least_t, advance=self._bar.update
        )
        if rounds:
            try:
                chosen = chooser.choose_in_rounds(candidates, at_most=options.at_most)
            except CannotEstimate as reason:
                raise ModelError(
                    f"sets cannot be chosen in rounds for this model: {reason}; use choose greedy"
                ) from None
        else:
            candidates = candidates[:CANDIDATES]
            start = [edit for edit in candidates if not self._passes_alone(screen, edit)]
            start = start[: options.at_most]
            chosen = chooser.choose(candidates, at_most=options.at_most, start=start)
        plan = tuple((pick.layer, pick.expert, pick.strength) for pick in chosen.picks)
        before = values_beside(self._tool, reading, (), (), f"{direction}, d unsteered", self._remember)[0]
        after = values_beside(self._tool, reading, plan, (), f"{direction}, d of the set", self._remember)[0]
        shift = clustered_mean(after - before, reading.groups)
        return replace(chosen, shift=shift.mean, shift_error=shift.standard_error)

    def _passes_alone(self, screen: CausalScreen, edit: Edit) -> bool:
        """Whether an expert shows its effect by itself, and not only while others are steered too."""
        return bool(screen.effects.passing(screen.gate)[place_of(self._routers, edit)])

    def _begin(self, step: str, total: int) -> None:
        """The bar begins anew: with a step of so many measurements, or of picks."""
        self._counts = True
        self._bar.reset(total)
        self._bar.set_description(step)

    def _remember(self, name: str, work: Callable[[], Floats]) -> Floats:
        if self._counts:
            self._bar.update()
        return self._ledger.remember(name, work)


def opened_items(source: Items, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Items as the model can be asked them: as plain texts where it has no chat template."""
    task = open_items(source)
    return task if getattr(tokenizer, "chat_template", None) else task.as_texts()


def _several(given: Any) -> list[Items]:
    """Items of several tasks; one given alone is the only one."""
    alone = isinstance(given, str | Task | ContrastPairs) or not isinstance(given, Iterable)
    return [given] if alone else list(given)


def require_of_model(made: RoutingContrast | CausalScreen, model: nn.Module, what: str) -> None:
    """Raise where a contrast or a screen is of another model: ArchitectureMismatch, WeightsMismatch."""
    if made.architecture.id != read_architecture(model).id:
        raise ArchitectureMismatch(f"{what} is of another architecture than the model to screen")
    if not has_weights(model, made.weights_id, what):
        raise WeightsMismatch(f"{what} was made on other weights than the model's to screen")
