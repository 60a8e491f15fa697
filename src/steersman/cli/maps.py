"""The command that fits affine maps between models, and what it says of them."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.cli.concepts import check_plot
from steersman.cli.failures import resumable
from steersman.cli.options import (
    LayersType,
    ModelChoice,
    batch_size_option,
    chat_options,
    force_option,
    json_option,
    output_option,
    resume_option,
    seed_option,
)
from steersman.cli.output import (
    in_columns,
    next_steps,
    number,
    progress_beside,
    put_out,
    require_free,
    unused,
    whole_file,
)
from steersman.errors import ArtifactError, PairsError
from steersman.showing import count_of, on_one_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from steersman import AffineMap
    from steersman.concepts.affine_map import MapTable
    from steersman.concepts.alignment import Rows


@click.command("map", short_help="Fit an affine map from a model to another.")
@click.argument("source")
@click.argument("target")
@click.argument("texts")
@output_option("the map")
@click.option(
    "--concept",
    "concepts",
    metavar="V",
    multiple=True,
    help="A concept of SOURCE, which chooses the source layer, and whose prompts are texts too; repeatable.",
)
@click.option(
    "--without-prompts",
    is_flag=True,
    help="Leave the concepts' own prompts out of what the map is fitted on.",
)
@click.option(
    "--source-layers",
    type=LayersType(),
    metavar="LAYERS",
    help="Such as 3 or 0,2-4 [default: all; with --concept, its best].",
)
@click.option(
    "--target-layers", type=LayersType(), metavar="LAYERS", help="The same of TARGET [default: all]."
)
@click.option(
    "--rows",
    type=click.Choice(["boundaries", "last"]),
    default="boundaries",
    show_default=True,
    help="Every place where both tokenizers end a token, or the last token of each text.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Fit every pair of layers on all rows, where else a sample chooses the pairs.",
)
@click.option("--sequential", is_flag=True, help="Open one model after the other; states wait on disk.")
@click.option(
    "--source-states",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the source's states here, and reuse them for the next target.",
)
@click.option("--shard", metavar="I/N", help="Read part I of N; merge adds them up.")
@resume_option
@click.option("--truncate", is_flag=True, help="Leave out texts that are too long for a model.")
@click.option("--device", metavar="DEVICE", help="Of both models: cpu, cuda, cuda:1, mps, or auto.")
@click.option("--source-device", metavar="DEVICE", help="Of the source.")
@click.option("--target-device", metavar="DEVICE", help="Of the target.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Number format of the weights (default: the checkpoints').",
)
@click.option("--source-revision", metavar="REV", help="Branch, tag or commit of the source on the Hub.")
@click.option("--target-revision", metavar="REV", help="The same of the target.")
@functools.partial(chat_options, side="source")
@functools.partial(chat_options, side="target")
@click.option(
    "--heatmap",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="R² of all pairs of layers, .png or .svg.",
)
@batch_size_option(16)
@seed_option
@force_option
@json_option
def map_(
    source: str,
    target: str,
    texts: str,
    output: Path,
    concepts: tuple[str, ...],
    without_prompts: bool,
    source_layers: Any,
    target_layers: Any,
    rows: Rows,
    exact: bool,
    sequential: bool,
    source_states: Path | None,
    shard: str | None,
    resume: bool,
    truncate: bool,
    device: str | None,
    source_device: str | None,
    target_device: str | None,
    dtype: str | None,
    source_revision: str | None,
    target_revision: str | None,
    source_chat: Mapping[str, Any],
    target_chat: Mapping[str, Any],
    heatmap: Path | None,
    batch_size: int,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Fit affine maps from SOURCE's states to TARGET's, over TEXTS that both read.

    TEXTS is a file with a text or chat a line, or lab:NAME. About one text in five judges the map instead of
    making it. With --concept half of the groups of its pairs are texts too; the others judge in transplant.
    A sample chooses each target layer's source layer, unless a concept does. Progress is saved beside the
    output, in FOLDER.partial, until the output is written.

    \b
    Examples:
      steersman map lab:source lab:target lab:texts -o bridge
      steersman map small big texts.jsonl -o bridge --concept refusal --sequential
      steersman map small big texts.jsonl -o part-2 --shard 2/8
    """
    require_free(output, force)
    check_heatmap(heatmap, shard, force, output)
    if Path(texts).is_dir():
        raise PairsError(
            f"{texts}: is a folder; TEXTS is a file or lab:NAME, and the order is SOURCE TARGET TEXTS"
        )
    from steersman import ConceptVector, fit_affine_map
    from steersman.cli.quiet import quiet_libraries
    from steersman.progress import discard

    partial = progress_beside(output, resume, force, "the first text")
    quiet_libraries()
    with resumable(partial):
        refined = [ConceptVector.from_pretrained(concept) for concept in concepts]
        if force and not resume:
            discard(partial)
        found = fit_affine_map(
            source,
            target,
            texts,
            source_layers=_layers(source_layers),
            target_layers=_layers(target_layers),
            rows=rows,
            concept=refined,
            concept_prompts=not without_prompts,
            exact=exact,
            sequential=sequential,
            source_states=source_states,
            batch_size=batch_size,
            shard=shard,
            checkpoint=partial,
            resume=resume,
            progress=True,
            seed=seed,
            truncate=truncate,
            source_options={
                "device": source_device or device,
                "dtype": dtype,
                "revision": source_revision,
                **source_chat,
            },
            target_options={
                "device": target_device or device,
                "dtype": dtype,
                "revision": target_revision,
                **target_chat,
            },
        )
        _save(found, output, heatmap, force)
    discard(partial)
    result = {"output": str(output), **map_for_json(found)}
    if heatmap is not None:
        result["heatmap"] = str(heatmap)
    of_source = ModelChoice(source, source_device or device, dtype, source_revision, source_chat)
    of_target = ModelChoice(target, target_device or device, dtype, target_revision, target_chat)
    following = (
        "" if shard else _transplant_next(of_source, of_target, output, concepts[0] if concepts else None)
    )
    put_out(result, as_json, lambda: map_in_words(found) + following)


