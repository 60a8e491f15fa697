"""Evaluating: how much a behaviour moves, against which controls, how sure that is, and what else changed."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from steersman.chat_record import CHATS
from steersman.concepts.affine_map import AffineMap
from steersman.concepts.concept import ConceptVector
from steersman.errors import (
    ArtifactError,
    JudgeError,
    PairsError,
    PlanError,
    check_kind,
    told,
    valid_name,
    whole_number,
)
from steersman.evaluation import base_cache
from steersman.evaluation.arms import Subject
from steersman.evaluation.controlling import both_ways
from steersman.evaluation.expert_map import expert_map
from steersman.evaluation.instructing import instructed
from steersman.evaluation.judges.verdict import Judge
from steersman.evaluation.planning import Arms, plan_arms
from steersman.evaluation.prompts import chats_of
from steersman.evaluation.record import LIMITS, Settings, more_steps, task_record, unfinished, warnings
from steersman.evaluation.result import Evaluation
from steersman.evaluation.run_store import RunStore
from steersman.evaluation.running import Opened, Part, Runner, closing
from steersman.evaluation.tasks import Task, load_task
from steersman.evaluation.told import told_arm, told_model, told_steering
from steersman.evaluation.vector_controls import ShuffledConcepts
from steersman.models.attachment import refuse_steered
from steersman.models.decoding import own_settings, require_repeatable
from steersman.models.loading import Named, open_named
from steersman.models.reading import evaluating
from steersman.steering import Steering

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steersman.experts.causal import CausalScreen
    from steersman.experts.contrast import RoutingContrast

Tasks = str | Task | Sequence[str | Task]
Kind = TypeVar("Kind")


def evaluate(
    model: Named,
    tokenizer: PreTrainedTokenizerBase | None,
    steering: Steering | Mapping[str, Steering] | None = None,
    *,
    task: Tasks,
    side_tasks: Tasks = (),
    reverse: bool | Mapping[str, Steering] = False,
    instruction: str | None = None,
    others: Mapping[str, Callable[[], Opened]] | None = None,
    strengths: Sequence[float] = (),
    attacks: Mapping[str, str] | None = None,
    defences: Mapping[str, str] | None = None,
    random: int = 19,
    control_items: int = 100,
    limit: int | None = None,
    judge: Judge | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    shown: int = 12,
    seed: int = 0,
    match: Literal["weights", "architecture"] = "weights",
    contrast: RoutingContrast | None = None,
    screen: CausalScreen | None = None,
    concepts: ConceptVector | Sequence[ConceptVector] = (),
    maps: AffineMap | Sequence[AffineMap] = (),
    model_name: str | None = None,
    paths: Mapping[str, str] | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    finished: bool = False,
    cache: str | Path | None = None,
    progress: bool = False,
    subject_of: Callable[..., Subject] = Subject,
) -> Evaluation:
    """Measure what steering does to a model, under several arms over the same items.

    Args:
        model: A transformers model, and its tokenizer, or its name.
        steering: A plan (its arm is called `steered`), or several by name.
        task: What the plan is for: a name such as `lab:refusal` or `truthfulqa:FILE` (`evaluation.tasks`), a
            `Task`, or several.
        side_tasks: What it may cost: measured under the same arms, without random control.
        reverse: Also the other direction: True changes the signs; or plans by the name of what they reverse.
        instruction: The prompt baseline: this system prompt alone, and with each plan.
        others: Name → a function that opens another model (and its tokenizer), asked unsteered.
        strengths: Also each plan times each of these: a dose–response.
        attacks: Name → template around the prompt ("{prompt}").
        defences: Name → system prompt: a factorial of attack × defence × plan, with the interactions.
        random: Random plans of the same shape that each plan is compared with (their vectors drawn like the
            model's states); 0: none.
        control_items: On the first so many items.
        limit: The first so many items of each task that is given by name.
        judge: Instead of the own ones of the tasks that are steered for.
        batch_size: Prompts at once.
        max_new_tokens: At most so many tokens an answer, where a task does not say.
        shown: Items that the report shows side by side.
        seed: Of random plans and samples.
        match: "architecture" takes plans that were made for other weights; it is recorded.
        contrast: Risk differences for the map of experts.
        screen: Causal effects for the map of experts.
        concepts: What the plans' vectors were made of: their label-shuffled concepts, as many as `random`,
            are a control of their own, at the same layers, lengths and tokens.
        maps: Through which those were transplanted.
        model_name: What to call the model; None: its own name.
        paths: Name → where a plan or another model was read from, for the record.
        checkpoint: A folder that keeps what is finished.
        resume: Go on from it.
        finished: Report what is finished in it, also while the run goes on, and run nothing.
        cache: A folder that keeps what the unsteered model did, for other evaluations of it.
        progress: Show a progress bar on stderr where it takes more than a second.
        subject_of: What makes the subject of model and tokenizer: `EngineSubject.of(engine)` of
            `steersman.vllm.evaluation` asks an engine, and of the model knows its structure alone.

    Returns:
        The evaluation: `.to_json()` (docs/evaluation.md), `.table()`, `.save(folder)`.

    Raises:
        PairsError: a task that is not known, or has other items than its form.
        ModelError: the model's own generation settings make answers depend on the machine.
        PlanError: plans that are called alike, cannot be reversed, or contradict each other; a concept that
            no plan holds.
        ArchitectureMismatch, WeightsMismatch: a plan for another model.
        JudgeError: a judge that cannot be had; what is finished is in `checkpoint`.

    Example:
        >>> plan = steersman.Steering.from_experts("lab:moe", {1: [4]})
        >>> steersman.evaluate("lab:moe", None, plan, task="lab:refusal", limit=8, random=0)
        <Evaluation: lab:refusal (base/steered); ... batches run>
    """
    model, tokenizer = open_named(model, tokenizer)
    _check_judge(judge)
    steerings = _named(steering)
    settings = Settings(
        limit, batch_size, max_new_tokens, random if steerings else 0, control_items, shown, seed, match
    )
    settings = _checked(settings)
    opened = [*_tasks(task, "effect", limit, judge), *_tasks(side_tasks, "side", limit, judge)]
    if not getattr(tokenizer, "chat_template", None):
        opened = [(each.as_texts(), role) for each, role in opened]
    if not opened:
        raise PairsError("no task: name what to measure, such as lab:refusal")
    if len({each.name for each, _ in opened}) < len(opened):
        raise PairsError("a task is named twice: each is measured once, as effect or as side effect")
    arms = plan_arms(
        steerings,
        reverse=reverse,
        instruction=instruction,
        others=tuple(others or {}),
        strengths=strengths,
        attacks=attacks,
        defences=defences,
    )
    refuse_steered(model, "evaluate")
    require_repeatable(model)
    own = own_settings(model)
    _check_models(model, arms, match)
    for part in (contrast, screen):
        if part is not None:
            _check_figures(part, model, match)
    shuffled = ShuffledConcepts(_several(concepts, ConceptVector), _several(maps, AffineMap))
    shuffled.check([both_ways(arms, name) for name in steerings])
    parts = [
        Part(each, role, tuple(arm for arm in arms if role == "effect" or arm.kind != "cell"))
        for each, role in opened
    ]
    subject = subject_of(model, tokenizer, batch_size=batch_size, max_new_tokens=max_new_tokens, match=match)
    chat = chats_of(
        tokenizer,
        (
            instructed(item.content, *around, tokenizer)
            for part in parts
            for around in {(arm.system, arm.template) for arm in part.arms if arm.other is None}
            for item in part.task
        ),
    )
    told: dict[str, Any] = {
        "model": told_model(model, model_name),
        **({} if chat is None else {CHATS: chat.to_json()}),
        "steerings": [told_steering(name, plan, (paths or {}).get(name)) for name, plan in steerings.items()],
        "settings": vars(settings),
        **({"concepts": shuffled.told()} if shuffled.concepts else {}),
        **({} if subject.engine is None else {"engine": subject.engine}),
        **({"generation": own.to_json()} if own.in_words() else {}),
    }
    run = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "steersman": version("steersman"),
        **told,
        **base_cache.held(subject, told.get(CHATS)),
        "tasks": [
            [part.task.name, part.role, part.task.sha256, part.task.measure.record()] for part in parts
        ],
        "arms": [told_arm(arm, arms, paths or {}) for arm in arms],
    }
    folder = None if checkpoint is None else Path(valid_name(checkpoint, ArtifactError))
    store = RunStore(folder, run, resume=resume, more="random", finished=finished)
    files = base_cache.files(cache, subject, [part.task for part in parts], told, seed)
    runner = Runner(subject, parts, arms, others or {}, store, files, seed=seed, progress=progress)
    with closing(runner), evaluating(model):
        noted = runner.run(more=more_steps(parts, arms, settings, tuple(steerings), shuffled))
        asked = {part.task.name: done for part in parts if (done := runner.done(part))}
        if not asked:
            raise ArtifactError(f"{folder}: no batch is finished under every arm: there is nothing to report")
        tasks = [
            task_record(
                runner,
                part,
                asked[part.task.name],
                noted[part.task.name],
                arms,
                tuple(steerings),
                settings,
                shuffled,
            )
            for part in parts
            if part.task.name in asked
        ]
    result = {
        "format": "steersman-evaluation",
        "format_version": 1,
        "steersman": store.run["steersman"],
        "created": store.run["created"],
        "seed": seed,
        **told,
        "arms": [{**told_arm(arm, arms, paths or {}), "receipt": runner.receipt(arm)} for arm in arms],
        "tasks": tasks,
        "experts": expert_map(steerings, contrast, screen),
        "warnings": [
            *unfinished(runner, tasks, settings),
            *warnings(tasks, arms, tuple(steerings), runner),
        ],
        "limits": [
            *LIMITS,
            *([f"On every answer {own.in_words()}."] if own.in_words() else []),
            *subject.limits,
        ],
    }
    return Evaluation(
        json.loads(json.dumps(result, allow_nan=False)),
        {name: noted[name] for name in asked},
        asked,
        runner.ran,
    )


def _named(steering: Steering | Mapping[str, Steering] | None) -> dict[str, Steering]:
    if steering is None:
        return {}
    named = {"steered": steering} if isinstance(steering, Steering) else steering
    if not isinstance(named, Mapping) or not all(isinstance(plan, Steering) for plan in named.values()):
        raise PlanError(
            "steering is no plan: give a Steering (Steering.from_pretrained(path)), or {name: plan}"
        )
    return dict(named)


def _several(given: Any, kind: type[Kind]) -> tuple[Kind, ...]:
    """One object, or several, of a kind. Raises PlanError for anything else."""
    found = (given,) if isinstance(given, kind) else tuple(given)
    for one in found:
        check_kind(one, kind, PlanError)
    return found


def _tasks(given: Tasks, role: str, limit: int | None, judge: Judge | None) -> list[tuple[Task, str]]:
    several = isinstance(given, Iterable) and not isinstance(given, str | Task)
    each: Iterable[Any] = given if several else [given]
    return [(_task(one, limit, judge if role == "effect" else None), role) for one in each]


def _task(given: Any, limit: int | None, judge: Judge | None) -> Task:
    if isinstance(given, Task):
        return given if judge is None else given.judged_by(judge)
    return load_task(given, limit=limit, judge=judge)


def _check_judge(judge: Any) -> None:
    if judge is not None and not hasattr(judge, "judge"):
        raise JudgeError(f"judge is {told(judge)}: right is what load_judge(NAME) gives")


def _checked(settings: Settings) -> Settings:
    least = {
        "random": 0,
        "control_items": 2,
        "batch_size": 1,
        "max_new_tokens": 1,
        "shown": 0,
        "seed": 0,
    }
    whole: dict[str, Any] = {
        name: whole_number(name, vars(settings)[name], of, PlanError) for name, of in least.items()
    }
    return replace(settings, **whole)


def _check_figures(
    figures: RoutingContrast | CausalScreen, model: PreTrainedModel, match: Literal["weights", "architecture"]
) -> None:
    """The map of experts is this model's."""
    from steersman.models.architecture import read_architecture
    from steersman.models.identity import has_weights

    if not hasattr(figures, "architecture"):
        raise PlanError(f"a contrast or a screen is wanted for the map of experts, not {told(figures)}")
    alike = figures.architecture.id == read_architecture(model).id
    if not alike or (match == "weights" and not has_weights(model, figures.weights_id, "the map of experts")):
        of = f"{figures.model or 'a model'}, which has {'other weights' if alike else 'another structure'}"
        raise PlanError(
            f"the contrast or screen for the map of experts is of {of}: right is one of the model that is "
            "evaluated"
        )


def _check_models(model: PreTrainedModel, arms: Arms, match: Literal["weights", "architecture"]) -> None:
    """Before hours of work: every plan is for this model."""
    from steersman.models.apply import check_model

    for arm in arms:
        if arm.steering is not None:
            check_model(arm.steering, model, match)
