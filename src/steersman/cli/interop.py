"""Commands between Steersman and others' formats: import and export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.cli.experts import counts_in_words, in_table, summary
from steersman.cli.options import force_option, json_option, output_option
from steersman.cli.output import put_out, require_free
from steersman.errors import ArtifactError

if TYPE_CHECKING:
    from steersman import RoutingContrast, Steering
    from steersman.edits import Scope

_RIGHT = "right is a ranking of SteerMoE (.pkl) or a plan of EasySteer (.json)"


@click.command("import", short_help="Read a ranking or a plan that others have made.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--model", required=True, metavar="MODEL", help="The model it was made for: it says the layers."
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of the model on the Hub.")
@output_option("the contrast or the steering")
@click.option(
    "--format",
    "form",
    type=click.Choice(["steermoe", "easysteer"]),
    help="SteerMoE's pickled ranking or EasySteer's JSON plan (default: by the file's content).",
)
@click.option(
    "--scope",
    type=click.Choice(["all", "prompt", "generated", "answer"]),
    help="Which tokens an EasySteer plan is for, which its file does not say [default: all].",
)
@force_option
@json_option
def import_(
    file: Path,
    model: str,
    revision: str | None,
    output: Path,
    form: str | None,
    scope: Scope | None,
    force: bool,
    as_json: bool,
) -> None:
    """Read FILE, a ranking of the SteerMoE reference or an expert plan of EasySteer.

    A ranking becomes a contrast, from which `select` takes experts in the file's order; a plan a steering.
    Pickles are read as data: nothing in them is run.

    \b
    Examples:
      steersman import "activations_[allenai--OLMoE-1B-7B-0125-Instruct]_[safety].pkl" \\
          --model allenai/OLMoE-1B-7B-0125-Instruct -o safety
      steersman select safety -o safer --preset olmoe-1b-7b/safe
      steersman import plan.json --model Qwen/Qwen3-30B-A3B -o plan
    """
    require_free(output, force)
    from steersman.cli.quiet import quiet_libraries
    from steersman.interop.easysteer import import_easysteer, read_plan
    from steersman.interop.foreign_files import is_other_text, looks_like_json
    from steersman.interop.steermoe import import_steermoe, read_ranking
    from steersman.models.loading import load_structure

    guessed = form is None
    form = form or ("easysteer" if looks_like_json(file) else "steermoe")
    if form == "steermoe" and scope is not None:
        raise click.UsageError(
            "--scope goes with a plan; of a ranking, `select` says which tokens are steered",
            click.get_current_context(),
        )
    try:
        (read_plan if form == "easysteer" else read_ranking)(file)  # before the model: it takes a moment
    except ArtifactError as error:
        if guessed and is_other_text(file):
            raise ArtifactError(f"{error}; {_RIGHT}") from None
        raise
    quiet_libraries()
    opened = load_structure(model, revision=revision)
    if form == "easysteer":
        steering = import_easysteer(file, opened, scope=scope or "all")
        steering.save_pretrained(output, force=force)
        result = {"output": str(output), "format": form, "kind": "steering", **chosen(steering)}
        put_out(result, as_json, lambda: _plan_in_words(file, result))
    else:
        contrast = import_steermoe(file, opened)
        contrast.save_pretrained(output, force=force)
        result = {"output": str(output), "format": form, "kind": "routing_contrast", **_ranking(contrast)}
        put_out(result, as_json, lambda: _ranking_in_words(file, result))


@click.command(short_help="Write a steering in another engine's format.")
@click.argument("steering", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["easysteer", "ds4"]),
    required=True,
    help="EasySteer's JSON plan, or ds4's map of DeepSeek V4 Flash.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Where it goes."
)
@force_option
@json_option
def export(steering: Path, form: str, output: Path, force: bool, as_json: bool) -> None:
    """Write STEERING as a file for another engine. What the format cannot say exactly is refused.

    \b
    Examples:
      steersman export safer --format easysteer -o safer.json
      steersman export safer --format ds4 -o safer.f32
    """
    from steersman import Steering
    from steersman.interop.ds4 import export_ds4
    from steersman.interop.easysteer import export_easysteer

    plan = Steering.from_pretrained(steering)
    (export_ds4 if form == "ds4" else export_easysteer)(plan, output, force=force)
    result = {"output": str(output), "format": form, **chosen(plan)}
    put_out(result, as_json, lambda: _exported_in_words(result))


def chosen(steering: Steering) -> dict[str, Any]:
    """A plan's fingerprint and experts, for JSON."""
    entries = [
        {"layer": layer, "expert": expert, "strength": strength}
        for layer, experts in steering.strengths.items()
        for expert, strength in experts.items()
    ]
    return {
        "fingerprint": steering.fingerprint,
        "activated": [entry for entry in entries if entry["strength"] > 0],
        "deactivated": [entry for entry in entries if entry["strength"] < 0],
    }


def _ranking(contrast: RoutingContrast) -> dict[str, Any]:
    return {**summary(contrast), "top_k": [int(k) for k in contrast.top_k]}


def _ranking_in_words(file: Path, result: dict[str, Any]) -> str:
    lines = [
        f"{result['output']}: a routing contrast, from {file.name}",
        *counts_in_words(result),
        "",
        in_table(result["top"]),
    ]
    return "\n".join(lines)


def _plan_in_words(file: Path, result: dict[str, Any]) -> str:
    return (
        f"{result['output']}: a steering, from {file.name}: {len(result['activated'])} experts activated, "
        f"{len(result['deactivated'])} deactivated\nfingerprint {result['fingerprint']}"
    )


def _exported_in_words(result: dict[str, Any]) -> str:
    steered = {
        "easysteer": 'to apply to all tokens: ApplySpec(prompt="all", generation="all")',
        "ds4": "to load with --expert-steering-file, at the default scale",
    }
    return (
        f"{result['output']}: {len(result['activated'])} experts activated, "
        f"{len(result['deactivated'])} deactivated; {steered[result['format']]}"
    )
