"""Commands between Steersman and others' formats: import and export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from steersman.cli.composition import heard, made_in_words, plan_for_json, plan_in_words
from steersman.cli.experts import counts_in_words, in_table, summary
from steersman.cli.options import force_option, json_option, layers_option, output_option, scope_option
from steersman.cli.output import put_out, require_free
from steersman.errors import ArtifactError

if TYPE_CHECKING:
    from steersman import RoutingContrast, Steering
    from steersman.edits import Scope

_FORMATS_IN = ("steermoe", "easysteer", "gguf", "repeng", "steering-vectors")
_FORMATS_OUT = ("easysteer", "ds4", "gguf", "lm-eval")
_RIGHT = (
    "right is a ranking of SteerMoE (.pkl), a plan or vectors of EasySteer (.json, .gguf), a control vector "
    "(.gguf) or saved vectors (.pt)"
)


@click.command("import", short_help="Read a ranking, a plan or vectors that others have made.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--model", required=True, metavar="MODEL", help="The model it was made for: it says the layers."
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of the model on the Hub.")
@output_option("the contrast or the steering")
@click.option(
    "--format",
    "form",
    type=click.Choice(_FORMATS_IN),
    help="SteerMoE's pickled ranking, EasySteer's JSON plan or GGUF vectors, llama.cpp's control vector, "
    "repeng's (GGUF or pickle), or vectors of torch.save (default: by the file's content).",
)
@scope_option(None, "Which tokens a plan or vectors are for, which their files do not say [default: all].")
@layers_option("For a .pt file that does not say them: of each of its vectors, such as 12 or 0-31.")
@force_option
@json_option
def import_(
    file: Path,
    model: str,
    revision: str | None,
    output: Path,
    form: str | None,
    scope: Scope | None,
    layers: Any,
    force: bool,
    as_json: bool,
) -> None:
    """Read FILE: a ranking of the SteerMoE reference, an expert plan of EasySteer, or control vectors.

    A ranking becomes a contrast, from which `select` takes experts in the file's order; a plan or vectors a
    steering. Pickles are read as data: nothing in them is run.

    \b
    Examples:
      steersman import "activations_[allenai--OLMoE-1B-7B-0125-Instruct]_[safety].pkl" \\
          --model allenai/OLMoE-1B-7B-0125-Instruct -o safety
      steersman select safety -o safer --preset olmoe-1b-7b/safe
      steersman import plan.json --model Qwen/Qwen3-30B-A3B -o plan
      steersman import happy.gguf --model mistralai/Mistral-7B-Instruct-v0.3 -o happy
    """
    require_free(output, force)
    from steersman.cli.quiet import quiet_libraries
    from steersman.interop.foreign_files import format_of, is_other_text
    from steersman.models.loading import load_structure

    guessed = form is None
    form = form or format_of(file)
    if form == "steermoe" and scope is not None:
        raise click.UsageError(
            "--scope goes with a plan; of a ranking, `select` says which tokens are steered",
            click.get_current_context(),
        )
    if layers is not None and (form != "steering-vectors" or layers == "all"):
        raise click.UsageError(
            "--layers goes with vectors saved by torch.save, and names them",
            click.get_current_context(),
        )
    placed = {} if layers is None else {"layers": layers}
    try:
        _reader(form)(file, **placed)  # before the model: it takes a moment
    except ArtifactError as error:
        if guessed and is_other_text(file):
            raise ArtifactError(f"{error}; {_RIGHT}") from None
        raise
    quiet_libraries()
    opened = load_structure(model, revision=revision, weights=False)
    if form == "steermoe":
        from steersman.interop.steermoe import import_steermoe

        contrast = import_steermoe(file, opened)
        contrast.save_pretrained(output, force=force)
        result = {"output": str(output), "format": form, "kind": "routing_contrast", **_ranking(contrast)}
        result["weights"] = contrast.weights_id
        put_out(result, as_json, lambda: _ranking_in_words(file, result) + _without_weights(result))
    else:
        steering = _importer(form)(file, opened, scope=scope or "all", **placed)
        steering.save_pretrained(output, force=force)
        result = {"output": str(output), "format": form, "kind": "steering", **plan_for_json(steering)}
        result["weights"] = steering.weights_id
        put_out(
            result,
            as_json,
            lambda: (
                _plan_in_words(file, steering, output) + (_without_weights(result) or heard(output, steering))
            ),
        )


def _without_weights(result: dict[str, Any]) -> str:
    from steersman.models.weights_ids import UNKNOWN

    if result["weights"] != UNKNOWN:
        return ""
    return (
        "\nthe model's weights are not at hand, so it does not say which it is for: "
        "it applies with --match architecture"
    )


def _reader(form: str) -> Callable[..., object]:
    """What reads a file of a format without its model, to see whether it can be read."""
    from steersman.interop.easysteer import read_easysteer
    from steersman.interop.gguf import read_gguf
    from steersman.interop.repeng import read_repeng
    from steersman.interop.steering_vectors import read_steering_vectors
    from steersman.interop.steermoe import read_ranking

    return {
        "steermoe": read_ranking,
        "easysteer": read_easysteer,
        "gguf": read_gguf,
        "repeng": read_repeng,
        "steering-vectors": read_steering_vectors,
    }[form]


def _importer(form: str) -> Callable[..., Steering]:
    """What makes a steering of a file of a format."""
    from steersman.interop.easysteer import import_easysteer
    from steersman.interop.gguf import import_gguf
    from steersman.interop.repeng import import_repeng
    from steersman.interop.steering_vectors import import_steering_vectors

    return {
        "easysteer": import_easysteer,
        "gguf": import_gguf,
        "repeng": import_repeng,
        "steering-vectors": import_steering_vectors,
    }[form]


@click.command(short_help="Write a steering in another engine's format.")
@click.argument("steering", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(_FORMATS_OUT),
    required=True,
    help="EasySteer's JSON plan, ds4's map of DeepSeek V4 Flash, llama.cpp's GGUF control vector, or the "
    "vectors of lm-eval's `steered` model (.pt).",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Where it goes."
)
@click.option(
    "--model",
    metavar="MODEL",
    help="For lm-eval: the model whose layers are named [default: the one the steering was made for].",
)
@click.option(
    "--scope", type=click.Choice(["all"]), help="Steer every token, whatever the steering's own scope is."
)
@force_option
@json_option
def export(
    steering: Path,
    form: str,
    output: Path,
    model: str | None,
    scope: Literal["all"] | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write STEERING as a file for another engine. What the format cannot say exactly is refused.

    The formats steer every token: a plan for some tokens alone is refused without --scope all.

    \b
    Examples:
      steersman export safer --format easysteer -o safer.json
      steersman export safer --format ds4 -o safer.f32
      steersman export honest --format gguf --scope all -o honest.gguf
      steersman export honest --format lm-eval --scope all -o honest.pt
    """
    from steersman import Steering

    if model is not None and form != "lm-eval":
        raise click.UsageError("--model goes with --format lm-eval", click.get_current_context())
    plan = Steering.from_pretrained(steering)
    if scope is not None:
        plan = plan.with_scope(scope)
    if output.resolve().parent == steering.resolve():
        raise ArtifactError(f"{output}: lies in what the command reads; write to another folder")
    if form == "lm-eval":
        _export_lm_eval(plan, output, model, force)
    else:
        _exporter(form)(plan, output, force=force)
    result = {"output": str(output), "format": form, **plan_for_json(plan)}
    put_out(result, as_json, lambda: _exported_in_words(result))


