"""The steering card: what a plan is, what it was made from, what it does, what it costs, where that ends."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steersman.chat_record import chats_behind
from steersman.errors import ArtifactError
from steersman.evaluation.concluded import FAMILIES, family_of
from steersman.evaluation.evaluation_report.markdown_report import paragraphs
from steersman.evaluation.evaluation_report.numbers import Pieces
from steersman.evaluation.evaluation_report.place import Place, plain
from steersman.evaluation.evaluation_report.tables import strength
from steersman.evaluation.evaluation_report.texts import harmless, markdown
from steersman.evaluation.evaluation_report.verdicts import (
    control_sentences,
    effect_sentence,
    side_effects_sentence,
)
from steersman.showing import count_of
from steersman.steering import sha256_of

_COMPARED = ("steered", "reversed", "strength", "prompt+steered")


def steering_card(result: Mapping[str, Any], steering: str) -> dict[str, Any]:
    """All that an evaluation says of one of its plans, as data.

    Args:
        result: An evaluation, as in evaluation.json.
        steering: The plan's name in it.

    Returns:
        {"steering", "fingerprint", "model", "scope", "strengths", "vectors", "made_from", "effects", "costs",
        "limits", "not_measured", "evaluation"}: the last is the sha256 of the evaluation's canonical JSON.

    Raises:
        ArtifactError: the evaluation has no plan of that name.
    """
    plan = _plan(result, steering)
    return {
        "steering": steering,
        "fingerprint": plan["fingerprint"],
        "model": result["model"],
        **{key: plan[key] for key in ("scope", "strengths", "vectors")},
        "made_from": plan["provenance"],
        "effects": _found(result, steering, "effect"),
        "costs": _found(result, steering, "side"),
        "limits": list(result["limits"]),
        "not_measured": not_measured(result, steering),
        "evaluation": sha256_of(result),
    }


def card_evidence(result: Mapping[str, Any], steering: str) -> dict[str, Any]:
    """What goes into a plan's `evidence`: the evaluation's hash, and each effect and cost in brief.

    Raises `ArtifactError` where the evaluation has no plan of that name.
    """
    _plan(result, steering)
    tasks = [found for role in ("effect", "side") for found in _found(result, steering, role)]
    return {
        "kind": "evaluation",
        "sha256": sha256_of(result),
        "created": result["created"],
        "steersman": result["steersman"],
        "tasks": tasks,
    }


def _plan(result: Mapping[str, Any], steering: str) -> dict[str, Any]:
    for plan in result["steerings"]:
        if plan["name"] == steering:
            return dict(plan)
    known = ", ".join(plan["name"] for plan in result["steerings"]) or "none"
    raise ArtifactError(f"the evaluation has no plan called {steering!r} (it has: {known})")


def _found(result: Mapping[str, Any], steering: str, role: str) -> list[dict[str, Any]]:
    """The first metric of each task of a role under each arm of the plan."""
    arms = [a for a in result["arms"] if a["steering"] == steering and a["kind"] in _COMPARED]
    found = []
    for task in result["tasks"]:
        metric = task["metrics"][0]
        for arm in arms:
            change = task["differences"].get(arm["name"], {}).get(metric["name"])
            if task["role"] == role and change is not None:
                found.append(_brief(task, metric, arm, change))
    return found


def _brief(
    task: Mapping[str, Any], metric: Mapping[str, Any], arm: Mapping[str, Any], change: Mapping[str, Any]
) -> dict[str, Any]:
    among = [of["p"] for of in task["random"] or () if arm["name"] in of["arms"]]
    return {
        "task": task["name"],
        "sha256": task["sha256"],
        "role": task["role"],
        "items": task["items"],
        "metric": metric["title"],
        "kind": metric["kind"],
        "arm": arm["name"],
        "arm_kind": arm["kind"],
        "strength": arm["strength"],
        **{key: change.get(key) for key in ("difference", "low", "high", "p", "p_holm")},
        "random_p": max(among, default=None),
    }


def not_measured(result: Mapping[str, Any], steering: str) -> list[str]:
    """What a reader may miss, and was not done."""
    kinds = {arm["kind"] for arm in result["arms"] if arm["steering"] in (steering, None)}
    effects = [task for task in result["tasks"] if task["role"] == "effect"]
    missing = []
    if not any(task["role"] == "side" for task in result["tasks"]):
        missing.append("side effects: no other task was run")
    if not any(task["random"] for task in effects):
        missing.append("random plans of the same shape: whether any such plan does as much")
    drawn = [of for task in effects for of in task["random"] or () if of["steering"] == steering]
    families = {family_of(of) for of in drawn}
    if "concept" in _plan(result, steering)["provenance"] and FAMILIES["shuffled"] not in families:
        missing.append("label-shuffled concepts: whether the same pairs do as much with mixed-up labels")
    if "reversed" not in kinds:
        missing.append("the other direction")
    if "prompt" not in kinds:
        missing.append("an instruction in the system prompt, for comparison")
    if not any(task["dose_response"] for task in effects):
        missing.append("other strengths")
    if not any(task["factorial"] for task in effects):
        missing.append("prompts that work against it (attack templates)")
    tasks = count_of(len(result["tasks"]), "task")
    return [*missing, f"other models, languages and kinds of prompts than those of {tasks}"]


def card(result: Place) -> str:
    """The cards of all plans of an evaluation, in Markdown."""
    names = [plan["name"] for plan in result.value["steerings"]]
    if not names:
        return "# Steering card\n\nThis evaluation has no plan.\n"
    return "\n".join(line for name in names for line in _card(result, name)) + "\n"


def _card(result: Place, name: str) -> list[str]:
    plan = harmless(_plan(result.value, name))
    tasks = list(result["tasks"])
    effects, sides = ([t for t in tasks if t.value["role"] == role] for role in ("effect", "side"))
    model = result.value["model"]
    lines = [
        f"# Steering card: {markdown(name)}",
        "",
        f"- for: {markdown(model['name'] or 'a model in memory')} (weights {markdown(model['weights_id'])})",
        f"- fingerprint: {markdown(plan['fingerprint'])}",
        f"- tokens it acts on: {markdown(', '.join(plan['scope']) or 'none')}",
        "",
        "## What it is",
        "",
        *(f"- {line}" for line in plan_in_words(plan)),
        "",
        "## From which data",
        "",
        *(f"- {line}" for line in provenance_in_words(plan["provenance"])),
        "",
        "## What it does",
        "",
        *paragraphs([sentence for task in effects for sentence in _effects(result, task, name)]),
        "## What it costs",
        "",
        *paragraphs(
            [side_effects_sentence(result, arm) for arm in _arms(result, name, "steered", "reversed")]
        ),
    ]
    lines += [line for task in sides for line in _cost_lines(result, task, name)]
    lines += ["", "## Limits", "", *(f"- {markdown(limit)}" for limit in result.value["limits"])]
    lines += [*(f"- not measured: {markdown(what)}" for what in not_measured(result.value, name)), ""]
    place, of = str(plan["path"] or name), harmless(str(model["name"] or ""))
    return [
        *lines,
        "## How to apply it",
        "",
        "```bash",
        f"steersman generate {_quoted(of)} --steering {_quoted(place)} --prompt TEXT",
        "```",
        "",
        *how_to_apply(of, plan["provenance"], _opened(place, plan["provenance"])),
        'A plan applies to the weights that it was made for, and to others only with match="architecture".',
        "",
    ]


def _arms(result: Place, name: str, *kinds: str) -> list[str]:
    return [a["name"] for a in result.value["arms"] if a["steering"] == name and a["kind"] in kinds]


def _effects(result: Place, task: Place, name: str) -> Sequence[Pieces]:
    """Sentences of one task: each arm of the plan, and the random control where it is of one of them."""
    arms = [a for a in _arms(result, name, *_COMPARED) if a in task.value["differences"]]
    sentences = [effect_sentence(result, task, arm) for arm in arms]
    return [*sentences, *control_sentences(task, name)]


def _cost_lines(result: Place, task: Place, name: str) -> list[str]:
    arms = [a for a in _arms(result, name, "steered", "reversed") if a in task.value["differences"]]
    return [f"- {markdown(plain(effect_sentence(result, task, arm)))}" for arm in arms]


def plan_in_words(plan: Mapping[str, Any]) -> list[str]:
    """A plan's edits, a line for each layer."""
    lines = []
    for layer, experts in sorted(plan["strengths"].items(), key=lambda entry: int(entry[0])):
        for way, sign in (("put into", 1), ("kept out of", -1)):
            named = [
                f"{expert} (λ {strength(value)})"
                for expert, value in sorted(experts.items(), key=lambda entry: int(entry[0]))
                if value * sign > 0
            ]
            if named:
                lines.append(f"layer {layer}: {way} the top-k: {', '.join(named)}")
    lines += [
        f"layer {vector['layer']}: {vector['operation']} a vector of norm {vector['norm']:.3g}, "
        f"dial {strength(vector['strength'])}"
        for vector in plan["vectors"]
    ]
    return lines or ["nothing is edited"]