def _transplant_next(source: ModelChoice, target: ModelChoice, output: Path, concept: str | None) -> str:
    """What follows on a map: a concept that goes through it, and the target steered by it."""
    refined, plan = concept or unused("concept"), unused(f"{output}-steering")
    refine = ["refine", *source.typed(), source.pairs(), "-o", refined]
    return next_steps(
        "Next, take the concept through it, and hear the target steered by it",
        *([] if concept else [refine]),
        ["transplant", refined, output, "-o", plan, "--strength", "dose:0.3", *target.typed()[1:]],
        ["chat", *target.typed(), "--steering", plan],
    )


def merge_maps(parts: Sequence[Path], output: Path, force: bool, as_json: bool) -> None:
    """Add up parts of an affine map: what `merge` does with them."""
    from steersman import AffineMap, merge_affine_maps

    merged = merge_affine_maps([AffineMap.from_pretrained(path) for path in parts])
    merged.save_pretrained(output, force=force)
    put_out({"output": str(output), **map_for_json(merged)}, as_json, lambda: map_in_words(merged))


def _layers(asked: Any) -> tuple[int, ...] | None:
    return None if asked in (None, "all") else asked


def check_heatmap(path: Path | None, shard: str | None, force: bool, output: Path | None = None) -> None:
    """Raise before any work where a picture cannot be drawn, or its place is taken."""
    if path is not None and shard is not None:
        raise ArtifactError(f"{path}: a part has no R² to draw; show --heatmap draws the merged map")
    check_plot(path, force, output)


def _save(found: AffineMap, output: Path, heatmap: Path | None, force: bool) -> None:
    with whole_file(heatmap, force) if heatmap is not None else nullcontext() as place:
        if place is not None:
            draw_map(found, place)
        found.save_pretrained(output, force=force)


def draw_map(found: AffineMap, path: Path) -> None:
    """Draw R² of all pairs of layers."""
    from steersman.evaluation.map_figure import map_heatmap

    map_heatmap(found, path)


def map_for_json(found: AffineMap) -> dict[str, Any]:
    """A map's layers with their quality, what they were fitted on, and every pair of layers."""
    others = [(target, of) for (_, target), of in found.others.items()]
    return {
        "maps": [
            {
                "source": of.source_layer,
                "target": layer,
                "rows": found.rows,
                "r2": number(of.r2),
                "r2_control": number(of.r2_control),
                "control_sd": number(of.control_sd),
                "ridge": of.ridge,
                "effective_rank": of.effective_rank,
                "norm": number(found.norms[layer].median),
            }
            for layer, of in sorted([*found.maps.items(), *others], key=lambda one: one[0])
        ],
        "source": found.source.name,
        "target": found.target.name,
        "rows": found.rows,
        "texts": found.texts,
        "held_out": {"rows": found.held_out_rows, "texts": found.held_out_texts},
        "skipped": found.skipped,
        "alignment": found.alignment,
        "shard": found.shard,
        "table": None if found.table is None else _table_for_json(found.table),
    }


def _table_for_json(table: MapTable) -> dict[str, Any]:
    return {
        "source_layers": list(table.source_layers),
        "target_layers": list(table.target_layers),
        "rows": table.rows,
        **{name: getattr(table, name).tolist() for name in ("r2", "r2_control", "source_rank", "condition")},
    }


def map_in_words(found: AffineMap) -> str:
    """What was fitted and how well it does, in words."""
    rows, texts = count_of(found.rows, "row"), count_of(found.texts, "text")
    lines = [
        on_one_line(f"{found.source.name or 'a model'} → {found.target.name or 'a model'}"),
        f"{rows} ({found.alignment}) of {texts}, of which held out: "
        f"{found.held_out_rows} of {found.held_out_texts}",
    ]
    if found.skipped:
        lines.append(
            f"{count_of(found.skipped, 'text')} left out: too long, or without a row that both models share"
        )
    if found.shard is not None:
        return "\n".join([*lines, f"part {found.shard}: merge all parts for the map"])
    caveat = (
        "R² is of states in general, on held-out texts: whether a concept arrives, transplant --check says"
    )
    return "\n".join([*lines, "", *(in_columns(*table) for table in found.as_tables()), "", caveat])
