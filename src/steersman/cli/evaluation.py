"""Commands of evaluation: evaluate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from steersman.cli.failures import resumable
from steersman.cli.options import (
    BackendChoice,
    ModelChoice,
    SteeringChoice,
    SteeringType,
    backend_options,
    batch_size_option,
    force_option,
    given_option,
    json_option,
    match_option,
    max_new_tokens_option,
    model_options,
    output_option,
    resume_option,
    seed_option,
)
from steersman.cli.output import in_columns, put_out
from steersman.errors import PairsError, PlanError
from steersman.pairs import parse_json, read_text
from steersman.showing import count_of, on_one_line

if TYPE_CHECKING:
    from steersman import Evaluation, Steering


class StrengthsType(click.ParamType[tuple[float, ...]]):
    """Reads numbers such as ``0.25,0.5,0.75``."""

    name = "strengths"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            found = (float("nan"),)
        if not all(abs(strength) < 1e6 for strength in found):  # also false for NaN
            self.fail(f"{value!r}: right are numbers such as 0.25,0.5,0.75", parameter, context)
        return found


@click.command()
@model_options
@output_option("the evaluation")
@click.option("--task", "tasks", multiple=True, required=True, metavar="TASK", help="What is steered for.")
@click.option("--side", "sides", multiple=True, metavar="TASK", help="What steering may cost.")
@click.option(
    "--steering",
    "steerings",
    type=SteeringType(),
    multiple=True,
    metavar="[NAME=]PATH[@STRENGTH]",
    help="A saved steering; each is an arm.",
)
@click.option("--reverse", is_flag=True, help="Also each steering with its signs changed.")
@click.option(
    "--reversed",
    "backs",
    type=SteeringType(),
    multiple=True,
    metavar="[NAME=]PATH",
    help="The steering of the other direction (of steering NAME), saved by select --reverse.",
)
@click.option(
    "--instruction",
    metavar="TEXT",
    help="The prompt baseline: this system prompt, without steering and with.",
)
@click.option(
    "--other", "others", multiple=True, metavar="NAME=MODEL", help="Another model that is asked, unsteered."
)
@click.option(
    "--strengths",
    type=StrengthsType(),
    default=(),
    metavar="X,Y,…",
    help="A dose-response: each steering times these.",
)
@click.option(
    "--attacks",
    metavar="FILE",
    help='Templates around the prompt, one a line: {"name": …, "template": "… {prompt} …"}.',
)
@click.option("--defences", metavar="FILE", help='System prompts, one a line: {"name": …, "system": …}.')
@click.option(
    "--random",
    "draws",
    type=click.IntRange(min=0, max=9999),
    default=19,
    show_default=True,
    metavar="B",
    help="Random plans of the same shape that each steering is compared with (vectors: like states).",
)
@click.option(
    "--control-items",
    type=click.IntRange(min=2),
    default=100,
    show_default=True,
    metavar="N",
    help="On the first N items.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N items of each task.")
@click.option("--judge", metavar="JUDGE", help="Instead of the tasks' own.")
@max_new_tokens_option(64, ", where a task does not say")
@click.option(
    "--shown",
    type=click.IntRange(min=0),
    default=12,
    show_default=True,
    metavar="N",
    help="Items of each task that the report shows.",
)
@click.option(
    "--contrast",
    type=click.Path(path_type=Path),
    metavar="C",
    help="Risk differences for the report's map of experts.",
)
@click.option(
    "--screen",
    type=click.Path(path_type=Path),
    metavar="C",
    help="Causal effects for the report's map of experts.",
)
@click.option(
    "--concept",
    "concepts",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="V",
    help="The concept that a steering was made of: its label-shuffled ones are a control too.",
)
@click.option(
    "--map",
    "maps",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="M",
    help="The map through which it was transplanted.",
)
@match_option
@resume_option
@click.option(
    "--finished",
    is_flag=True,
    help="Report what is finished of a run that was stopped, or goes on, and run nothing.",
)
@click.option("--no-cache", is_flag=True, help="Neither use nor keep what the unsteered model did.")
@click.option("--attach", is_flag=True, help="Put what was found into each steering's evidence.")
@batch_size_option(32)
@backend_options
@seed_option
@force_option
@json_option
def evaluate(
    model: ModelChoice,
    backend: BackendChoice,
    output: Path,
    tasks: tuple[str, ...],
    sides: tuple[str, ...],
    steerings: tuple[SteeringChoice, ...],
    reverse: bool,
    backs: tuple[SteeringChoice, ...],
    instruction: str | None,
    others: tuple[str, ...],
    strengths: tuple[float, ...],
    attacks: str | None,
    defences: str | None,
    draws: int,
    control_items: int,
    limit: int | None,
    judge: str | None,
    max_new_tokens: int,
    shown: int,
    contrast: Path | None,
    screen: Path | None,
    concepts: tuple[Path, ...],
    maps: tuple[Path, ...],
    match: Literal["weights", "architecture"],
    resume: bool,
    finished: bool,
    no_cache: bool,
    attach: bool,
    batch_size: int,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Measure what steering does to MODEL, and what else it does: effect, side effects, controls, report.

    FOLDER holds evaluation.json, items.jsonl and the reports. Progress is saved beside it, in
    FOLDER.partial, until it is written.

    \b
    Examples:
      steersman evaluate lab:moe --task lab:refusal --side lab:ordinary --steering safer -o evaluation
      steersman evaluate lab:moe --task lab:refusal --steering safer --reverse --strengths 0.25,0.5,0.75 \\
          --instruction "refuse what is restricted ." -o evaluation
      steersman evaluate MODEL --task xstest:xstest_prompts.csv --side text:wiki.txt --steering safer -o out
    """
    from steersman import AffineMap, ConceptVector
    from steersman import evaluate as measure
    from steersman.artifacts import check_free
    from steersman.cache import cache_directory
    from steersman.evaluation.result import FILES
    from steersman.evaluation.run_store import discard, unwanted
    from steersman.progress import is_saved

    check_free(output, force=force, ours=FILES)
    named = output if output.name not in ("", "..") else output.resolve()  # "." has no name to add to
    partial = named.with_name(f"{named.name}.partial")
    if finished and attach:
        raise PlanError("--finished and --attach: evidence is of a whole run; right is one of them")
    if force and not resume and not finished:
        discard(partial)
    if is_saved(partial) and not resume and not finished:
        raise unwanted(partial)
    if reverse and backs:
        raise PlanError("--reverse and --reversed: right is one of them")
    plans, paths = _opened(steerings)
    chosen = _chosen_judge(judge)
    back = _backs(backs, plans)
    if others and backend.on_engine:
        raise PlanError("--other goes with --backend transformers: an engine runs one model")
    most = batch_size if given_option("batch_size") else None
    with resumable(partial), _open(model, backend, [*plans.values(), *back.values()], match, most) as opened:
        evaluation = measure(
            opened.model,
            opened.tokenizer,
            plans,
            task=tasks,
            side_tasks=sides,
            reverse=back or reverse,
            instruction=instruction,
            others=_others(others, model),
            strengths=strengths,
            attacks=None if attacks is None else named_texts(attacks, "template"),
            defences=None if defences is None else named_texts(defences, "system"),
            random=draws,
            control_items=control_items,
            limit=limit,
            judge=chosen,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            shown=shown,
            seed=seed,
            match=match,
            contrast=_contrast(contrast),
            screen=_screen(screen),
            concepts=[ConceptVector.from_pretrained(place) for place in concepts],
            maps=[AffineMap.from_pretrained(place) for place in maps],
            model_name=model.name,
            paths={**dict(text.split("=", 1) for text in others if "=" in text), **paths},
            checkpoint=partial,
            resume=resume,
            finished=finished,
            cache=None if no_cache else cache_directory() / "evaluations",
            progress=True,
            subject_of=opened.subject_of,
        )
        evaluation.save(output, force=force)
    if not finished:
        discard(partial)
    if attach:
        _attach(steerings, evaluation)
    result = {"output": str(output), **evaluation.to_json()}
    put_out(result, as_json, lambda: in_words(evaluation, output))


