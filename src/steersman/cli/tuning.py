"""The command that finds where and how hard to steer: tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from steersman.cli.composition import heard, plan_for_json
from steersman.cli.evaluation import StrengthsType
from steersman.cli.failures import resumable
from steersman.cli.options import (
    Command,
    ModelChoice,
    batch_size_option,
    force_option,
    json_option,
    layers_option,
    max_new_tokens_option,
    model_options,
    output_option,
    resume_option,
    seed_option,
)
from steersman.cli.output import in_columns, put_out, require_free
from steersman.errors import PlanError
from steersman.showing import count_of, on_one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from steersman import Tuning
    from steersman.cli.concepts import Layers
    from steersman.edits import Scope
    from steersman.evaluation.tuning.levers import Tunable

SHOWN = 8
"""Candidates that are listed; candidates.csv has them all."""


def _items_option(
    name: str, default: int | None, what: str, otherwise: str = "all"
) -> Callable[[Command], Command]:
    return click.option(
        name,
        type=click.IntRange(min=2),
        default=default,
        show_default=True if default is not None else otherwise,
        metavar="N",
        help=f"At most N {what}, of as many groups as there are.",
    )


@click.command()
@model_options
@click.argument("found", nargs=-1, required=True, metavar="CONCEPT...|CONTRAST|SCREEN|MAP CONCEPT...")
@output_option("the steering")
@click.option("--task", required=True, metavar="TASK", help="What is steered for.")
@click.option(
    "--test",
    metavar="TASK",
    help="Test items, where --task are development items [default: the task's own splits, else halves].",
)
@click.option(
    "--keep", multiple=True, required=True, metavar="TASK", help="What is left as it is; may be repeated."
)
@click.option(
    "--cost",
    "costs",
    multiple=True,
    default=("kl <= 0.3",),
    show_default=True,
    metavar="BOUND",
    help="What it may cost there: kl, lost or degenerate <= NUMBER; may be repeated.",
)
@click.option(
    "--side",
    type=click.Choice(["positive", "negative"]),
    default="positive",
    show_default=True,
    help="The side of the task that is steered for.",
)
@layers_option("Layers that are offered [default: all].")
@click.option("--doses", type=StrengthsType(), default=(), metavar="X,Y,…", help="Doses of the coarse grid.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["all", "prompt", "generated", "answer"]),
    multiple=True,
    help="Which tokens; several to choose from [default: answer for vectors; the screen's, or all].",
)
@click.option(
    "--controls",
    type=click.IntRange(min=0),
    default=19,
    show_default=True,
    metavar="N",
    help="Label-shuffled concepts, or random experts, that are tuned alike; 19 at least show anything.",
)
@click.option(
    "--answer-controls",
    type=click.IntRange(min=0),
    default=19,
    show_default=True,
    metavar="N",
    help="The first N of them answer too.",
)
@click.option(
    "--finalists",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="The best N candidates answer the development items.",
)
@click.option("--no-answers", is_flag=True, help="Log-odds alone, no answers.")
@click.option(
    "--whole-answers", is_flag=True, help="Log-odds of whole answers, not of the token where they part."
)
@_items_option("--dev-items", 48, "development items")
@_items_option("--test-items", None, "test items")
@_items_option(
    "--cost-items", None, "items of each kept task and part", "48 in the search for kl alone, else all"
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where the table and the pictures go [default: beside the steering, FOLDER-tuning].",
)
@max_new_tokens_option(32, ", where a task does not say")
@resume_option
@batch_size_option(32)
@seed_option
@force_option
@json_option
def tune(
    model: ModelChoice,
    found: tuple[str, ...],
    output: Path,
    task: str,
    test: str | None,
    keep: tuple[str, ...],
    costs: tuple[str, ...],
    side: Literal["positive", "negative"],
    layers: Layers,
    doses: tuple[float, ...],
    scopes: tuple[Scope, ...],
    controls: int,
    answer_controls: int,
    finalists: int,
    no_answers: bool,
    whole_answers: bool,
    dev_items: int | None,
    test_items: int | None,
    cost_items: int | None,
    report: Path | None,
    max_new_tokens: int,
    resume: bool,
    batch_size: int,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Find where and how hard to steer MODEL: the largest effect on a task at a cost that is bounded.

    Vectors: every layer and dose of a grid. Experts: kind and number, up to a tenth of all. What is chosen on
    development items is confirmed once on test items, beside controls that were tuned alike. Progress is
    saved beside the output, in FOLDER.partial, until it is written.

    \b
    Examples:
      steersman tune lab:source refusal --task lab:refusal --keep lab:ordinary -o safer
      steersman tune lab:target bridge refusal --task lab:refusal --keep lab:ordinary \\
          --cost "kl <= 0.2" --cost "lost <= 0.05" -o safer
      steersman tune lab:moe causes --task lab:refusal --keep lab:ordinary -o safer
    """
    named = output if output.name not in ("", "..") else output.resolve()  # "." has no name to add to
    report = named.with_name(f"{named.name}-tuning") if report is None else report
    partial = named.with_name(f"{named.name}.partial")
    require_free(output, force, [Path(path) for path in found])
    for other in (output, partial):
        one, two = report.resolve(), other.resolve()
        if one == two or one in two.parents or two in one.parents:
            raise PlanError(
                f"--report {report}: is, holds or is inside {other}, where the steering or its progress "
                "goes; right is a folder of its own"
            )
    from steersman import tune as search
    from steersman.artifacts import check_free
    from steersman.evaluation.run_store import discard, unwanted
    from steersman.evaluation.tuning.result import FILES
    from steersman.progress import is_saved

    check_free(report, force=force, ours=FILES)
    what = _open_found(found)
    if is_saved(partial) and not (resume or force):
        raise unwanted(partial)
    if resume and not is_saved(partial):
        click.echo(f"steersman: no progress in {partial} to go on from: starting at the beginning", err=True)
    if force and not resume:
        discard(partial)
    with resumable(partial):
        opened, tokenizer = model.open()
        tuned = search(
            opened,
            tokenizer,
            what,
            task=task,
            keep=keep,
            cost=costs,
            test=test,
            side=side,
            layers=None if layers == "all" else layers,
            scope=scopes,
            doses=doses,
            controls=controls,
            answer_controls=answer_controls,
            finalists=finalists,
            answers=not no_answers,
            whole_answers=whole_answers,
            dev_items=dev_items,
            test_items=test_items,
            cost_items=cost_items,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            checkpoint=partial,
            resume=resume,
            progress=True,
        )
    tuned.save(report, force=force)
    if tuned.steering is None:
        discard(partial)
        raise PlanError(f"{tuned.why_none}; every candidate is in {report / 'candidates.csv'}")
    tuned.steering.save_pretrained(output, force=force)
    discard(partial)
    result = {
        "output": str(output),
        "report": str(report),
        **plan_for_json(tuned.steering),
        "candidates": len(tuned.tried),
        "chosen": None if tuned.chosen is None else tuned.chosen.to_json(),
        "confirmed": None if tuned.confirmed is None else tuned.confirmed.to_json(),
    }
    words = _in_words(tuned, output, report)
    next_step = heard(output, tuned.steering)
    put_out(result, as_json, lambda: words + next_step)


