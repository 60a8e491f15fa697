"""Commands of expert steering: detect, merge and select."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.cli.options import (
    ModelChoice,
    batch_size_option,
    force_option,
    json_option,
    model_options,
    output_option,
)
from steersman.cli.output import in_columns, number, put_out, require_free

if TYPE_CHECKING:
    from steersman import RoutingContrast
    from steersman.experts.contrast import By
    from steersman.experts.tally import Weighting
    from steersman.steering import Scope

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
    "--truncate", is_flag=True, help="Leave out pairs that are too long for the model, and count them."
)
@batch_size_option(16)
@force_option
@json_option
def detect(
    model: ModelChoice,
    pairs: str,
    output: Path,
    weighting: Weighting,
    truncate: bool,
    batch_size: int,
    force: bool,
    as_json: bool,
) -> None:
    """Count which experts of MODEL the two sides of PAIRS use.

    \b
    Example:
      steersman detect lab:moe lab:refusal/train -o refusal
    """
    require_free(output, force)
    from steersman import detect_experts, load_pairs

    read = load_pairs(pairs)
    opened, tokenizer = model.open()
    contrast = detect_experts(
        opened, tokenizer, read, weighting=weighting, batch_size=batch_size, truncate=truncate, progress=True
    )
    contrast.save_pretrained(output, force=force)
    result = {"output": str(output), **summary(contrast)}
    planting = _planting(model.name, pairs, result["top"])
    if planting is not None:
        result["planting"] = planting
    put_out(result, as_json, lambda: _detected_in_words(result))


@click.command(short_help="Add the counts of several contrasts.")
@click.argument("contrasts", nargs=-1, required=True, type=click.Path(path_type=Path))
@output_option("the merged contrast")
@force_option
@json_option
def merge(contrasts: tuple[Path, ...], output: Path, force: bool, as_json: bool) -> None:
    """Add the counts of CONTRASTS, detected on parts of the same pairs by the same model.

    \b
    Example:
      steersman merge part-1 part-2 -o whole
    """
    require_free(output, force, contrasts)
    from steersman import RoutingContrast, merge_contrasts

    merged = merge_contrasts([RoutingContrast.from_pretrained(path) for path in contrasts])
    merged.save_pretrained(output, force=force)
    result = {"output": str(output), **summary(merged)}
    put_out(result, as_json, lambda: _detected_in_words(result))


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
    type=click.Choice(["risk_difference", "lower_bound"]),
    default="risk_difference",
    show_default=True,
    help="What makes an expert strong.",
)
@click.option(
    "--scope",
    type=click.Choice(["all", "prompt", "generated", "answer"]),
    default="all",
    show_default=True,
    help="Which tokens are steered.",
)
@click.option(
    "--strength", type=float, default=1.0, show_default=True, help="0 to 1; 1 is in or out for certain."
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
    by: By,
    scope: Scope,
    strength: float,
    force: bool,
    as_json: bool,
) -> None:
    """Choose experts of CONTRAST, and save them as a steering.

    \b
    Examples:
      steersman select refusal -o safer --top 12
      steersman select refusal -o unsafe --activate 4 --deactivate 8 --reverse
    """
    sizes = [top is not None, activate is not None or deactivate is not None, preset is not None]
    if sum(sizes) != 1:
        raise click.UsageError(
            "name how many experts: either --top N, or --activate N and --deactivate M, or --preset NAME",
            click.get_current_context(),
        )
    require_free(output, force, [contrast])
    from steersman import RoutingContrast

    counted = RoutingContrast.from_pretrained(contrast)
    steering = counted.select(
        activate=activate,
        deactivate=deactivate,
        top=top,
        preset=preset,
        reverse=reverse,
        by=by,
        scope=scope,
        strength=strength,
    )
    steering.save_pretrained(output, force=force)
    chosen = [
        {"layer": layer, "expert": expert, "strength": value}
        for layer, experts in steering.strengths.items()
        for expert, value in experts.items()
    ]
    result = {
        "output": str(output),
        "fingerprint": steering.fingerprint,
        "activated": [entry for entry in chosen if entry["strength"] > 0],
        "deactivated": [entry for entry in chosen if entry["strength"] < 0],
        "skipped": list(steering.provenance.get("skipped", [])),
    }
    put_out(result, as_json, lambda: _selected_in_words(result, counted))


def summary(contrast: RoutingContrast) -> dict[str, Any]:
    """What was counted, and the strongest experts, for JSON."""
    return {
        "layers": [int(layer) for layer in contrast.layers],
        "tokens": [int(count) for count in contrast.tokens],
        "pairs": int(contrast.pairs),
        "clusters": int(contrast.clusters),
        "skipped": int(contrast.skipped),
        "weighting": contrast.weighting,
        "imported": contrast.imported,
        "top": _strongest(contrast),
    }


def _strongest(contrast: RoutingContrast) -> list[dict[str, Any]]:
    table = contrast.table().head(SHOWN)
    names = ["risk_difference", "low", "high", "q"]
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
    cells = [
        (
            row["layer"],
            row["expert"],
            f"{row['risk_difference']:+.3f}",
            "–" if row["low"] is None else f"[{row['low']:+.3f}, {row['high']:+.3f}]",
            "–" if row["q"] is None else f"{row['q']:.2g}" if row["q"] else "<1e-300",
        )
        for row in rows
    ]
    return in_columns(("layer", "expert", "risk difference", "95 % interval", "q"), cells)


def counts_in_words(result: dict[str, Any]) -> list[str]:
    """What was counted, in words."""
    positive, negative = result["tokens"]
    origin = (
        "an imported ranking"
        if result["imported"]
        else f"{result['pairs']} pairs in {result['clusters']} clusters"
    )
    lines = [
        f"{origin}, {len(result['layers'])} layers; "
        f"{positive} positive and {negative} negative tokens, weighted by {result['weighting']}",
    ]
    if result["skipped"]:
        lines.append(f"{result['skipped']} pairs left out: longer than the model's context")
    if result["imported"]:
        lines.append("no intervals: a ranking from elsewhere does not tell how its pairs differ")
    elif all(row["low"] is None for row in result["top"]):
        lines.append("no intervals: fewer than 20 clusters say too little about chance")
    return lines


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


def _detected_in_words(result: dict[str, Any]) -> str:
    lines = [f"{result['output']}: a routing contrast", *counts_in_words(result), "", in_table(result["top"])]
    lines += ["", CAVEAT]
    if "planting" in result:
        planting = result["planting"]
        lines += ["", f"planted, with the right sign: {planting['right']} of these {planting['top']}"]
    return "\n".join(lines)


def _selected_in_words(result: dict[str, Any], counted: RoutingContrast) -> str:
    from steersman.experts.estimate import LEAST_CLUSTERS

    def places(entries: list[dict[str, Any]]) -> str:
        return ", ".join(f"{entry['layer']}:{entry['expert']}" for entry in entries) or "none"

    lines = [
        f"{result['output']}: steering {result['fingerprint'][:16]}… (layer:expert)",
        f"activated {len(result['activated'])}: {places(result['activated'])}",
        f"deactivated {len(result['deactivated'])}: {places(result['deactivated'])}",
    ]
    lines += [f"skipped {entry['layer']}:{entry['expert']}: {entry['reason']}" for entry in result["skipped"]]
    if counted.imported:
        lines.append(
            "chosen from an imported ranking, in its order: nobody knows which differences are chance"
        )
    elif counted.clusters < LEAST_CLUSTERS:
        lines.append(
            f"chosen from {counted.clusters} independent pairs or groups: "
            f"below {LEAST_CLUSTERS}, differences may be chance"
        )
    return "\n".join(lines)
