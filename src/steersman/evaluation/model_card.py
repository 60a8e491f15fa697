"""The model card of an artifact on the Hub: what it is, how it was made, what it does, where that ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from steersman.artifacts import read_manifest
from steersman.artifacts.hub import is_repository
from steersman.artifacts.kinds import COMMON, KINDS
from steersman.evaluation.evaluation_report import evidence_in_words
from steersman.evaluation.evaluation_report.card import plan_in_words, provenance_in_words
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


def model_card(folder: Path, repo_id: str, licence: str) -> str:
    """The README.md of a repository that holds an artifact: metadata as the Hub reads it, and Markdown.

    Args:
        folder: The artifact, saved.
        repo_id: Where it will be, which the example names.
        licence: As the Hub names it: "apache-2.0".

    Raises:
        ArtifactError: the folder holds no artifact.
    """
    manifest = read_manifest(folder)
    models = base_models(manifest)
    data = ModelCardData(
        license=licence,
        library_name="steersman",
        tags=["steersman", manifest["kind"].replace("_", "-")],
        base_model=models[0] if len(models) == 1 else models or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(harmless(_lines(folder, manifest, repo_id))) + "\n"


def base_models(manifest: Mapping[str, Any]) -> list[str]:
    """The models that an artifact belongs to, where they are on the Hub by their names."""
    models = [manifest["model"], *([manifest["source"]["model"]] if "source" in manifest else [])]
    return [name for name in dict.fromkeys(model["name"] for model in models) if _on_hub(name)]


def _on_hub(name: str) -> bool:
    return is_repository(name) and not Path(name).exists()


def _lines(folder: Path, manifest: dict[str, Any], repo_id: str) -> list[str]:
    kind = manifest["kind"]
    lines = [
        f"# {markdown(repo_id.rpartition('/')[2])}",
        "",
        f"{KINDS[kind].words.capitalize()} of Steersman. {MEANING[kind]}",
        "",
        *_of_model("for", manifest),
        *(_of_model("from", manifest["source"]) if "source" in manifest else ()),
        "",
        "## What it is",
        "",
    ]
    plan = Steering.from_pretrained(folder) if kind == "steering" else None
    lines += [f"- {line}" for line in (_facts(manifest) if plan is None else _of_plan(plan))]
    lines += ["", "## How it was made", "", f"- with steersman {markdown(manifest['tool_version'])}"]
    lines += [f"- {line}" for line in provenance_in_words(manifest["made_from"])]
    if plan is not None:
        lines += ["", "## What it does, and what it costs", "", *_effects(plan)]
    if kind == "concept_vector":
        lines += ["", "## How well it tells held-out pairs apart", "", *_separation(manifest)]
    lines += ["", "## Limits", "", f"- {LIMITS[kind]}"]
    if plan is not None:
        lines.append(
            "- Nothing is known of other prompts, languages and models than those that were measured."
        )
    return [*lines, "", "## How to use it", "", *_how_to(kind, repo_id)]


def _of_model(what: str, manifest: Mapping[str, Any]) -> list[str]:
    model, architecture = manifest["model"], manifest["architecture"]
    revision = f" at {markdown(model['revision'])}" if model["revision"] else ""
    return [
        f"- {what}: {markdown(model['name'] or 'a model in memory')}{revision}, "
        f"{markdown(architecture['model_type'])}, {count_of(len(architecture['layers']), 'layer')}",
        f"- its weights: {markdown(model['weights_id'])}",
    ]


def _of_plan(plan: Steering) -> list[str]:
    told = told_steering("", plan, None)
    return [
        f"fingerprint: {plan.fingerprint}",
        f"tokens it acts on: {', '.join(told['scope']) or 'none'}",
        *plan_in_words(told),
    ]


def _facts(manifest: Mapping[str, Any]) -> list[str]:
    """What a manifest says beside what all say, as far as a line can."""
    own = {key: of for key, of in manifest.items() if key not in COMMON}
    plain = {key: of for key, of in own.items() if isinstance(of, str | int | float) and of != ""}
    return [f"{markdown(key)}: {markdown(of)}" for key, of in sorted(plain.items())]


def _effects(plan: Steering) -> list[str]:
    if not plan.evidence:
        return [
            "**Not evaluated.** No evaluation is attached to this plan: neither an effect nor a cost has "
            "been measured. `steersman evaluate MODEL --task TASK --side TASK --steering PLAN -o FOLDER "
            "--attach` does both, and attaches what it found.",
        ]
    found = [f"- {markdown(line)}" for line in evidence_in_words(plan.evidence)]
    tasks = [task for of in plan.evidence if isinstance(of, Mapping) for task in of["tasks"]]
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


def _how_to(kind: str, repo_id: str) -> list[str]:
    lines = ["```python", "import steersman", ""]
    name = {"steering": "plan", "concept_vector": "concept"}.get(kind, "found")
    lines.append(f'{name} = steersman.{CLASSES[kind]}.from_pretrained("{repo_id}")')
    if kind == "steering":
        lines += ["with plan.apply(model) as receipt:", "    model.generate(**inputs)"]
    if kind == "concept_vector":
        lines.append('plan = concept.steering("dose:0.3")')
    lines += ["```", ""]
    if kind == "steering":
        lines += ["```bash", f"steersman chat MODEL --steering {repo_id}", "```", ""]
    return lines