def provenance_in_words(provenance: Mapping[str, Any]) -> list[str]:
    """What a plan was made from, down to the files: how each step was made, and of which data by hash."""
    return list(_steps(provenance)) or ["not recorded"]


def _steps(made: Mapping[str, Any], what: str = "") -> Iterator[str]:
    """One thing and, below it, what that was made from; `what` it is to the one above."""
    known = {
        key: of for key, of in made.items() if isinstance(of, str | int | float) and of not in ("", False)
    }
    head = f"{markdown(what.replace('_', ' '))}: " if what else ""
    if how := known.pop("made", None):
        head += f"{_MADE.get(str(how)) or f'made by {markdown(how)}'}; "
    facts = ", ".join(fact_in_words(key, of) for key, of in sorted(known.items()))
    if said := (head + facts).rstrip(":; "):
        yield said
    for source in made.get("from") or []:
        if isinstance(source, Mapping):
            kind = str(source.get("kind") or "from")
            yield from _steps({key: of for key, of in source.items() if key != "kind"}, kind)
    for part in ("concept", "map", "gate", "pairs"):
        if isinstance(made.get(part), Mapping):
            yield from _steps(made[part], part)


_MADE = {
    "by hand": "made by hand",
    "concept": "made of a concept",
    "imported": "imported",
    "composed": "composed of other plans",
    "scaled": "another plan, scaled",
    "reversed": "another plan, reversed",
    "rescoped": "another plan, for other tokens",
}