def _exporter(form: str) -> Callable[..., None]:
    from steersman.interop.ds4 import export_ds4
    from steersman.interop.easysteer import export_easysteer
    from steersman.interop.gguf import export_gguf

    return {"easysteer": export_easysteer, "ds4": export_ds4, "gguf": export_gguf}[form]


def _export_lm_eval(plan: Steering, output: Path, model: str | None, force: bool) -> None:
    from steersman.cli.quiet import quiet_libraries
    from steersman.interop.lm_eval import export_lm_eval
    from steersman.models.loading import load_structure

    if not (model or plan.model):
        raise click.UsageError(
            "the steering does not say its model's name: give --model", click.get_current_context()
        )
    quiet_libraries()
    opened = load_structure(model or plan.model, revision=None if model else plan.revision, weights=False)
    export_lm_eval(plan, output, opened, force=force)


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


def _plan_in_words(file: Path, plan: Steering, output: Path) -> str:
    where, *edits = made_in_words(output, plan)
    return "\n".join([f"{where}, from {file.name}", *edits])


def _exported_in_words(result: dict[str, Any]) -> str:
    steered = {
        "easysteer": 'to apply to all tokens: ApplySpec(prompt="all", generation="all")',
        "ds4": "to load with --expert-steering-file, at the default scale",
        "gguf": "to load with --control-vector, at its own scale of 1",
        "lm-eval": "to load with --model steered --model_args pretrained=MODEL,steer_path=FILE",
    }
    return f"{result['output']}: {plan_in_words(result)}; {steered[result['format']]}"
