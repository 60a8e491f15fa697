"""The model card of an artifact on the Hub: what it is, how it was made, what it does, where that ends."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from steersman.artifacts import read_manifest
from steersman.artifacts.hub import is_repository
from steersman.artifacts.kinds import COMMON, KINDS
from steersman.errors import ArtifactError
from steersman.evaluation.evaluation_report import evidence_in_words
from steersman.evaluation.evaluation_report.card import (
    fact_in_words,
    how_to_apply,
    plan_in_words,
    provenance_in_words,
)
from steersman.evaluation.evaluation_report.texts import harmless, markdown
from steersman.evaluation.told import told_steering
from steersman.showing import count_of
from steersman.steering import Steering

MEANING = {
    "steering": "Edits of a language model that is steered while it runs; no weight of it is in here.",
    "routing_contrast": "How much more often each expert of a Mixture-of-Experts model is used on one side "
    "of contrast pairs than on the other.",
    "concept_vector": "In each layer of a language model the direction from one side of contrast pairs to "
    "the other.",
    "affine_map": "Takes states of one language model into the space of another.",
    "expert_profile": "What the experts of a Mixture-of-Experts model are used for, seen on text.",
    "causal_screen": "What each expert of a Mixture-of-Experts model causes, by the effect of it alone.",
}
LIMITS = {
    "steering": "It was made for the weights named above and applies to no others, unless that is asked for.",
    "routing_contrast": "Differences in use: wording alone can make them. Whether an expert causes anything "
    "shows in steering.",
    "concept_vector": "That held-out pairs are told apart does not say that adding the direction steers.",
    "affine_map": "A good R² alone does not say that a concept arrives: each has to pass its own gate.",
    "expert_profile": "It ranks by counts on the texts below, and tests nothing.",
    "causal_screen": "Effects are of the prompts that were screened, measured in what the model would answer "
    "next; an evaluation on other prompts is another matter.",
}
CLASSES = {
    "steering": "Steering",
    "routing_contrast": "RoutingContrast",
    "concept_vector": "ConceptVector",
    "affine_map": "AffineMap",
    "expert_profile": "ExpertProfile",
    "causal_screen": "CausalScreen",
}
"""The public class of each kind."""
WORDS = {
    "pairs": "contrast pairs",
    "items": "items that were screened",
    "choosing_items": "items that sets were chosen on",
    "clusters": "independent groups among them",
    "texts": "texts read",
    "tokens": "tokens read",
    "skipped": "left out as too long",
    "alike": "left out as both sides are the same tokens",
    "shard": "part",
    "method": "method",
    "position": "states are read at",
    "alignment": "states are paired at",
    "counted": "tokens that were counted",
    "new_tokens": "new tokens of an answer",
    "weighting": "weighted by",
    "replicates": "bootstrap replicates",
    "scope": "tokens that were steered",
    "risk_difference": "risk differences stand beside the effects",
    "subsets": "effects in random subsets stand beside those of each expert alone",
}
"""What a manifest's keys mean, in the order of a card."""


def model_card(folder: Path, repo_id: str, licence: str, base_model: str | None = None) -> str:
    """The README.md of a repository that holds an artifact: metadata as the Hub reads it, and Markdown.

    Args:
        folder: The artifact, saved.
        repo_id: Where it will be, which the example names.
        licence: As the Hub names it: "apache-2.0".
        base_model: The model that it is for, `owner/name`, instead of what is known.

    Raises:
        ArtifactError: the folder holds no artifact, or the base model is no name of the Hub.
    """
    manifest = read_manifest(folder)
    models = base_models(manifest, base_model)
    data = ModelCardData(
        license=licence,
        library_name="steersman",
        tags=["steersman", manifest["kind"].replace("_", "-")],
        base_model=models[0] if len(models) == 1 else models or None,
    )
    return (
        f"---\n{data.to_yaml()}\n---\n\n"
        + "\n".join(harmless(_lines(folder, manifest, models, repo_id)))
        + "\n"
    )


