"""Commands about saved artifacts: show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.chat_record import ChatRecord
from steersman.cli.composition import plan_for_json, plan_in_words
from steersman.cli.concepts import concept_for_json, concept_in_words
from steersman.cli.experts import counts_in_words, in_table, summary
from steersman.cli.options import SteeringChoice, SteeringType, force_option, json_option
from steersman.cli.output import in_columns, put_out, whole_file
from steersman.cli.profiles import filter_options, profile_for_json, profile_in_words
from steersman.cli.screening import draw_screen, screen_for_json, screen_in_words
from steersman.cli.shards import shards_in_words
from steersman.errors import ArchitectureMismatch, ArtifactError, WeightsMismatch
from steersman.models.weights_ids import in_brief
from steersman.showing import count_of, on_one_line
from steersman.steering import source_in_words, sources_of

if TYPE_CHECKING:
    from steersman import CausalScreen, ExpertProfile, RoutingContrast, Steering


@click.command()
@click.argument("artifact")
@click.option(
    "--table",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A contrast's or a screen's experts, all of them, as .csv or .parquet.",
)
@click.option(
    "--heatmap",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A contrast's layer × expert map as .png, or as .svg with tooltips; a screen's as .png.",
)
@click.option("--steering", type=SteeringType(), metavar="PATH", help="Outline its experts on the map.")
@click.option("--experts", metavar="PROFILE", help="Say what experts are for in the tooltips of an .svg map.")
@filter_options
@force_option
@json_option
def show(
    artifact: str,
    table: Path | None,
    heatmap: Path | None,
    steering: SteeringChoice | None,
    experts: str | None,
    layer: int | None,
    expert: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """What ARTIFACT is, what it was made from, and what is in it.

    \b
    Examples:
      steersman show safer
      steersman show refusal --table refusal.csv --heatmap refusal.png --steering safer
      steersman show refusal --heatmap refusal.svg --experts experts
      steersman show experts --layer 2 --expert 5
    """
    from steersman.artifacts import read_manifest

    manifest = read_manifest(artifact)
    kind = manifest["kind"].replace("_", " ")
    if kind == "affine map" and not (table or steering or experts or layer is not None or expert is not None):
        _show_map(artifact, manifest, heatmap, force, as_json)
        return
    if kind == "causal screen" and not experts and layer is None and expert is None:
        _show_screen(artifact, manifest, table, _Drawing(heatmap, steering, None), force, as_json)
        return
    if kind != "routing contrast" and (table or heatmap or steering or experts):
        raise ArtifactError(
            f"{artifact}: --table, --heatmap and --steering go with a contrast or a screen, --experts with a "
            f"contrast; this is: {kind}"
        )
    if kind != "expert profile" and (layer is not None or expert is not None):
        raise ArtifactError(f"{artifact}: --layer and --expert go with an expert profile; this is: {kind}")
    if kind == "steering":
        _show_steering(artifact, manifest, as_json)
    elif kind == "expert profile":
        _show_profile(artifact, manifest, layer, expert, as_json)
    elif kind == "concept vector":
        _show_concept(artifact, manifest, as_json)
    else:
        drawing = _Drawing(heatmap, steering, experts)
        _show_contrast(artifact, manifest, table, drawing, force, as_json)


def _show_profile(
    artifact: str, manifest: dict[str, Any], layer: int | None, expert: int | None, as_json: bool
) -> None:
    from steersman import ExpertProfile

    profile = ExpertProfile.from_pretrained(artifact)
    result = {"manifest": manifest, **profile_for_json(profile, layer, expert)}
    words = [f"{artifact}: what experts are for", *_origin(manifest)]
    put_out(result, as_json, lambda: "\n".join([*words, profile_in_words(profile, layer, expert)]))


def _show_screen(
    artifact: str,
    manifest: dict[str, Any],
    table: Path | None,
    drawing: _Drawing,
    force: bool,
    as_json: bool,
) -> None:
    from steersman import CausalScreen

    _check_table(table)
    if drawing.path is not None and drawing.path.suffix != ".png":
        raise ArtifactError(f"{drawing.path}: a screen's map is written as .png")
    found = CausalScreen.from_pretrained(artifact)
    plan, _ = drawing.open(artifact, found)
    result: dict[str, Any] = {"manifest": manifest, **screen_for_json(found)}
    with _file(table, force) as for_table, _file(drawing.path, force) as for_map:
        if for_table is not None:
            _write_table(found, for_table)
            result["table"] = str(table)
        if for_map is not None:
            draw_screen(found, plan, for_map)
            result["heatmap"] = str(drawing.path)
    words = [f"{artifact}: a causal screen", *_origin(manifest)]
    words += [f"written: {result[key]}" for key in ("table", "heatmap") if key in result]
    put_out(result, as_json, lambda: "\n".join([*words, screen_in_words(found)]))


def _check_table(table: Path | None) -> None:
    if table is not None and table.suffix not in (".csv", ".parquet"):
        raise ArtifactError(f"{table}: a table is written as .csv or .parquet")


def _show_map(
    artifact: str, manifest: dict[str, Any], heatmap: Path | None, force: bool, as_json: bool
) -> None:
    from steersman import AffineMap
    from steersman.cli.maps import check_heatmap, draw_map, map_for_json, map_in_words

    found = AffineMap.from_pretrained(artifact)
    check_heatmap(heatmap, found.shard, force)
    if heatmap is not None:
        with whole_file(heatmap, force) as place:
            draw_map(found, place)
    result = {"manifest": manifest, **map_for_json(found)}
    words = [f"{artifact}: an affine map", *_origin(manifest)]
    put_out(result, as_json, lambda: "\n".join([*words, map_in_words(found)]))


def _show_concept(artifact: str, manifest: dict[str, Any], as_json: bool) -> None:
    from steersman import ConceptVector

    concept = ConceptVector.from_pretrained(artifact)
    result = {"manifest": manifest, **concept_for_json(concept)}
    words = [f"{artifact}: a concept vector", *_origin(manifest)]
    put_out(result, as_json, lambda: "\n".join([*words, *concept_in_words(concept, result)]))


def _show_steering(artifact: str, manifest: dict[str, Any], as_json: bool) -> None:
    from steersman import Steering

    steering = Steering.from_pretrained(artifact)
    result: dict[str, Any] = {
        "manifest": manifest,
        "strengths": {
            str(layer): {str(expert): strength for expert, strength in experts.items()}
            for layer, experts in steering.strengths.items()
        },
    }
    if vectors := plan_for_json(steering)["vectors"]:
        result["vectors"] = vectors
    try:
        if sources := sources_of(steering.provenance):
            result["sources"] = sources
    except _OTHER_FORM:
        raise _of_other_form(artifact) from None
    put_out(result, as_json, lambda: _in_words(artifact, manifest, steering))


@dataclass(frozen=True)
class _Drawing:
    """A map to draw: where, with which plan outlined, with whose tooltips."""

    path: Path | None
    steering: SteeringChoice | None
    experts: str | None

    def check(self) -> None:
        """Raise ArtifactError where the map cannot be drawn as asked, before anything is."""
        if self.path is not None and self.path.suffix not in (".png", ".svg"):
            raise ArtifactError(f"{self.path}: a map is written as .png or .svg")
        if self.experts is not None and (self.path is None or self.path.suffix != ".svg"):
            raise ArtifactError("--experts is for the tooltips of a map: add --heatmap FILE.svg")

    def open(
        self, artifact: str, contrast: RoutingContrast | CausalScreen
    ) -> tuple[Steering | None, ExpertProfile | None]:
        """The plan and the profile, which must be for the contrast's model."""
        from steersman import ExpertProfile
        from steersman.models.same_weights import same_weights

        plan = None if self.steering is None else self.steering.open()
        if plan is not None and plan.architecture_id != contrast.architecture.id:
            raise ArchitectureMismatch(f"{artifact}: the steering to outline is for another architecture")
        profile = None if self.experts is None else ExpertProfile.from_pretrained(self.experts)
        if profile is not None and profile.architecture.id != contrast.architecture.id:
            raise ArchitectureMismatch(f"{self.experts}: describes experts of another architecture")
        if profile is not None and not same_weights(profile, contrast):
            raise WeightsMismatch(f"{self.experts}: describes experts of other weights than the contrast's")
        return plan, profile


