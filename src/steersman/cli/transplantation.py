"""The command that takes a concept to another model, or says first whether it will carry over: transplant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.certainty import NOT_SHOWN, SIGNIFICANT
from steersman.cli.composition import heard, made_in_words, tuning_step
from steersman.cli.concepts import Layers, steered_for_json
from steersman.cli.options import (
    ModelChoice,
    batch_size_option,
    chat_options,
    json_option,
    layers_option,
    scope_option,
)
from steersman.cli.output import in_columns, put_out, require_free
from steersman.errors import ModelError
from steersman.showing import count_of, on_one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from steersman import AffineMap, ConceptVector
    from steersman.edits import Scope


@click.command(short_help="Take a concept to another model; or --check whether it will carry over.")
@click.argument("concepts", nargs=-1, required=True, metavar="CONCEPT...")
@click.argument("map_", metavar="MAP")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FOLDER", help="Where it goes.")
@click.option(
    "--strength",
    metavar="X",
    help="A factor such as 1.5, or a dose: the length added, as a share of a state's [default: dose:0.3].",
)
@layers_option("Target layers, or all [default: of the best that pass, the one nearest to two thirds down].")
@click.option(
    "--target", metavar="MODEL", help="The model that the map leads to [default: the one that it names]."
)
@click.option(
    "--pairs",
    multiple=True,
    metavar="PAIRS",
    help="Pairs to look with; once, or once a concept [default: those that it was refined from].",
)
@click.option("--check", is_flag=True, help="Only say which concepts will carry over, and how that is known.")
@scope_option("answer")
@click.option("--device", metavar="DEVICE", help="Where to put the target: cpu, cuda, cuda:1, mps or auto.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Number format of the target's weights (default: the checkpoint's).",
)
@click.option("--revision", metavar="REV", help="The target's branch, tag or commit on the Hub.")
@chat_options
@click.option("--truncate", is_flag=True, help="Leave out pairs that are too long for the target.")
@batch_size_option(16)
@click.option(
    "--force", is_flag=True, help="Replace what is already there, and transplant what the gate refuses."
)
@json_option
def transplant(
    concepts: tuple[str, ...],
    map_: str,
    output: Path | None,
    strength: str | None,
    layers: Layers,
    target: str | None,
    pairs: tuple[str, ...],
    check: bool,
    scope: Scope,
    device: str | None,
    dtype: str | None,
    revision: str | None,
    chat: Mapping[str, Any],
    truncate: bool,
    batch_size: int,
    force: bool,
    as_json: bool,
) -> None:
    """Take CONCEPT through MAP into another model, as a steering; if held-out pairs show that it arrives.

    The gate: in the target, held-out pairs must lie further apart along the mapped direction than along
    concepts of the same pairs with other labels, and where both sides go on from one prompt, adding it must
    make its own side likelier. --check looks at several concepts, and ranks them. Layer and
    dose are defaults where none are given: `steersman tune` finds those that work.

    \b
    Examples:
      steersman transplant refusal bridge -o safer
      steersman transplant refusal bridge -o safer --strength dose:0.5 --layers 20
      steersman transplant --check refusal politeness noise bridge
      steersman transplant --check refusal bridge --target lab:target --pairs lab:refusal/test
    """
    _check_usage(concepts, output, strength, pairs, check)
    if output is not None:
        require_free(output, force, [Path(path) for path in (*concepts, map_)])
    from steersman import AffineMap, ConceptVector
    from steersman.concepts.transplant_check import check_source, mapped_layers

    bridge = AffineMap.from_pretrained(map_)
    read = {name: ConceptVector.from_pretrained(name) for name in dict.fromkeys(concepts)}
    for concept in read.values():  # before a model is opened
        check_source(bridge, concept)
        mapped_layers(bridge, concept, layers)
    if not (target or bridge.model) and not (force and layers is not None and not pairs):
        raise ModelError("the map's target has no name to open it by: give --target MODEL")
    revision = revision if target else revision or bridge.revision
    model = ModelChoice(target or bridge.model, device, dtype, revision, chat)
    options = {"layers": layers, "batch_size": batch_size, "truncate": truncate, "progress": True}
    if check:
        looked_at = dict(zip(read, pairs * len(read) if len(pairs) == 1 else pairs, strict=False))
        _check(bridge, read, looked_at, model, options, as_json)
        return
    _transplant(
        bridge,
        next(iter(read.values())),
        Path(str(output)),
        strength,
        pairs[0] if pairs else None,
        # What is forced into layers that are named needs no look at the target, unless one is asked for.
        None if force and layers is not None and not (target or pairs) else model,
        {**options, "scope": scope, "force": force},
        as_json,
        (map_, concepts[0]),
    )


def _check_usage(
    concepts: tuple[str, ...], output: Path | None, strength: str | None, pairs: tuple[str, ...], check: bool
) -> None:
    """Raise UsageError where the options do not go together."""
    wrong = None
    if check:
        if output is not None or strength is not None:
            wrong = "--check writes nothing: leave out -o and --strength"
        elif len(pairs) > 1 and len(pairs) != len(concepts):
            many = count_of(len(concepts), "concept")
            wrong = f"--pairs is given {len(pairs)} times for {many}: once, or once a concept"
    elif len(concepts) > 1:
        wrong = "one CONCEPT at a time, and then the MAP; --check looks at several"
    elif output is None:
        wrong = "give -o FOLDER, or --check"
    elif len(pairs) > 1:
        wrong = f"--pairs is given {len(pairs)} times for one concept"
    if wrong is not None:
        raise click.UsageError(wrong, click.get_current_context())


def _transplant(
    bridge: AffineMap,
    concept: ConceptVector,
    output: Path,
    strength: str | None,
    pairs: str | None,
    model: ModelChoice | None,
    options: dict[str, Any],
    as_json: bool,
    named: tuple[str, str],
) -> None:
    from steersman import transplant as take
    from steersman.concepts.dose import DEFAULT_DOSE, Strength
    from steersman.concepts.transplant_check import resolve_pairs

    strength = DEFAULT_DOSE if strength is None else strength
    Strength.parse(strength)
    looked_at = None if model is None else resolve_pairs(concept, pairs)
    target = None if model is None else model.open()
    steering = take(bridge, concept, strength, target=target, pairs=looked_at, **options)
    steering.save_pretrained(output, force=options["force"])
    gate = steering.provenance["gate"]
    result = {**steered_for_json(output, steering), "gate": gate}
    words = [*made_in_words(output, steering), *_gate_in_words(gate)]
    search = tuning_step(bridge.model or "TARGET", *named)
    put_out(result, as_json, lambda: "\n".join(words) + heard(output, steering) + search)


def _gate_in_words(gate: dict[str, Any]) -> list[str]:
    gate = on_one_line(gate)
    if not gate["asked"]:
        return ["forced: nobody has looked whether the concept arrives"]
    lines = [
        f"gate at layer {entry['layer']}: p = {_number(entry['p'])} among relabellings of "
        f"{gate['pairs']['name']}, z = {_number(entry['z'], 1)} (AUROC {_interval(entry)}); "
        f"the map explains {entry['share_explained']:.0%}; {_probe_in_words(entry)}"
        for entry in gate["layers"]
    ]
    return [*lines, "passed" if gate["passed"] else "forced: the gate refuses it"]


def _check(
    bridge: AffineMap,
    concepts: dict[str, ConceptVector],
    pairs: dict[str, str],
    model: ModelChoice,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    from steersman import check_transplant
    from steersman.concepts.transplant_check import rank, resolve_pairs

    looked_at = {name: resolve_pairs(concept, pairs.get(name)) for name, concept in concepts.items()}
    target = model.open()
    checks = {
        name: check_transplant(bridge, concept, target, looked_at[name], **options)
        for name, concept in concepts.items()
    }
    ranking = rank(checks)
    result = {
        "concepts": [{"concept": name, **checks[name].to_json()} for name in ranking],
        "source": bridge.source.model,
        "target": bridge.model,
    }
    put_out(result, as_json, lambda: _checked_in_words(result))


def _checked_in_words(result: dict[str, Any]) -> str:
    """The ranking, if there are several; and a page a concept, those first that carry over best."""
    result = on_one_line(result)
    head = f"from {result['source'] or 'a model in memory'} to {result['target'] or 'a model in memory'}"
    ranking = [_ranking(result["concepts"])] if len(result["concepts"]) > 1 else []
    pages = [_page(entry) for entry in result["concepts"]]
    return "\n\n".join([head, *ranking, *pages, _SCALE])


def _page(entry: dict[str, Any]) -> str:
    rows = [
        (
            layer["layer"],
            layer["source_layer"],
            _interval({**layer, **{key: layer[f"source_{key}"] for key in ("auroc", "low", "high")}}),
            f"{layer['share_explained']:.0%}",
            _interval(layer),
            _number(layer["z"], 1),
            _number(layer["p"]),
            _probe_in_table(layer["probe"]),
            "passes" if layer["passed"] else "refused",
        )
        for layer in entry["layers"]
    ]
    header = ("layer", "from", "at the source", "explained", "in the target", "z", "p", "probe", "gate")
    left_out = f", {entry['skipped']} left out as too long" if entry["skipped"] else ""
    left_out += f", {entry['alike']} left out as both sides are the same tokens" if entry["alike"] else ""
    return "\n".join(
        [
            f"{entry['concept']}: {_verdict(entry)}",
            f"looked at with {count_of(entry['held_out'], 'held-out pair')} of {entry['pairs']['name']}, in "
            f"{count_of(entry['clusters'], 'cluster')}{left_out}",
            "",
            in_columns(header, rows),
        ]
    )


_SCALE = (
    "AUROCs of held-out pairs, 0.5 being chance. p decides: the share of relabellings of the pairs' groups,\n"
    "refitted alike, of which as much arrives at any layer; z: how far beyond them, in standard deviations.\n"
    "Probe: what adding it does to the log-odds of its own side, in nats, and p among relabelled concepts."
)


def _verdict(entry: dict[str, Any]) -> str:
    from steersman.concepts.transplant_check import why_untold

    if entry["passed"]:
        return f"shown: carries over, best at layer {entry['layer']}"
    best = next(layer for layer in entry["layers"] if layer["layer"] == entry["layer"])
    if best["auroc"] is None:
        return "cannot tell: none of the pairs are held out, or they are of one group"
    if best["p"] is None:
        return f"cannot tell: {why_untold(entry['clusters'])}"
    if best["verdict"] == NOT_SHOWN:
        return "not shown: its AUROC is within 0.05 of chance"
    if best["map_p"] > SIGNIFICANT:
        return "cannot tell: the map explains no more than one of mixed-up rows"
    if best["probe"] is not None and best["p"] <= SIGNIFICANT:
        return "cannot tell: adding it does not make its own side likelier than relabelled concepts do"
    return "cannot tell: pairs with other labels bring as much"


def _probe_in_table(probe: dict[str, float] | None) -> str:
    return "–" if probe is None else f"{probe['change']:+.2f}, p = {probe['p']:.3f}"


def _probe_in_words(entry: dict[str, Any]) -> str:
    probe = entry["probe"]
    if probe is None:
        return f"not probed: {entry['unprobed']}"
    return (
        f"adding it changes the log-odds of its own side by {probe['change']:+.2f} nats "
        f"[{probe['low']:+.2f}, {probe['high']:+.2f}], p = {probe['p']:.3f} among relabelled concepts"
    )


def _ranking(concepts: list[dict[str, Any]]) -> str:
    rows = []
    for place, entry in enumerate(concepts, 1):
        best = next(layer for layer in entry["layers"] if layer["layer"] == entry["layer"])
        gate = "passes" if entry["passed"] else "refused"
        rows.append((place, entry["concept"], best["layer"], _interval(best), _number(best["p"]), gate))
    return in_columns(("", "concept", "layer", "in the target", "p", "gate"), rows)


def _interval(entry: dict[str, Any]) -> str:
    if entry["auroc"] is None:
        return "–"
    return f"{entry['auroc']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
