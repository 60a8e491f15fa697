"""The command that finds the experts which cause a behaviour: screen; and what select and show say of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.certainty import MARGIN, verdict
from steersman.cli.failures import resumable
from steersman.cli.options import (
    BackendChoice,
    ModelChoice,
    backend_options,
    batch_size_option,
    force_option,
    given_option,
    json_option,
    model_options,
    output_option,
    resume_option,
    scope_option,
    seed_option,
)
from steersman.cli.output import in_columns, number, put_out, require_free
from steersman.errors import PlanError
from steersman.showing import count_of, on_one_line

if TYPE_CHECKING:
    from steersman import CausalScreen, Steering
    from steersman.edits import Scope
    from steersman.evaluation.screening.options import By, Choose, Method, Signs
    from steersman.evaluation.screening.screen import Runs

SHOWN = 12
"""Experts that are listed; the table has them all."""


@click.command()
@model_options
@click.argument("items")
@output_option("the screen")
@click.option(
    "--contrast",
    type=click.Path(path_type=Path),
    help="A contrast of the same model: its risk differences stand beside the effects.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="TASK",
    help="What the sets must not harm: right answers, or another behaviour as it is; may be repeated.",
)
@click.option(
    "--harm",
    multiple=True,
    metavar="TASK",
    help="Measure the sets on this in the end, by what the model then answers; may be repeated.",
)
@click.option(
    "--method",
    type=click.Choice(["auto", "exact", "estimate"]),
    default="auto",
    show_default=True,
    help="Run every expert, estimate all at once, or estimate all and run the best.",
)
@click.option(
    "--signs",
    type=click.Choice(["both", "deactivate", "activate"]),
    default="both",
    show_default=True,
    help="What is done to an expert, and what sets are made of.",
)
@click.option(
    "--by",
    type=click.Choice(["d", "answer"]),
    default="d",
    show_default=True,
    help="What experts and sets go by: d where the answers part, or d of the whole answers.",
)
@click.option(
    "--choose",
    type=click.Choice(["greedy", "rounds"]),
    default="greedy",
    show_default=True,
    help="Sets pick by pick, or in rounds of estimates, for many experts.",
)
@click.option(
    "--subsets",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Also steer N random subsets an item, for experts that stand in for each other.",
)
@click.option(
    "--at-most",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Experts in a set.",
)
@click.option("--no-sets", is_flag=True, help="Only screen: all items do, and no sets are chosen.")
@click.option(
    "--exact-runs",
    type=click.IntRange(min=1),
    default=48,
    show_default=True,
    metavar="N",
    help="With auto: how many of the best are run.",
)
@click.option(
    "--least-t",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    metavar="T",
    help="What t of its gain the next expert of a set must reach.",
)
@click.option("--gate-q", type=float, default=0.05, show_default=True, help="An effect counts below this q …")
@click.option(
    "--gate-effect", type=float, default=0.1, show_default=True, help="… and from this size on, in nats."
)
@scope_option("all")
@click.option(
    "--limit",
    type=click.IntRange(min=20),
    default=400,
    show_default=True,
    metavar="N",
    help="Read at most N items of a task, of as many groups as there are.",
)
@resume_option
@seed_option
@batch_size_option(128)
@backend_options
@force_option
@json_option
def screen(
    model: ModelChoice,
    backend: BackendChoice,
    items: str,
    output: Path,
    contrast: Path | None,
    keep: tuple[str, ...],
    harm: tuple[str, ...],
    method: Method,
    signs: Signs,
    by: By,
    choose: Choose,
    subsets: int,
    at_most: int,
    no_sets: bool,
    exact_runs: int,
    least_t: float,
    gate_q: float,
    gate_effect: float,
    scope: Scope,
    limit: int,
    resume: bool,
    seed: int,
    batch_size: int,
    force: bool,
    as_json: bool,
) -> None:
    """Find the experts of MODEL that cause what the two answers of ITEMS differ in.

    ITEMS is a task whose items have both answers, or contrast pairs that differ in the last answer alone.
    Progress is saved beside the output, in FOLDER.partial, until the output is written.

    \b
    Examples:
      steersman screen lab:moe lab:refusal/train -o causes --keep lab:ordinary/train
      steersman screen lab:moe lab:faithfulness/train -o causes --contrast faithful \\
          --keep lab:ordinary/train --keep lab:refusal/train --harm lab:refusal/dev
      steersman select causes -o faithful-plan
    """
    require_free(output, force)
    from steersman import RoutingContrast, screen_experts
    from steersman.experts.causal_effects import Gate
    from steersman.progress import discard, is_saved, refuse_unwanted, units_done

    named = output if output.name not in ("", "..") else output.resolve()  # "." has no name to add to
    partial = named.with_name(f"{named.name}.partial")
    if not resume and not force:
        refuse_unwanted(partial)
    if resume and not is_saved(partial):
        click.echo(f"steersman: no progress in {partial} to go on from: starting at the beginning", err=True)
    if not (0 < gate_q <= 1 and 0 <= gate_effect < math.inf):
        raise PlanError(
            f"--gate-q {gate_q:g} --gate-effect {gate_effect:g}: right is a q above 0, at most 1, and an "
            "effect from 0"
        )
    counted = None if contrast is None else RoutingContrast.from_pretrained(contrast)
    most = batch_size if given_option("batch_size") else None
    with resumable(partial), opened_for_screening(model, backend, most) as (opened, tokenizer, runs):
        if force and not resume:
            discard(partial)
        before = units_done(partial)
        found = screen_experts(
            opened,
            tokenizer,
            items,
            keep=keep,
            harm=harm,
            contrast=counted,
            method=method,
            signs=signs,
            by=by,
            choose=choose,
            subsets=subsets,
            at_most=0 if no_sets else at_most,
            exact_runs=exact_runs,
            least_t=least_t,
            gate=Gate(gate_q, gate_effect),
            scope=scope,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            checkpoint=partial,
            resume=resume,
            progress=True,
            runs=runs,
        )
        found.save_pretrained(output, force=force)
    discard(partial)
    result = {"output": str(output), **screen_for_json(found)}
    if resume:
        result["resumed_after"] = before
    put_out(result, as_json, lambda: f"{output}: a causal screen\n{screen_in_words(found)}")


@contextmanager
def opened_for_screening(
    model: ModelChoice, backend: BackendChoice, most: int | None
) -> Iterator[tuple[Any, Any, Runs]]:
    """The model, its tokenizer, and what runs the measurements."""
    from steersman.evaluation.screening.screen import Runs

    if not backend.on_engine:
        yield (*model.open(), Runs())
        return
    with backend.engine(model, all_sites=True, most_at_once=most) as engine:
        from steersman.vllm.screening import on_engine

        yield engine.model, engine.tokenizer, on_engine(engine)


def screen_for_json(found: CausalScreen) -> dict[str, Any]:
    """What was found: whether anything was, the sets, what they harm, and the experts with the largest
    effects.
    """
    passing = found.ranking() + found.ranking(reverse=True)
    return {
        "found": found.found,
        "reason": found.reason,
        "method": found.method,
        "signs": list(found.signs),
        "scope": found.scope,
        "layers": found.layers,
        "items": found.items,
        "clusters": found.clusters,
        "choosing_items": found.choosing_items,
        "gate": vars(found.gate),
        "passing": len(passing),
        "sets": {direction: chosen.to_json() for direction, chosen in found.sets.items()},
        "harm": [dict(entry) for entry in found.harm],
        "agreement_with_risk_difference": found.agreement(),
        "notes": list(found.notes),
        "made_from": [dict(source) for source in found.made_from],
        "top": [
            {key: _plain(value) for key, value in row.items()}
            for row in found.table().head(SHOWN).to_dict("records")
        ],
    }


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return number(value) if isinstance(value, float) else value


def screen_in_words(found: CausalScreen) -> str:
    """The same for people: effects beside risk differences, the sets, what they harm."""
    lines = [
        f"{count_of(found.items, 'item')} in {count_of(found.clusters, 'group')} screened "
        f"{count_of(len(found.layers), 'layer')}, "
        f"signs {on_one_line(', '.join(found.signs))}; method {on_one_line(found.method)}",
        on_one_line(found.reason),
        *(f"note: {on_one_line(note)}" for note in found.notes),
        "",
        _effects_in_words(found),
    ]
    agreement = found.agreement()
    if agreement:
        said = ", ".join(f"{value:+.2f} ({sign})" for sign, value in agreement.items())
        lines += ["", f"rank correlation of risk difference and effect: {said}"]
    for direction, chosen in found.sets.items():
        lines += [
            "",
            f"{direction}: {_set_in_words(chosen)}",
            f"  then it stopped: {on_one_line(chosen.reason)}",
        ]
    if found.harm:
        lines += [
            "",
            in_columns(
                ("task", "direction", "side", "base", "steered", "difference", "verdict"), _harm_rows(found)
            ),
        ]
    return "\n".join(lines)


def _effects_in_words(found: CausalScreen) -> str:
    table = found.table().head(SHOWN)
    observed = "risk_difference" in table
    rows = []
    for row in table.to_dict("records"):
        cells: list[object] = [row["causal_rank"], row["layer"], row["expert"]]
        for sign in found.signs:
            exact = "" if row[f"{sign}_exact"] else "~"
            effect, q = row[f"{sign}_effect"], row[f"{sign}_q"]
            cells += ["–", "–"] if effect != effect else [f"{exact}{effect:+.3f}", f"{q:.2g}"]
        cells.append(row["verdict"])
        if observed:
            cells += [f"{row['risk_difference']:+.3f}", row["observational_rank"]]
        rows.append(cells)
    header = ["causal rank", "layer", "expert"]
    header += [name for sign in found.signs for name in (f"{sign}: effect", "q")]
    header += ["verdict", *(["risk difference", "its rank"] if observed else [])]
    estimated = "\n~ estimated" if any("~" in str(cell) for cells in rows for cell in cells) else ""
    return in_columns(header, rows) + estimated


def _set_in_words(chosen: Any) -> str:
    if not chosen.picks:
        return "no expert"
    named = ", ".join(
        f"{pick.layer}:{pick.expert} {'in' if pick.strength > 0 else 'out'} (+{pick.gain:.3f})"
        for pick in chosen.picks
    )
    return f"{named}; together d moves {chosen.shift:+.2f} ± {1.96 * chosen.shift_error:.2f} nats"


def _harm_rows(found: CausalScreen) -> list[list[object]]:
    return [
        [
            entry["task"],
            entry["direction"],
            entry["side"],
            f"{entry['base']['rate']:.3f}",
            f"{entry['steered']['rate']:.3f}",
            f"{entry['difference']['difference']:+.3f} "
            f"[{entry['difference']['low']:+.3f}, {entry['difference']['high']:+.3f}]",
            verdict(entry["difference"]["low"], entry["difference"]["high"], margin=MARGIN),
        ]
        for entry in found.harm
    ]


@dataclass(frozen=True)
class _Map:
    """What a map shows of a screen: a number an expert, under the name that maps have for it."""

    layers: list[int]
    risk_difference: Any


def draw_screen(found: CausalScreen, plan: Steering | None, place: Path) -> None:
    """The effect of every expert, layers down and experts across, those with the largest numbered."""
    from steersman.evaluation.figures import heatmap

    sign = found.signs[-1]
    effects = found.activate.mean if sign == "activate" else -found.deactivate.mean
    measure = (
        "effect of putting it in (nats)"
        if sign == "activate"
        else "minus the effect of keeping it out (nats)"
    )
    heatmap(_Map(found.layers, effects), plan, place, measure=measure, ranked=SHOWN)
