"""Tuning: the layer and dose, or the experts, that move a behaviour most at a cost that is bounded.

The candidates are searched on development items, beside controls that go through the same search; the one
that is chosen is looked at once on test items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.edits import Scope, finite_number
from steersman.errors import PairsError, PlanError, check_kind, whole_number
from steersman.evaluation.judges.language import identifier
from steersman.evaluation.tasks import Task
from steersman.evaluation.tuning.candidates import Lever
from steersman.evaluation.tuning.costs import EXAMPLE, read_bounds
from steersman.evaluation.tuning.levers import Tunable, lever_of
from steersman.evaluation.tuning.result import Tuning
from steersman.evaluation.tuning.run import Options, Run, Side
from steersman.evaluation.tuning.splits import TaskLike, split_of
from steersman.models.attachment import refuse_steered
from steersman.models.decoding import require_repeatable
from steersman.models.loading import Named, open_named
from steersman.models.reading import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        ...     dev_items=24, test_items=48, cost_items=24, answers=False, doses=(0.2, 0.4),
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
    aim = split_of(task, test, seed=options.seed, chats=chats)
    aim = aim.first(options.dev_items, options.test_items, options.seed)
    kept = [split_of(each, None, seed=options.seed, chats=chats) for each in keeps]
    seen: set[tuple[str, ...]] = set()
    for split in kept:
        content = tuple(half.sha256 for half in split.halves)
        if content in seen:
            raise PairsError(f"{split.dev.name}: is kept twice (--keep); right is once, or another task")
        seen.add(content)
    run = Run(model, tokenizer, lever, aim, kept, bounds, side, options, made_from)
    run.open(checkpoint, resume)
    with evaluating(model):
        return run.all(progress)


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