@dataclass(frozen=True)
class _Opened:
    """A model, its tokenizer, and what makes the subject of an evaluation of them."""

    model: Any
    tokenizer: Any
    subject_of: Callable[..., Any]


@contextmanager
def _open(
    model: ModelChoice,
    backend: BackendChoice,
    plans: Sequence[Steering],
    match: Literal["weights", "architecture"],
    most: int | None,
) -> Iterator[_Opened]:
    """The model with whatever runs it; an engine with room for plans of these forms."""
    if not backend.on_engine:
        from steersman.evaluation.arms import Subject

        yield _Opened(*model.open(), Subject)
        return
    named = {f"given-{number}": plan for number, plan in enumerate(plans) if plan.edits}
    routed = any(edit.point == "router" for plan in plans for edit in plan.edits)  # random ones use alike
    with backend.engine(model, steerings=named, count=int(routed), match=match, most_at_once=most) as engine:
        from steersman.vllm.evaluation import EngineSubject

        yield _Opened(engine.model, engine.tokenizer, EngineSubject.of(engine))


def in_words(evaluation: Evaluation, output: Path) -> str:
    """A table for each task, and what to be warned of."""
    from steersman.certainty import CANNOT_TELL, Control, controls_in_words
    from steersman.evaluation.concluded import family_of

    table = evaluation.table()
    told = evaluation.to_json()
    parts = []
    for task in told["tasks"]:
        first = task["metrics"][0]
        rows = table[(table["task"] == task["name"]) & (table["metric"] == first["name"])]
        moved = {arm: of.get("change") for arm, of in (task["preferences"] or {}).items()}
        lines = [(*_row(row), *_moved(row["arm"], moved)) for row in rows.to_dict("records")]
        title = on_one_line(
            f"{task['name']} ({task['role']}): {first['title']}, {count_of(task['items'], 'item')}"
        )
        parts.append(f"{title}\n{in_columns((*COLUMNS, *([PREFERENCE] if moved else [])), lines)}")
        for control in task["random"] or ():
            among = Control(len(control["draws"]), control["p"])
            parts.append(
                f"{on_one_line(control['steering'])} among {family_of(control)} "
                f"({on_one_line(_measured_by(control))}): {control['observed']:+.3f}, "
                f"theirs {control['mean']:+.3f} on average; "
                f"{'beyond them' if among.beaten else CANNOT_TELL}: "
                f"{controls_in_words(among, control['at_least'], family_of(control))}"
            )
    parts += [f"warning: {on_one_line(warning)}" for warning in told["warnings"]]
    return "\n\n".join([*parts, f"the report is {output / 'report.html'}"])


