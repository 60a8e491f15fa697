"""Commands of expert steering: detect, merge and select."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from steersman.cli.composition import heard, made_in_words
from steersman.cli.failures import resumable
from steersman.cli.maps import merge_maps
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
)
from steersman.cli.output import in_columns, next_steps, number, put_out, require_free, unused
from steersman.cli.selecting import select_of_screen, selection_for_json
from steersman.cli.shards import shards_for_json, shards_in_words
from steersman.errors import PairsError, PlanError
from steersman.showing import count_of, on_one_line

if TYPE_CHECKING:
    from steersman import RoutingContrast, Steering
    from steersman.edits import Scope
    from steersman.experts.contrast import By
    from steersman.experts.tally import Weighting
    from steersman.pairs import ContrastPairs
    from steersman.rendering import Part

SHOWN = 12
"""Experts that are listed; the table has them all."""

CAVEAT = (
    "Differences in use: wording alone can make them. Whether an expert causes anything shows in steering."
)

PLANTED_SIDES = {"refusal": ("refuse", "comply"), "faithfulness": ("document", "memory")}
"""Pairs of the lab → the planted labels of their positive and their negative side."""


@click.command()
@model_options
@click.argument("pairs")
@output_option("the contrast")
@click.option(
    "--weighting",
    type=click.Choice(["token", "pair"]),
    default="token",
    show_default=True,
    help="Whether each token or each pair counts the same.",
)
@click.option(
    "--tokens",
    type=click.Choice(["target", "prompt", "answer"]),
    default="target",
    show_default=True,
    help="Count these of each side: the target's, the final answer's, or all before it.",
)
@click.option(
    "--generate",
    type=click.IntRange(min=1),
    metavar="N",
    help="Count the model's own words instead: up to N with which it continues each prompt.",
)
@click.option(
    "--stratify",
    type=click.Choice(["position"]),
    help="Also compare tokens at like positions alone.",
)
@click.option("--adjust", metavar="PAIRS", help="A nuisance: its contrast is counted too and regressed out.")
@click.option(
    "--bootstrap",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="R",
    help="Replicates, which tell how stable a selection is; 200 are good.",
)
@click.option("--shard", metavar="I/N", help="Count part I of N; merge adds them up.")
@resume_option
@click.option(
    "--truncate", is_flag=True, help="Leave out pairs that are too long for the model, and count them."
)
@batch_size_option(16)
@backend_options
@force_option
@json_option
def detect(
    model: ModelChoice,
    backend: BackendChoice,
    pairs: str,
    output: Path,
    weighting: Weighting,
    tokens: Part,
    generate: int | None,
    stratify: Literal["position"] | None,
    adjust: str | None,
    bootstrap: int,
    shard: str | None,
    resume: bool,
    truncate: bool,
    batch_size: int,
    force: bool,
    as_json: bool,
) -> None:
    """Count which experts of MODEL the two sides of PAIRS use.

    Progress is saved beside the output, in FOLDER.partial, until the output is written.

    \b
    Examples:
      steersman detect lab:moe lab:refusal/train -o refusal
      steersman detect lab:moe lab:refusal/train -o refusal --resume
      steersman detect lab:moe lab:refusal/train -o part-2 --shard 2/8
      steersman detect lab:moe lab:faithfulness/train -o faithful --generate 8 --bootstrap 200
      steersman detect MODEL pairs.jsonl -o faithful --backend vllm
    """
    require_free(output, force)
    from steersman import load_pairs
    from steersman.progress import discard, is_saved, refuse_unwanted, units_done

    named = output if output.name not in ("", "..") else output.resolve()  # "." has no name to add to
    partial = named.with_name(f"{named.name}.partial")
    if not resume and not force:
        refuse_unwanted(partial)
    if resume and not is_saved(partial):
        click.echo(f"steersman: no progress in {partial} to go on from: starting at the first pair", err=True)
    if Path(pairs).is_dir():
        raise PairsError(f"{pairs}: is a folder; PAIRS is a file or lab:NAME, and the order is MODEL PAIRS")
    with resumable(partial):
        read = load_pairs(pairs, progress=True)
        nuisance = None if adjust is None else load_pairs(adjust, progress=True)
        before = units_done(partial)

        def how() -> dict[str, Any]:
            """Asked for when the model is open: until then, nothing that was there is touched."""
            if force and not resume:
                discard(partial)
            return {
                "weighting": weighting,
                "tokens": tokens,
                "generate": generate or 0,
                "stratify": stratify,
                "adjust": nuisance,
                "bootstrap": bootstrap,
                "shard": shard,
                "truncate": truncate,
                "checkpoint": partial,
                "resume": resume,
                "progress": True,
            }

        contrast = _detected(model, backend, read, batch_size, how)
        contrast.save_pretrained(output, force=force)
    discard(partial)
    result = {"output": str(output), **summary(contrast)}
    if resume:
        result["resumed_after"] = before
    planting = _planting(model.name, pairs, result["top"])
    if planting is not None:
        result["planting"] = planting
    put_out(
        result,
        as_json,
        lambda: _detected_in_words(result, contrast) + _select_next(output, contrast, model, backend),
    )


def _select_next(output: Path, contrast: RoutingContrast, model: ModelChoice, backend: BackendChoice) -> str:
    """What follows on counts that are whole and find experts: a choice of them, and a model to talk with."""
    if shards_for_json(contrast)["missing"]:
        return ""
    for top in (SHOWN, 8, 4, 2, 1):
        try:
            contrast.select(top=top)
        except PlanError:  # fewer are left that can be chosen
            continue
        plan = unused(f"{output}-steering")
        steered = ["chat", *model.typed(), "--steering", plan]
        if backend.on_engine:
            steered = ["serve", *model.typed(), "--steering", f"{output.name}={plan}"]
        select = ["select", output, "-o", plan, "--top", top]
        return next_steps("Next, choose experts, and hear the model steered by them", select, steered)
    return ""


def _detected(
    model: ModelChoice,
    backend: BackendChoice,
    pairs: ContrastPairs,
    batch_size: int,
    how: Callable[[], dict[str, Any]],
) -> RoutingContrast:
    """The contrast, counted by whatever runs the model."""
    if backend.on_engine:
        from steersman.vllm.detection import PLACES
        from steersman.vllm.detection import detect_experts as detect_on_engine

        most = batch_size if given_option("batch_size") else None
        with backend.engine(model, count=PLACES, most_at_once=most) as engine:
            return detect_on_engine(
                engine.llm, pairs, model=engine.model, tokenizer=engine.tokenizer, **how()
            )
    from steersman import detect_experts

    opened, tokenizer = model.open()
    return detect_experts(opened, tokenizer, pairs, batch_size=batch_size, **how())


@click.command(short_help="Add up parts: counts of contrasts, or affine maps.")
@click.argument("contrasts", nargs=-1, required=True, type=click.Path(path_type=Path))
@output_option("the merged contrast")
@force_option
@json_option
def merge(contrasts: tuple[Path, ...], output: Path, force: bool, as_json: bool) -> None:
    """Add the counts of CONTRASTS, detected on parts of the same pairs by the same model; or all parts of an
    affine map, made with map --shard.

    \b
    Example:
      steersman merge part-1 part-2 -o whole
    """
    require_free(output, force, contrasts)
    from steersman import RoutingContrast, merge_contrasts
    from steersman.artifacts import read_manifest

    if read_manifest(contrasts[0])["kind"] == "affine_map":
        merge_maps(contrasts, output, force, as_json)
        return
    merged = merge_contrasts([RoutingContrast.from_pretrained(path) for path in contrasts])
    merged.save_pretrained(output, force=force)
    result = {"output": str(output), **summary(merged)}
    put_out(result, as_json, lambda: _detected_in_words(result, merged))


@click.command()
@click.argument("contrast", type=click.Path(path_type=Path))
@output_option("the steering")
@click.option(
    "--activate", type=click.IntRange(min=0), metavar="N", help="The N strongest of the positive side."
)
@click.option(
    "--deactivate", type=click.IntRange(min=0), metavar="M", help="The M strongest of the negative side."
)
@click.option(
    "--top", type=click.IntRange(min=1), metavar="N", help="The N strongest, whichever side they are on."
)
@click.option(
    "--preset", metavar="NAME", help="As many as the paper steers in a model, such as olmoe-1b-7b/safe."
)
@click.option("--reverse", is_flag=True, help="Steer toward the negative side.")
@click.option(
    "--by",
    type=click.Choice(
        [
            "risk_difference",
            "lower_bound",
            "stratified",
            "stratified_lower_bound",
            "adjusted",
            "adjusted_lower_bound",
            "causal",
        ]
    ),
    metavar="MEASURE",
    help="What makes an expert strong: risk_difference (default), lower_bound, stratified, "
    "stratified_lower_bound, adjusted or adjusted_lower_bound; of a screen: causal.",
)
@scope_option(None, "Which tokens are steered (default: all; of a screen: those that were screened).")
@click.option(
    "--strength",
    type=float,
    default=1.0,
    show_default=True,
    help="Above 0, at most 1, which is in or out for certain.",
)
@force_option
@json_option
def select(
    contrast: Path,
    output: Path,
    activate: int | None,
    deactivate: int | None,
    top: int | None,
    preset: str | None,
    reverse: bool,
    by: By | Literal["causal"] | None,
    scope: Scope | None,
    strength: float,
    force: bool,
    as_json: bool,
) -> None:
    """Choose experts of CONTRAST, and save them as a steering. Of a causal screen: the set that it chose, or
    so many of the experts that passed its gate.

    \b
    Examples:
      steersman select refusal -o safer --top 12
      steersman select refusal -o unsafe --activate 4 --deactivate 8 --reverse
      steersman select causes -o safer --by causal
    """
    sizes = [top is not None, activate is not None or deactivate is not None, preset is not None]
    how_many = "name how many experts: either --top N, or --activate N and --deactivate M, or --preset NAME"
    if sum(sizes) > 1:
        raise click.UsageError(f"{how_many}, not both", click.get_current_context())
    if not 0 < strength <= 1:  # also true for NaN
        raise click.UsageError(
            f"--strength is {strength:g}; right is above 0, at most 1 (--reverse steers the other way)",
            click.get_current_context(),
        )
    of_screen = _is_screen(contrast)
    if by is not None and of_screen != (by == "causal"):
        needed = "a contrast, made by detect" if of_screen else "a causal screen, made by screen"
        raise PlanError(f"{contrast}: --by {by} needs {needed}")
    if not of_screen and not any(sizes):
        raise click.UsageError(how_many, click.get_current_context())
    require_free(output, force, [contrast])
    from steersman import CausalScreen, RoutingContrast

    if of_screen:
        if preset is not None:
            raise PlanError(f"{contrast}: presets are sizes for contrasts; a screen has sets of its own")
        select_of_screen(
            CausalScreen.from_pretrained(contrast),
            output,
            {"activate": activate, "deactivate": deactivate, "top": top},
            reverse=reverse,
            scope=scope,
            strength=strength,
            force=force,
            as_json=as_json,
        )
        return
    counted = RoutingContrast.from_pretrained(contrast)
    steering = counted.select(
        activate=activate,
        deactivate=deactivate,
        top=top,
        preset=preset,
        reverse=reverse,
        by=cast("By", by or "risk_difference"),
        scope=scope or "all",
        strength=strength,
    )
    steering.save_pretrained(output, force=force)
    result = {
        **selection_for_json(output, steering),
        **shards_for_json(counted),
        **{
            key: steering.provenance[key] for key in ("stability", "adjustment") if key in steering.provenance
        },
    }
    put_out(result, as_json, lambda: _selected_in_words(result, steering, counted) + heard(output, steering))


def summary(contrast: RoutingContrast) -> dict[str, Any]:
    """What was counted, and the strongest experts, for JSON."""
    return {
        "layers": [int(layer) for layer in contrast.layers],
        "tokens": [int(count) for count in contrast.tokens],
        "pairs": int(contrast.pairs),
        "clusters": int(contrast.clusters),
        "skipped": int(contrast.skipped),
        "alike": int(contrast.alike),
        "weighting": contrast.weighting,
        "imported": contrast.imported,
        "counted": contrast.counted,
        "new_tokens": contrast.new_tokens,
        "generation": next(
            (dict(one["generation"]) for one in contrast.made_from if "generation" in one), {}
        ),
        "strata": None if contrast.strata is None else list(contrast.strata.starts),
        "bootstrap": 0 if contrast.replicates is None else contrast.replicates.number,
        "adjustment": _adjustment(contrast),
        **shards_for_json(contrast),
        "top": _strongest(contrast),
    }


def _adjustment(contrast: RoutingContrast) -> dict[str, Any] | None:
    """The nuisance that was counted, and what it takes away."""
    if contrast.nuisance is None:
        return None
    return {
        "slope": contrast.adjustment.slope,
        "share": contrast.adjustment.share,
        "tokens": [int(count) for count in contrast.nuisance.tokens],
        "pairs": int(contrast.nuisance.pairs),
        "clusters": int(contrast.nuisance.clusters),
        "skipped": int(contrast.nuisance.skipped),
        "alike": int(contrast.nuisance.alike),
    }


def _strongest(contrast: RoutingContrast) -> list[dict[str, Any]]:
    table = contrast.table().head(SHOWN)
    others = [name for name in ("stratified", "adjusted") if name in table]
    names = ["risk_difference", "low", "high", "q", *others]
    return [
        {
            "layer": int(row["layer"]),
            "expert": int(row["expert"]),
            **{name: number(row[name]) for name in names},
        }
        for row in table.to_dict("records")
    ]


def in_table(rows: list[dict[str, Any]]) -> str:
    """Experts in words: where they are, how much more the positive side uses them, and how sure that is."""
    others = [name for name in ("stratified", "adjusted") if rows and name in rows[0]]
    cells = [
        (
            row["layer"],
            row["expert"],
            f"{row['risk_difference']:+.3f}",
            "–" if row["low"] is None else f"[{row['low']:+.3f}, {row['high']:+.3f}]",
            "–" if row["q"] is None else f"{row['q']:.2g}" if row["q"] else "<1e-300",
            *("–" if row[name] is None else f"{row[name]:+.3f}" for name in others),
        )
        for row in rows
    ]
    return in_columns(("layer", "expert", "risk difference", "95 % interval", "q", *others), cells)


def counts_in_words(result: dict[str, Any]) -> list[str]:
    """What was counted, in words."""
    result = on_one_line(result)
    positive, negative = result["tokens"]
    origin = (
        "an imported ranking"
        if result["imported"]
        else f"{count_of(result['pairs'], 'pair')} in {count_of(result['clusters'], 'cluster')}"
    )
    lines = [
        f"{origin}, {count_of(len(result['layers']), 'layer')}; "
        f"{positive} positive and {negative} negative tokens, weighted by {result['weighting']}",
    ]
    if result["counted"] != "target":
        lines.append(_COUNTED[result["counted"]].format(result["new_tokens"]))
    if result["skipped"]:
        ended = ", or with a side that the model ends at once" if result["counted"] == "generated" else ""
        lines.append(
            f"{count_of(result['skipped'], 'pair')} left out: longer than the model's context{ended}"
        )
    if result["alike"]:
        lines.append(f"{count_of(result['alike'], 'pair')} left out: both sides are the same tokens")
    if result["generation"]:
        own = ", ".join(f"{name} {value}" for name, value in result["generation"].items())
        lines.append(f"the checkpoint's own settings acting: {own}")
    if result["strata"]:
        lines.append(f"stratified: at like positions, from {', '.join(map(str, result['strata']))} on")
    if result["adjustment"]:
        lines.append(_adjusted_in_words(result["adjustment"]))
    if result["bootstrap"]:
        lines.append(f"{result['bootstrap']} bootstrap replicates: select says how stable its choice is")
    if result["imported"]:
        lines.append("no intervals: a ranking from elsewhere does not tell how its pairs differ")
    elif all(row["low"] is None for row in result["top"]):
        lines.append("no intervals: fewer than 20 clusters say too little about chance")
    return lines


_COUNTED = {
    "prompt": "counted: the tokens of the prompts",
    "answer": "counted: the tokens of the final answers",
    "generated": "counted: up to {} tokens of the model's own after each prompt",
}


def _adjusted_in_words(adjustment: dict[str, Any]) -> str:
    return (
        f"adjusted: less {adjustment['slope']:+.3f} times the nuisance ("
        f"{count_of(adjustment['pairs'], 'pair')} in {count_of(adjustment['clusters'], 'cluster')}), "
        f"which is {adjustment['share']:.0%} of all ΣΔ²"
    )


def _planting(model: str, pairs: str, strongest: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How many of the strongest experts were planted, with the right sign, where the lab knows it."""
    behaviour = pairs.removeprefix("lab:").partition("/")[0]
    if not (model.startswith("lab:") and pairs.startswith("lab:") and behaviour in PLANTED_SIDES):
        return None
    from steersman import lab

    planted = lab.planted(model.removeprefix("lab:").partition("@")[0])
    if not planted:
        return None
    positive, negative = PLANTED_SIDES[behaviour]
    right = sum(
        planted.get(row["layer"], {}).get(row["expert"])
        == (positive if row["risk_difference"] > 0 else negative)
        for row in strongest
    )
    return {"top": len(strongest), "right": right, "precision": right / len(strongest)}


