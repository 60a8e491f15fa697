"""Commands about a model: describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.cli.options import ModelChoice, batch_size_option, force_option, json_option, model_options
from steersman.cli.output import in_columns, next_steps, put_out, require_free, unused
from steersman.cli.profiles import filter_options, profile_for_json, profile_in_words
from steersman.errors import PlanError
from steersman.models.weights_ids import in_brief
from steersman.showing import count_of, on_one_line

if TYPE_CHECKING:
    from steersman import Architecture


@click.command(short_help="Layers and routers of MODEL, and what can be steered.")
@model_options
@click.option(
    "--experts",
    "texts",
    metavar="TEXTS",
    help="Say what each expert is for, from these texts: a file, one a line, or lab:NAME[/SPLIT].",
)
@filter_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Keep what experts are for, as an artifact.",
)
@batch_size_option(16)
@force_option
@json_option
def describe(
    model: ModelChoice,
    texts: str | None,
    layer: int | None,
    expert: int | None,
    output: Path | None,
    batch_size: int,
    force: bool,
    as_json: bool,
) -> None:
    """Layers and routers of MODEL: what can be steered, and what cannot and why.

    With --experts what each expert is for: how many tokens of TEXTS use it, which tokens use it most against
    that, and the contexts where its mixture weight is largest.

    \b
    Examples:
      steersman describe lab:moe
      steersman describe lab:moe --experts lab:refusal -o experts --layer 2
    """
    if texts is not None:
        _describe_experts(model, texts, (layer, expert), output, batch_size, force, as_json)
        return
    if output is not None or layer is not None or expert is not None:
        raise click.UsageError(
            "-o, --layer and --expert go with --experts TEXTS", click.get_current_context()
        )
    from steersman.models.architecture import read_architecture, routers_beside
    from steersman.models.gguf_models import dequantised
    from steersman.models.identity import weights_id
    from steersman.models.loading import is_without_tokenizer, is_without_weights, load_structure

    bare, tokenizer = is_without_tokenizer(model.name) and not model.chat, None
    if bare or is_without_weights(model.name):
        opened = load_structure(model.name, weights=not is_without_weights(model.name))
    else:
        opened, tokenizer = model.open()
    architecture = read_architecture(opened)
    result = {
        "model": model.name,
        "model_type": architecture.model_type,
        "layers": architecture.layer_count,
        "hidden_size": architecture.hidden_size,
        "architecture": architecture.id,
        "weights": weights_id(opened),
        "dequantised": dequantised(opened),
        "chat_template": None if tokenizer is None else bool(tokenizer.chat_template),
        "routers": [
            {
                "layer": router.layer,
                "experts": router.experts,
                "top_k": router.top_k,
                "rule": router.rule,
                "groups": list(router.groups) if router.groups else None,
                "shared_experts": router.shared_experts,
                "steerable": router.steerable,
                "reason": router.reason,
            }
            for router in architecture.routers
        ],
        "beside": [{"layer": router.layer, "reason": router.reason} for router in routers_beside(opened)],
    }
    more = "\n\nThere is no tokenizer in the folder, so no chat template: steering it needs one."
    put_out(
        result, as_json, lambda: _in_words(result) + (more if bare else _next_steps(result, opened, model))
    )


def _next_steps(result: dict[str, Any], opened: Any, model: ModelChoice) -> str:
    """What this model can be steered by, and how to begin."""
    from steersman.models.streams import why_no_stream

    if any(router["steerable"] for router in result["routers"]):
        detect = ["detect", *model.typed(), model.pairs(), "-o", unused("contrast")]
        return next_steps("Next, count which experts a behaviour uses", detect)
    reason = why_no_stream(opened, range(result["layers"]))
    if reason is not None:
        return f" Nor can vectors steer it: {reason}."
    refine = ["refine", *model.typed(), model.pairs(), "-o", unused("concept")]
    return next_steps("Vectors steer it. Next, refine one from contrast pairs", refine)


def _describe_experts(
    model: ModelChoice,
    texts: str,
    which: tuple[int | None, int | None],
    output: Path | None,
    batch_size: int,
    force: bool,
    as_json: bool,
) -> None:
    if output is not None:
        require_free(output, force)
    from steersman import describe_experts, read_architecture
    from steersman.texts import load_texts

    read = load_texts(texts)
    opened, tokenizer = model.open()
    _check_there(read_architecture(opened), *which)
    profile = describe_experts(opened, tokenizer, read, batch_size=batch_size, progress=True)
    shown = profile_for_json(profile, *which)
    if output is not None:
        profile.save_pretrained(output, force=force)
        shown = {"output": str(output), **shown}
    put_out({"model": model.name, **shown}, as_json, lambda: profile_in_words(profile, *which))


def _check_there(architecture: Architecture, layer: int | None, expert: int | None) -> None:
    """Raise PlanError where the experts asked for are not there: before the work."""
    routers = architecture.routers if layer is None else (architecture.router(layer),)
    most = max((router.experts for router in routers), default=0)
    if expert is not None and expert >= most:
        raise PlanError(f"there is no expert {expert} there: experts are 0 to {most - 1}")


def _in_words(result: dict[str, Any]) -> str:
    result = on_one_line(result)
    routers = result["routers"]
    lines = [
        f"{result['model']}: {result['model_type']}, "
        f"{count_of(result['layers'], 'layer')}, width {result['hidden_size']}",
        f"architecture {result['architecture'][:16]}…, weights {in_brief(result['weights'])}",
    ]
    if (made := result["dequantised"]) is not None:
        left = f"; not read by transformers: {', '.join(made['not_read'])}" if made["not_read"] else ""
        how = f"dequantised from {', '.join(made['from'])}" if made["from"] else "not quantised: read"
        lines.append(f"{how} to {made['to']}{left}")
    if result["chat_template"] is False:
        lines.append("no chat template: it reads texts, and chats by --chat-template FILE")
    lines.append("")
    if not routers:
        return "\n".join([*lines, "No routers: the model is dense, so there are no experts to steer."])
    rows = [
        (
            _span(first, last),
            router["experts"],
            router["top_k"],
            router["rule"],
            f"{router['groups'][1]} of {router['groups'][0]}" if router["groups"] else "–",
            router["shared_experts"],
            "yes" if router["steerable"] else f"no: {router['reason']}",
        )
        for first, last, router in _runs(routers)
    ]
    header = ("layers", "experts", "top-k", "rule", "groups", "shared", "steerable")
    beside = [
        f"Beside it in layer {_span(first, last)}: a router that is not steered, because {router['reason']}."
        for first, last, router in _runs(result["beside"])
    ]
    return "\n".join([*lines, in_columns(header, rows), *([""] if beside else []), *beside])


def _runs(routers: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """Consecutive layers with equal routers as (first layer, last layer, router)."""
    runs: list[tuple[int, int, dict[str, Any]]] = []
    for router in routers:
        facts = {key: value for key, value in router.items() if key != "layer"}
        if runs and runs[-1][2] == facts and runs[-1][1] == router["layer"] - 1:
            runs[-1] = (runs[-1][0], router["layer"], facts)
        else:
            runs.append((router["layer"], router["layer"], facts))
    return runs


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"
