"""Commands of concepts in one model: refine and steer."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from steersman.cli.composition import heard, made_in_words, plan_for_json, tuning_step
from steersman.cli.failures import resumable
from steersman.cli.options import (
    ModelChoice,
    batch_size_option,
    force_option,
    json_option,
    layers_option,
    model_options,
    output_option,
    resume_option,
    scope_option,
)
from steersman.cli.output import (
    in_columns,
    next_steps,
    progress_beside,
    put_out,
    require_free,
    unused,
    whole_file,
)
from steersman.errors import ArtifactError, PairsError
from steersman.showing import count_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from steersman import ConceptVector, Separation, Steering
    from steersman.concepts.concept import Method
    from steersman.concepts.positions import Position
    from steersman.edits import Operation, Scope

Layers = tuple[int, ...] | Literal["all"] | None


@click.command(short_help="Refine a concept vector from contrast pairs.")
@model_options
@click.argument("pairs")
@output_option("the concept vector")
@layers_option("Layers to refine at, from 0 [default: all].")
@click.option(
    "--position",
    type=click.Choice(["last", "target_mean"]),
    default="last",
    show_default=True,
    help="Read the last token, or the mean over the target's tokens.",
)
@click.option(
    "--method",
    type=click.Choice(["mean_difference", "pca", "pca_diff"]),
    default="mean_difference",
    show_default=True,
    help="The mean difference of the sides; the top direction of their differences (pca_center of repeng); "
    "or of these less their mean (repeng's default).",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Separation by layer as .png or .svg.",
)
@click.option("--truncate", is_flag=True, help="Leave out pairs that are too long for the model.")
@resume_option
@batch_size_option(16)
@force_option
@json_option
def refine(
    model: ModelChoice,
    pairs: str,
    output: Path,
    layers: Layers,
    position: Position,
    method: Method,
    plot: Path | None,
    truncate: bool,
    resume: bool,
    batch_size: int,
    force: bool,
    as_json: bool,
) -> None:
    """Refine a concept: in each layer of MODEL, the direction from PAIRS' negative to their positive side.

    The table says how well it tells held-out pairs apart: an AUROC, ½ being chance. Progress is saved beside
    the output, in FOLDER.partial, until the output is written.

    \b
    Examples:
      steersman refine lab:source lab:refusal/train -o refusal
      steersman refine lab:source pairs.jsonl -o concept --position target_mean --plot layers.png
    """
    require_free(output, force)
    check_plot(plot, force, output)
    if Path(pairs).is_dir():
        raise PairsError(f"{pairs}: is a folder; PAIRS is a file or lab:NAME, and the order is MODEL PAIRS")
    from steersman import load_pairs, refine_concept
    from steersman.progress import discard

    partial = progress_beside(output, resume, force, "the first pair")
    read = load_pairs(pairs, progress=True)
    opened, tokenizer = model.open()
    with resumable(partial):
        if force and not resume:
            discard(partial)
        concept = refine_concept(
            opened,
            tokenizer,
            read,
            layers=layers,
            position=position,
            method=method,
            batch_size=batch_size,
            truncate=truncate,
            checkpoint=partial,
            resume=resume,
            progress=True,
        )
        with whole_file(plot, force) if plot is not None else nullcontext() as picture:
            if picture is not None:
                draw_separation(concept, picture)
            concept.save_pretrained(output, force=force)
    discard(partial)
    result = {"output": str(output), **concept_for_json(concept)}
    if plot is not None:
        result["plot"] = str(plot)
    plan = unused(f"{output}-steering")
    following = next_steps(
        "Next, make a steering of it, and hear the model steered by it",
        ["steer", output, "-o", plan],
        ["chat", *model.typed(), "--steering", plan],
    )
    search = tuning_step(*model.typed(), output)
    put_out(result, as_json, lambda: _refined_in_words(result, concept) + following + search)


@click.command(short_help="Make a steering of a concept, for its own model.")
@click.argument("concept", metavar="CONCEPT")
@output_option("the steering")
@click.option(
    "--strength",
    metavar="X",
    help="A factor such as 1.5, or a dose: the length added, as a share of a state's [default: dose:0.3].",
)
@layers_option("Layers to steer at, or all [default: the one nearest to two thirds of the depth].")
@scope_option("answer")
@click.option(
    "--operation",
    type=click.Choice(["add", "project"]),
    default="add",
    show_default=True,
    help="Add the vector, or take its direction out (--strength 0 to 1).",
)
@force_option
@json_option
def steer(
    concept: str,
    output: Path,
    strength: str | None,
    layers: Layers,
    scope: Scope,
    operation: Operation,
    force: bool,
    as_json: bool,
) -> None:
    """Make a steering of CONCEPT for the model that it was refined in.

    Layer and dose are defaults where none are given: `steersman tune` finds those that work.

    \b
    Examples:
      steersman steer refusal -o refuse
      steersman steer refusal -o refuse --strength dose:0.3 --layers 20
      steersman steer refusal -o comply --strength dose:-0.3 --layers 20
      steersman steer refusal -o without --strength 1 --operation project --layers all --scope all
    """
    require_free(output, force, [Path(concept)])
    from steersman import ConceptVector

    read = ConceptVector.from_pretrained(concept)
    steering = read.steering(strength, layers=layers, scope=scope, operation=operation)
    steering.save_pretrained(output, force=force)
    result = steered_for_json(output, steering)
    put_out(result, as_json, lambda: "\n".join(made_in_words(output, steering)) + heard(output, steering))


def check_plot(plot: Path | None, force: bool, output: Path | None = None) -> None:
    """Raise ArtifactError where a plot cannot be written, or lies in the artifact's folder."""
    if plot is None:
        return
    if output is not None and plot.resolve().parent == output.resolve():
        raise ArtifactError(f"{plot}: an artifact's folder holds nothing else; write the plot elsewhere")
    if plot.suffix not in (".png", ".svg"):
        raise ArtifactError(f"{plot}: a plot is written as .png or .svg")
    if plot.is_dir():
        raise ArtifactError(f"{plot}: is a folder; a plot is a file")
    if plot.exists() and not force:
        raise ArtifactError(f"{plot}: the file exists; name another, or --force to replace it")
    if not plot.absolute().parent.is_dir():
        raise ArtifactError(f"{plot}: there is no folder {plot.parent} to write it to")