def fact_in_words(key: str, of: object) -> str:
    """A setting, in Markdown: "by: risk difference", and of one that is on its name alone."""
    name = markdown(key.replace("_", " "))
    if of is True:
        return name
    told = str(of).replace("_", " ") if key in ("by", "method", "position") else of
    return f"{name}: {markdown(told)}"


def how_to_apply(model: str, made: Mapping[str, Any], *plan: str) -> list[str]:
    """Python that runs as it stands where the model and the plan lie; `plan`: the lines that make it."""
    text = "please tell me about the sea"
    chat = f'[{{"role": "user", "content": "{text}"}}]'
    inputs = f'tokenizer("{text}", return_tensors="pt")'
    if chats_behind(made):
        inputs = (
            f"tokenizer.apply_chat_template(\n    {chat},\n    add_generation_prompt=True, return_dict=True, "
            'return_tensors="pt",\n)'
        )
    return [
        "```python",
        "import steersman",
        "",
        f"model, tokenizer = steersman.load_model({json.dumps(model or '…', ensure_ascii=False)})",
        *plan,
        f"inputs = {inputs}",
        "with plan.apply(model) as receipt:",
        "    answer = model.generate(**inputs.to(model.device), max_new_tokens=40)",
        "print(tokenizer.decode(answer[0]))",
        "print(receipt)",
        "```",
        "",
    ]


def _opened(place: str, made: Mapping[str, Any]) -> str:
    """The line that opens a plan, dialled where PATH@STRENGTH named one. A folder may be called so, too: what
    is opened from it has its name.
    """
    factor = made.get("factor") if made.get("made") == "scaled" and "name" not in made else None
    dial = f"{factor!r}".removesuffix(".0") if isinstance(factor, int | float) else ""
    scaled = dial and place.endswith(f"@{dial}")
    read = json.dumps(place.removesuffix(f"@{dial}") if scaled else place, ensure_ascii=False)
    return f"plan = {f'{dial} * ' if scaled else ''}steersman.Steering.from_pretrained({read})"


def _quoted(name: str) -> str:
    """A name as a shell reads it; what could leave its line is left to the reader."""
    return shlex.quote(name) if name and name.isprintable() else "…"
