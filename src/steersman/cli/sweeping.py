"""The command that measures how far sets of experts go by their number: sweep."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from steersman.cli.options import (
    BackendChoice,
    ModelChoice,
    backend_options,
    batch_size_option,
    force_option,
    given_option,
    json_option,
    model_options,
    scope_option,
    seed_option,
)
from steersman.cli.output import in_columns, put_out, whole_file
from steersman.cli.screening import opened_for_screening
from steersman.errors import ArtifactError, PlanError

if TYPE_CHECKING:
    from steersman import CausalScreen, RoutingContrast
    from steersman.edits import Scope
    from steersman.evaluation.screening.options import By
    from steersman.evaluation.screening.sizes import Kind, SizeSweep


@click.command()
@model_options
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("items")
@click.option(
    "--sizes", metavar="N,N,…", help="Numbers of experts (default: powers of two, and a tenth of all)."
)
@click.option(
    "--kind",
    type=click.Choice(["activated", "deactivated", "both"]),
    multiple=True,
    help="What is done to them (default: each); may be repeated.",
)
@click.option(
    "--by",
    type=click.Choice(["d", "answer"]),
    default="d",
    show_default=True,
    help="d where the answers part, or d of the whole answers.",
)
@click.option(
    "--random",
    "draws",
    type=click.IntRange(min=0),
    default=19,
    show_default=True,
    metavar="N",
    help="Random sets of the same shape; 19 or more can show something.",
)
@click.option("--figure", type=click.Path(path_type=Path), metavar="FILE", help="A picture, .png or .svg.")
@click.option("--table", type=click.Path(path_type=Path), metavar="FILE", help="The numbers as .csv.")
@scope_option("all")
@click.option(
    "--limit",
    type=click.IntRange(min=2),
    default=400,
    show_default=True,
    metavar="N",
    help="Read at most N items, of as many groups as there are.",
)
@seed_option
@batch_size_option(128)
@backend_options
@force_option
@json_option
def sweep(
    model: ModelChoice,
    backend: BackendChoice,
    source: Path,
    items: str,
    sizes: str | None,
    kind: tuple[Kind, ...],
    by: By,
    draws: int,
    figure: Path | None,
    table: Path | None,
    scope: Scope,
    limit: int,
    seed: int,
    batch_size: int,
    force: bool,
    as_json: bool,
) -> None:
    """How far the first experts of SOURCE (a screen, or a contrast) move what MODEL would answer to ITEMS, by
    their number and in both directions, beside random experts of the same layers, kinds and use.

    \b
    Example:
      steersman sweep lab:moe causes lab:faithfulness/dev --figure sizes.png
    """
    from steersman.artifacts import read_manifest
    from steersman.evaluation.screening.screen import require_of_model
    from steersman.evaluation.screening.sizes import KINDS, sweep_sizes
    from steersman.experts.causal_effects import DIRECTIONS

    for path, suffixes in ((figure, (".png", ".svg")), (table, (".csv",))):
        if path is not None and path.suffix not in suffixes:
            raise ArtifactError(f"{path}: this is written as {' or '.join(suffixes)}")
    numbers = None if sizes is None else _numbers(sizes)
    made = _made(source, read_manifest(source)["kind"])
    most = batch_size if given_option("batch_size") else None
    with ExitStack() as files:
        for_figure, for_table = (
            None if path is None else files.enter_context(whole_file(path, force)) for path in (figure, table)
        )
        with opened_for_screening(model, backend, most) as (opened, tokenizer, runs):
            require_of_model(made, opened, str(source))
            found = sweep_sizes(
                opened,
                tokenizer,
                items,
                {direction: _order(made, direction == "reversed") for direction in DIRECTIONS},
                sizes=numbers,
                kinds=kind or KINDS,
                draws=draws,
                whole=by == "answer",
                scope=scope,
                limit=limit,
                seed=seed,
                batch_size=batch_size,
                progress=True,
                runs=runs,
            )
        if for_figure is not None:
            from steersman.evaluation.sizes_figure import sizes_figure

            sizes_figure(found.rows(), for_figure)
        if for_table is not None:
            found.table().to_csv(for_table, index=False)
    written = {name: str(path) for name, path in (("figure", figure), ("table", table)) if path is not None}
    put_out({**found.to_json(), **written}, as_json, lambda: _in_words(found))


def _numbers(sizes: str) -> list[int]:
    parts = [part.strip() for part in sizes.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise PlanError(f"--sizes {sizes}: right are whole numbers from 1, such as 1,4,16")
    return [int(part) for part in parts]


def _made(source: Path, kind: str) -> CausalScreen | RoutingContrast:
    from steersman import CausalScreen, RoutingContrast

    if kind == "causal_screen":
        return CausalScreen.from_pretrained(source)
    if kind == "routing_contrast":
        return RoutingContrast.from_pretrained(source)
    raise ArtifactError(f"{source}: experts are swept of a screen or a contrast; this is: {kind}")


def _order(made: CausalScreen | RoutingContrast, reverse: bool) -> list[tuple[int, int, float]]:
    """The experts of a screen or a contrast in the order in which sets take them."""
    from steersman import CausalScreen

    return made.order(reverse=reverse) if isinstance(made, CausalScreen) else made.ranking(reverse=reverse)


def _in_words(found: SizeSweep) -> str:
    rows = []
    for row in found.rows():
        interval = "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
        band = f"{row['random_low']:+.3f} to {row['random_high']:+.3f}" if row["draws"] else "–"
        rows.append(
            [
                row["direction"],
                row["kind"],
                row["experts"],
                f"{row['change']:+.3f}{interval}",
                band,
                f"{row['as_far']} of {row['draws']}",
                row["verdict"],
            ]
        )
    header = ("direction", "kind", "experts", "change of d", "95 % of random sets", "as far", "verdict")
    facts = found.to_json()
    return (
        f"{facts['task']}: {facts['items']} items, d unsteered {facts['unsteered']:+.3f} nats\n"
        + in_columns(header, rows)
    )