def _open_found(paths: tuple[str, ...]) -> Tunable:
    """What is to be tuned, from the kinds of the artifacts named. Raises PlanError where they do not go
    together.
    """
    from steersman import AffineMap, CausalScreen, ConceptVector, RoutingContrast
    from steersman.artifacts import read_manifest

    kinds: dict[str, Any] = {
        "concept_vector": ConceptVector,
        "affine_map": AffineMap,
        "routing_contrast": RoutingContrast,
        "causal_screen": CausalScreen,
    }
    opened: dict[str, Any] = {}
    for path in dict.fromkeys(paths):
        kind = read_manifest(path)["kind"]
        if kind not in kinds:
            raise PlanError(
                f"{path}: a {kind.replace('_', ' ')} is not tuned; right is a concept, a map, a contrast or "
                "a causal screen"
            )
        opened[path] = kinds[kind].from_pretrained(path)
    concepts = {path: one for path, one in opened.items() if isinstance(one, ConceptVector)}
    maps = [one for one in opened.values() if isinstance(one, AffineMap)]
    if len(opened) == 1 and not concepts and not maps:
        only: Tunable = next(iter(opened.values()))
        return only
    by_name = {"" if len(concepts) == 1 else Path(path).name: one for path, one in concepts.items()}
    if (
        concepts
        and len(concepts) + len(maps) == len(opened)
        and len(maps) <= 1
        and len(by_name) == len(concepts)
    ):
        return (maps[0], by_name) if maps else by_name
    raise PlanError(
        f"{' '.join(paths)}: do not go together; right is one contrast or screen, or concepts (of different "
        "names), or one map and concepts of its source"
    )


def _in_words(tuned: Tuning, output: Path, report: Path) -> str:
    from steersman.evaluation.tuning.result import confirmed_in_words

    rows: list[list[object]] = []
    for one in tuned.tried[:SHOWN]:
        costs = ", ".join(
            f"{name} ≤ {cost.upper:.3f}{'' if cost.kept else ' ✗'}"
            for name, cost in (one.costs or {}).items()
        )
        chosen = "chosen" if tuned.chosen is not None and one.candidate == tuned.chosen.candidate else ""
        rows.append([one.candidate.in_words(), f"{one.effect.mean:+.3f}", costs, chosen])
    candidate = tuned.chosen.candidate.in_words() if tuned.chosen is not None else ""
    lines = [
        f"{output}: {on_one_line(candidate)}",
        f"{count_of(len(tuned.tried), 'candidate')} tried; those that move "
        f"{on_one_line(tuned.made['effect'])} most on development items:",
        "",
        in_columns(("candidate", "effect", "costs at most", ""), rows),
        "",
        "on test items:",
    ]
    if tuned.confirmed is not None:
        lines += [f"  {line}" for line in confirmed_in_words(tuned.confirmed)]
    return "\n".join([*lines, f"table and pictures: {report}"])