def _show_contrast(
    artifact: str,
    manifest: dict[str, Any],
    table: Path | None,
    drawing: _Drawing,
    force: bool,
    as_json: bool,
) -> None:
    from steersman import RoutingContrast

    drawing.check()
    _check_table(table)
    contrast = RoutingContrast.from_pretrained(artifact)
    plan, profile = drawing.open(artifact, contrast)
    result: dict[str, Any] = {"manifest": manifest, **summary(contrast)}
    with _file(table, force) as for_table, _file(drawing.path, force) as for_map:  # both, or neither
        if for_table is not None:
            _write_table(contrast, for_table)
            result["table"] = str(table)
        if for_map is not None:
            _draw(contrast, plan, profile, for_map)
            result["heatmap"] = str(drawing.path)
    put_out(result, as_json, lambda: _contrast_in_words(artifact, manifest, result, contrast))


@contextmanager
def _file(path: Path | None, force: bool) -> Iterator[Path | None]:
    with nullcontext() if path is None else whole_file(path, force) as place:
        yield place


def _write_table(contrast: RoutingContrast | CausalScreen, place: Path) -> None:
    frame = contrast.table()
    if place.suffix == ".csv":
        frame.to_csv(place, index=False)
    else:
        frame.to_parquet(place, index=False)