def _detected_in_words(result: dict[str, Any], contrast: RoutingContrast) -> str:
    lines = [f"{result['output']}: a routing contrast", *counts_in_words(result), "", in_table(result["top"])]
    lines += ["", CAVEAT]
    if "resumed_after" in result:
        lines.insert(1, f"resumed after {count_of(result['resumed_after'], 'pair')}")
    if "planting" in result:
        planting = result["planting"]
        lines += ["", f"planted, with the right sign: {planting['right']} of these {planting['top']}"]
    parts = shards_in_words(contrast)
    return "\n".join([*lines, *([""] if parts else []), *parts])


def _selected_in_words(result: dict[str, Any], steering: Steering, counted: RoutingContrast) -> str:
    from steersman.experts.estimate import LEAST_CLUSTERS

    lines = made_in_words(Path(result["output"]), steering)
    lines += _stability_in_words(result.get("stability"))
    if counted.imported:
        lines.append(
            "chosen from an imported ranking, in its order: nobody knows which differences are chance"
        )
    elif counted.clusters < LEAST_CLUSTERS:
        lines.append(
            f"chosen from {counted.clusters} independent pairs or groups: "
            f"below {LEAST_CLUSTERS}, differences may be chance"
        )
    lines += shards_in_words(counted)
    return "\n".join(lines)


def _stability_in_words(stability: dict[str, Any] | None) -> list[str]:
    """How often the same choice was made in bootstrap replicates, the least certain experts first."""
    if stability is None or not stability["experts"]:
        return []
    experts = sorted(stability["experts"], key=lambda entry: entry["share"])
    certain = sum(entry["share"] >= 0.95 for entry in experts)
    lines = [
        f"stable: {certain} of {len(experts)} are chosen in at least 95% of "
        f"{stability['replicates']} bootstrap replicates"
    ]
    unsure = [entry for entry in experts if entry["share"] < 0.95]
    if unsure:
        named = ", ".join(f"{e['layer']}:{e['expert']} {e['share']:.0%}" for e in unsure[:SHOWN])
        more = f" and {len(unsure) - SHOWN} more" if len(unsure) > SHOWN else ""
        lines.append(f"less sure: {named}{more}")
    return lines


def _is_screen(folder: Path) -> bool:
    """Whether a folder holds a causal screen; what is no artifact is told by whoever opens it."""
    from steersman.artifacts import MANIFEST, read_manifest

    return (folder / MANIFEST).is_file() and read_manifest(folder)["kind"] == "causal_screen"