def base_models(manifest: Mapping[str, Any], given: str | None = None) -> list[str]:
    """The models that an artifact belongs to: as given; else where they are on the Hub by their names, or are
    a local copy whose configuration names one there.
    """
    if given is not None:
        if not is_repository(given):
            raise ArtifactError(f"{given!r} is no model on the Hub; right is OWNER/NAME")
        return [given]
    names = dict.fromkeys(of["model"]["name"] for of in (manifest, manifest.get("source")) if of)
    return [found for name in names if (found := _hub_name(name))]


def _hub_name(name: str) -> str | None:
    found: object = name
    if name and _is_local(name):
        try:
            found = json.loads((Path(name) / "config.json").read_bytes())["_name_or_path"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
    return found if isinstance(found, str) and is_repository(found) and not Path(found).exists() else None


def _without_places(value: Any, key: str = "") -> Any:
    """JSON data in which of paths on this machine only the last name is left; texts of other fields stay."""
    if isinstance(value, str):
        place = _FORM.sub("", value)
        return value.removesuffix(place) + _last_name(place) if key in _NAMES and _is_local(place) else value
    if isinstance(value, Mapping):  # a template's arguments are texts, by whatever name
        return {of: entry if of == "arguments" else _without_places(entry, of) for of, entry in value.items()}
    return [_without_places(entry) for entry in value] if isinstance(value, list | tuple) else value


_NAMES = ("name", "model", "source", "task")
"""The fields that hold what was read: a name or a path."""
_FORM = re.compile(r"^(?!lab:)[\w-]{2,}:")
"""A task's form before a place, such as "jsonl:"; what is the lab's lies nowhere."""
_LOCAL = re.compile(r"[\\/~]|\.\.?[\\/]|[A-Za-z]:[\\/]")


def _is_local(name: str) -> bool:
    """Whether a name is that of a place on this machine, or on the one it was made on."""
    try:
        return bool(name) and (_LOCAL.match(name) is not None or Path(name).exists())
    except (OSError, ValueError):  # a text that no file system takes
        return False


def _last_name(place: str) -> str:
    return re.split(r"[\\/]", place.rstrip("\\/"))[-1]


def _lines(folder: Path, manifest: dict[str, Any], models: list[str], repo_id: str) -> list[str]:
    kind, loaded = manifest["kind"], _loaded(manifest["model"]["name"])
    manifest = _without_places(manifest)
    lines = [
        f"# {markdown(repo_id.rpartition('/')[2])}",
        "",
        f"{KINDS[kind].words.capitalize()} of Steersman. {MEANING[kind]}",
        "",
        *_of_model("for", manifest),
        *(_of_model("from", manifest["source"]) if "source" in manifest else ()),
        *_on_the_hub(manifest, models),
        "",
        "## What it is",
        "",
    ]
    plan = Steering.from_pretrained(folder) if kind == "steering" else None
    lines += [f"- {line}" for line in (_facts(manifest) if plan is None else _of_plan(plan))]
    if plan is None:
        lines += _tables(folder, kind)
    lines += ["", "## How it was made", "", f"- with steersman {markdown(manifest['tool_version'])}"]
    lines += [f"- {line}" for line in provenance_in_words(manifest["made_from"])]
    if plan is not None:
        lines += ["", "## What it does, and what it costs", "", *_effects(_without_places(plan.evidence))]
    if kind == "concept_vector":
        lines += ["", "## How well it tells held-out pairs apart", "", *_separation(manifest)]
    lines += ["", "## Limits", "", f"- {LIMITS[kind]}"]
    if plan is not None:
        lines.append(
            "- Nothing is known of other prompts, languages and models than those that were measured."
        )
    return [*lines, "", "## How to use it", "", *_how_to(kind, repo_id, manifest, loaded)]


def _of_model(what: str, manifest: Mapping[str, Any]) -> list[str]:
    model, architecture = manifest["model"], manifest["architecture"]
    revision = f" at {markdown(model['revision'])}" if model["revision"] else ""
    return [
        f"- {what}: {markdown(model['name'] or 'a model in memory')}{revision}, "
        f"{markdown(architecture['model_type'])}, {count_of(len(architecture['layers']), 'layer')}",
        f"- its weights: {markdown(model['weights_id'])}",
    ]


def _on_the_hub(manifest: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    named = [of["model"]["name"] for of in (manifest, manifest.get("source")) if of]
    found = [markdown(name) for name in models if name not in named]
    return (
        [f"- on the Hub, as was said or as the copy's configuration names it: {', '.join(found)}"]
        if found
        else []
    )


def _loaded(name: str) -> str:
    """What code loads a model by: of a copy a stand-in, for what its configuration names may be what it was
    tuned from.
    """
    return f"{_PLACE}{_last_name(name)}" if _is_local(name) else name


_PLACE = "path/to/"


def _of_plan(plan: Steering) -> list[str]:
    told = told_steering("", plan, None)
    return [
        f"fingerprint: {plan.fingerprint}",
        f"tokens it acts on: {', '.join(told['scope']) or 'none'}",
        *plan_in_words(told),
    ]


def _facts(manifest: Mapping[str, Any]) -> list[str]:
    """What a manifest says beside what all say, as far as a line can, but for what is none."""
    rest = sorted(manifest.keys() - COMMON - WORDS.keys() - {"seed"})
    own = [(WORDS.get(key, key), manifest.get(key)) for key in [*WORDS, *rest]]
    return [fact_in_words(key, of) for key, of in own if isinstance(of, str | int | float) and of]


def _tables(folder: Path, kind: str) -> list[str]:
    """What is in an artifact, as `show` prints it."""
    import steersman

    lines = []
    for header, rows in getattr(steersman, CLASSES[kind]).from_pretrained(folder).as_tables():
        cells = [[name.replace("_", " ") for name in header], ["---"] * len(header), *rows]
        lines += ["", *(f"| {' | '.join(markdown(cell) for cell in row)} |" for row in cells)]
    return lines


def _effects(evidence: Sequence[str | Mapping[str, Any]]) -> list[str]:
    if not evidence:
        return [
            "**Not evaluated.** No evaluation is attached to this plan: neither an effect nor a cost has "
            "been measured. `steersman evaluate MODEL --task TASK --side TASK --steering PLAN -o FOLDER "
            "--attach` does both, and attaches what it found.",
        ]
    found = [f"- {markdown(line)}" for line in evidence_in_words(evidence)]
    tasks = [task for of in evidence if isinstance(of, Mapping) for task in of["tasks"]]
    if not any(task["role"] == "side" for task in tasks):
        found.append("- Side effects: no other task was run, so nobody can tell what else it does.")
    return found


def _separation(manifest: Mapping[str, Any]) -> list[str]:
    found = [one for one in manifest["separation"] if one is not None]
    if not found:
        return ["Nothing could be held out: there are too few pairs that do not belong together."]
    auroc, low, high = max(found)
    return [
        f"In its best layer of {len(found)}: AUROC {auroc:.3f} (95% interval {low:.3f} to {high:.3f}; "
        "½ is chance)."
    ]


def _how_to(kind: str, repo_id: str, manifest: Mapping[str, Any], model: str) -> list[str]:
    read = f'steersman.{CLASSES[kind]}.from_pretrained("{repo_id}")'
    if kind == "steering":
        chat = ["```bash", f"steersman chat {shlex.quote(model or 'MODEL')} --steering {repo_id}", "```", ""]
        return [*_stands_for(model), *how_to_apply(model, manifest["made_from"], f"plan = {read}"), *chat]
    if kind == "concept_vector":
        made = (f"concept = {read}", 'plan = concept.steering("dose:0.3")')
        return [*_stands_for(model), *how_to_apply(model, manifest["model"], *made)]
    return ["```python", "import steersman", "", f"found = {read}", "print(found)", "```", ""]


def _stands_for(model: str) -> list[str]:
    said = (
        "is the folder of the model named above; other weights are refused, those that it was tuned from too."
    )
    return [f"{markdown(model)} {said}", ""] if model.startswith(_PLACE) else []