def _draw(
    contrast: RoutingContrast, plan: Steering | None, profile: ExpertProfile | None, place: Path
) -> None:
    if place.suffix == ".svg":
        from steersman.evaluation.svg_map import svg_heatmap

        svg_heatmap(contrast, plan, profile, place)
    else:
        from steersman.evaluation import figures

        figures.heatmap(contrast, plan, place)


def _in_words(artifact: str, manifest: dict[str, Any], steering: Steering) -> str:
    try:
        return _steering_in_words(artifact, manifest, steering)
    except _OTHER_FORM:
        raise _of_other_form(artifact) from None


_OTHER_FORM = (TypeError, ValueError, KeyError, AttributeError)


def _of_other_form(artifact: str) -> ArtifactError:
    """What a plan was made from is free text to its format; only what Steersman wrote is known here."""
    return ArtifactError(f"{artifact}: made_from is not of the form that Steersman writes")


def _steering_in_words(artifact: str, manifest: dict[str, Any], steering: Steering) -> str:
    tables = [in_columns(*table) for table in steering.as_tables()]
    skipped = on_one_line(steering.provenance.get("skipped", []))
    lines = [
        f"{artifact}: a steering, {plan_in_words(plan_for_json(steering))}",
        *_origin(manifest),
        f"fingerprint {steering.fingerprint}",
    ]
    for table in tables or ["No edits: it changes nothing."]:
        lines += ["", table]
    lines += [f"skipped {entry['layer']}:{entry['expert']}: {entry['reason']}" for entry in skipped]
    if steering.evidence:
        from steersman.evaluation.evaluation_report import evidence_in_words

        lines += ["", *evidence_in_words(steering.evidence)]
    return "\n".join(lines)


def _contrast_in_words(
    artifact: str, manifest: dict[str, Any], result: dict[str, Any], contrast: RoutingContrast
) -> str:
    lines = [
        f"{artifact}: a routing contrast",
        *_origin(manifest),
        *counts_in_words(result),
        *shards_in_words(contrast),
        "",
        in_table(result["top"]),
    ]
    lines += [f"written: {result[key]}" for key in ("table", "heatmap") if key in result]
    return "\n".join(lines)


def _origin(manifest: dict[str, Any]) -> list[str]:
    """Which model an artifact is for, and what it was made from."""
    manifest = on_one_line(manifest)
    model, architecture = manifest["model"], manifest["architecture"]
    revision = f" at {model['revision']}" if model["revision"] else ""
    made_from = manifest["made_from"]
    sources = [
        f"{source.get('name') or source.get('kind') or 'plan'} ({str(source['sha256'])[:16]}…)"
        for source in made_from.get("from", [])
        if "sha256" in source
    ]
    sources += map(source_in_words, sources_of(made_from))
    lines = [
        f"for {model['name'] or 'a model in memory'}{revision}: {architecture['model_type']}, "
        f"{count_of(len(architecture['layers']), 'layer')}, "
        f"weights {in_brief(model['weights_id'])}",
        f"made with steersman {manifest['tool_version']}"
        + (f", {made_from['made']}" if "made" in made_from else "")
        + (f", from {', '.join(sources)}" if sources else ""),
    ]
    return [*lines, *_chats(manifest)]


def _chats(manifest: dict[str, Any]) -> list[str]:
    """How the chats behind an artifact were rendered: its own, its source's, those a plan was made from."""
    made_from = manifest["made_from"]
    found = {
        "chats": manifest["model"].get("chat") or made_from.get("chat"),
        "the source's chats": manifest["source"]["model"].get("chat") if "source" in manifest else None,
        "the concept's chats": made_from.get("concept", {}).get("chat"),
    }
    return [f"{whose} rendered by {ChatRecord(**chat)}" for whose, chat in found.items() if chat]