COLUMNS = ("arm", "value", "95% interval", "against base", "p (Holm)", "verdict")
PREFERENCE = "change of d (nats)"


def _moved(arm: str, changes: Mapping[str, Mapping[str, Any] | None]) -> tuple[str, ...]:
    """How an arm moves the log-odds of the two answers, with its interval; nothing where they have none."""
    if not changes:
        return ()
    change = changes.get(arm)
    return ("" if change is None else _with_interval(change["difference"], change["low"], change["high"]),)


def _with_interval(value: Any, low: Any, high: Any) -> str:
    return f"{_number(value, '+.3f')} [{_number(low, '+.3f')}, {_number(high, '+.3f')}]"


def _number(value: Any, form: str = ".3f") -> str:
    return "–" if value is None or value != value else format(value, form)


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    change = (
        ""
        if row["arm"] == "base"
        else _with_interval(row["difference"], row["difference_low"], row["difference_high"])
    )
    return (
        row["arm"],
        _number(row["value"]),
        f"[{_number(row['low'])}, {_number(row['high'])}]",
        change,
        "" if not change else _number(row["p_holm"], ".2g"),
        row["verdict"] if isinstance(row["verdict"], str) else "",
    )


def named_texts(source: str, field: str) -> dict[str, str]:
    """Name → text of a JSONL file of {"name", FIELD}. Raises PairsError that names the line."""
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(Path(source)).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise PairsError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict) or set(row) != {"name", field}:
            raise PairsError(f'{where}: right is {{"name": …, "{field}": …}} and nothing else')
        name, text = row["name"], row[field]
        if not isinstance(name, str) or not isinstance(text, str) or not name.strip() or not text.strip():
            raise PairsError(f'{where}: "name" and "{field}" must be texts, and not empty')
        if name in found:
            raise PairsError(f"{where}: the name {name!r} is there twice")
        found[name] = text
    if not found:
        raise PairsError(f"{source}: holds nothing")
    return found