def draw_separation(concept: ConceptVector, path: Path) -> None:
    """Write the picture of separation by layer."""
    from steersman.evaluation.separation_figure import separation_figure

    separation_figure(concept.separation, best_layer(concept), path)


def best_layer(concept: ConceptVector) -> int | None:
    """The layer that separates best; None where nothing was held out."""
    return concept.best_layer if any(concept.separation.values()) else None


def concept_for_json(concept: ConceptVector) -> dict[str, Any]:
    """What was refined, for JSON."""
    return {
        "layers": [
            {
                "layer": layer,
                **interval_for_json(concept.separation[layer]),
                "norm": float(concept.vectors[layer].norm()),
                "length": concept.length(layer),
            }
            for layer in concept.layers
        ],
        "best": best_layer(concept),
        "pairs": concept.pairs,
        "clusters": concept.clusters,
        "skipped": concept.skipped,
        "alike": concept.alike,
        "position": concept.position,
        "method": concept.method,
    }


def interval_for_json(found: Separation | None) -> dict[str, float | None]:
    """An AUROC and its interval, null where they cannot be told."""
    if found is None:
        return {"auroc": None, "low": None, "high": None}
    return {"auroc": found.auroc, "low": found.low, "high": found.high}


def concept_in_words(concept: ConceptVector, result: dict[str, Any]) -> list[str]:
    """What was refined, as lines with a table by layer."""
    read = {"last": "at the last token", "target_mean": "as the mean over the target"}[result["position"]]
    how = {
        "mean_difference": "mean difference",
        "pca": "top direction of the differences",
        "pca_diff": "top direction of the differences less their mean",
    }[result["method"]]
    pairs, clusters = count_of(result["pairs"], "pair"), count_of(result["clusters"], "cluster")
    lines = [f"{pairs} in {clusters}, read {read}; {how}"]
    if result["skipped"]:
        lines.append(f"{count_of(result['skipped'], 'pair')} left out: longer than the model's context")
    if result["alike"]:
        lines.append(f"{count_of(result['alike'], 'pair')} left out: both sides are the same tokens")
    lines += ["", *(in_columns(*table) for table in concept.as_tables()), ""]
    if result["best"] is None:
        lines.append("no AUROC: its pairs are of one group, so none could be held out")
    else:
        lines.append("AUROC: how well the direction of other pairs tells held-out ones apart; 0.5 is chance.")
    lines += [
        "It does not tell where to steer: without --layers, steer takes layer "
        f"{concept.chosen_layers(None)[0]}, at about two thirds of the depth."
    ]
    return lines


def _refined_in_words(result: dict[str, Any], concept: ConceptVector) -> str:
    lines = [f"{result['output']}: a concept vector", *concept_in_words(concept, result)]
    return "\n".join([*lines, *written(result, ["plot"])])


def written(result: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Which files a command wrote beside its artifact."""
    return [f"written: {result[key]}" for key in keys if key in result]


def steered_for_json(output: Path, steering: Steering) -> dict[str, Any]:
    """A plan of vectors, for JSON, with the doses that its strengths mean."""
    doses = steering.provenance.get("doses", {})
    facts = plan_for_json(steering)
    vectors = [{**entry, "dose": doses.get(str(entry["layer"]))} for entry in facts["vectors"]]
    return {"output": str(output), "fingerprint": facts["fingerprint"], "vectors": vectors}