def _opened(steerings: tuple[SteeringChoice, ...]) -> tuple[dict[str, Steering], dict[str, str]]:
    plans: dict[str, Steering] = {}
    paths: dict[str, str] = {}
    for choice in steerings:
        name = choice.name or (Path(choice.path).name or choice.path)
        if choice.name is None:
            name += choice.dial
        if name in plans:
            raise PlanError(f"--steering {choice}: two are called {name!r}; name them apart: NAME=PATH")
        plans[name], paths[name] = choice.open(named=True), f"{choice.path}{choice.dial}"
    return plans, paths


def _backs(backs: tuple[SteeringChoice, ...], plans: Mapping[str, Steering]) -> dict[str, Steering]:
    found: dict[str, Steering] = {}
    for choice in backs:
        name = choice.name
        if name is None:
            if len(plans) != 1:
                raise PlanError(f"--reversed {choice}: say which steering it reverses: NAME=PATH")
            name = next(iter(plans))
        if name not in plans:
            raise PlanError(
                f"--reversed {choice}: there is no steering {name!r}; there are {', '.join(plans)}"
            )
        if name in found:
            raise PlanError(
                f"--reversed {choice}: {name!r} is reversed twice; right is one plan of the other direction"
            )
        found[name] = choice.open()
    return found


def _others(others: tuple[str, ...], model: ModelChoice) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for text in others:
        name, equals, place = text.partition("=")
        if not equals or not name or not place:
            raise PlanError(
                f"--other {text}: right is NAME=MODEL, such as instructed=allenai/OLMoE-1B-7B-0125-Instruct"
            )
        if name in found:
            raise PlanError(f"--other {text}: two are called {name!r}; name them apart")
        found[name] = functools.partial(
            _open_other, ModelChoice(place, model.device, model.dtype, None), model
        )
    return found


def _open_other(other: ModelChoice, model: ModelChoice) -> Any:
    """Another model, whose template (its own) takes the same day for today."""
    from steersman.chats.format import chat_format

    opened, tokenizer = other.open()
    if "chat_date" in model.chat:
        chat_format(tokenizer).date = model.chat["chat_date"]
    return opened, tokenizer


def _measured_by(control: dict[str, Any]) -> str:
    """What random plans were compared by: d in words, or the metric's name."""
    from steersman.evaluation.evaluation_report.tables import is_preference

    d = "how much likelier the positive answer is, log-odds"
    return d if is_preference(control) else str(control["measure"])


def _chosen_judge(judge: str | None) -> Any:
    if judge is None:
        return None
    from steersman.evaluation.judges import load_judge

    return load_judge(judge)


def _contrast(path: Path | None) -> Any:
    from steersman import RoutingContrast

    return None if path is None else RoutingContrast.from_pretrained(path)


def _screen(path: Path | None) -> Any:
    from steersman import CausalScreen

    return None if path is None else CausalScreen.from_pretrained(path)


def _attach(steerings: tuple[SteeringChoice, ...], evaluation: Evaluation) -> None:
    from steersman.evaluation.evaluation_report import with_evidence

    for choice in steerings:
        with_evidence(choice.path, evaluation.to_json())
