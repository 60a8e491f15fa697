"""Commands that make one plan of several: compose."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.chat_record import chats_behind
from steersman.cli.options import (
    SteeringChoice,
    SteeringType,
    force_option,
    json_option,
    output_option,
    scope_option,
)
from steersman.cli.output import next_steps, put_out, require_free
from steersman.edits import expert_edits, residual_edits
from steersman.errors import PlanError
from steersman.showing import count_of, on_one_line, ranges
from steersman.steering import source_in_words, sources_of

if TYPE_CHECKING:
    from steersman.edits import Scope
    from steersman.steering import OnConflict, Steering

on_conflict_option = click.option(
    "--on-conflict",
    type=click.Choice(["error", "sum"]),
    default="error",
    show_default=True,
    help="Where two steerings pull one expert in opposite directions: refuse, or add them up.",
)


@click.command(short_help="Make one steering of several.")
@click.argument("steerings", type=SteeringType(), nargs=-1, required=True, metavar="STEERING[@STRENGTH]...")
@output_option("the composed steering")
@on_conflict_option
@scope_option(None, "Which tokens the composed steering acts on [default: each edit's own].")
@force_option
@json_option
def compose(
    steerings: tuple[SteeringChoice, ...],
    output: Path,
    on_conflict: OnConflict,
    scope: Scope | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make one steering of several for the same model: expert edits, vectors, or both; edits in order.

    @STRENGTH scales a steering first. A single one with --scope or @STRENGTH is that steering, changed.

    \b
    Examples:
      steersman compose faithful honest@0.5 -o both
      steersman compose safer@0.5 -o half
      steersman compose honest --scope all -o everywhere
    """
    require_free(output, force, [Path(choice.path) for choice in steerings])
    plan = composed(steerings, on_conflict, named="", scope=scope)
    plan.save_pretrained(output, force=force)
    result = {"output": str(output), **plan_for_json(plan), "sources": sources_of(plan.provenance)}
    put_out(result, as_json, lambda: "\n".join(made_in_words(output, plan)) + heard(output, plan))


def plan_for_json(plan: Steering) -> dict[str, Any]:
    """A plan's fingerprint, experts, and layers with vectors, for JSON."""
    entries = [
        {"layer": layer, "expert": expert, "strength": strength}
        for layer, experts in plan.strengths.items()
        for expert, strength in experts.items()
    ]
    return {
        "fingerprint": plan.fingerprint,
        "activated": [entry for entry in entries if entry["strength"] > 0],
        "deactivated": [entry for entry in entries if entry["strength"] < 0],
        "vectors": [
            {
                "layer": layer,
                "operation": edit.operation,
                "scope": edit.scope,
                "strength": edit.strength,
                "norm": float(vector.norm()),
            }
            for edit in residual_edits(plan.edits)
            for layer, vector in edit.vectors.items()
        ],
    }


def plan_in_words(facts: Mapping[str, Any]) -> str:
    """What a plan holds, of `plan_for_json`: "2 experts activated, 1 deactivated, vectors at layers 0, 2"."""
    layers = sorted({entry["layer"] for entry in facts["vectors"]})
    words = []
    if facts["activated"] or facts["deactivated"] or not layers:
        activated = count_of(len(facts["activated"]), "expert")
        words.append(f"{activated} activated, {len(facts['deactivated'])} deactivated")
    if layers:
        words.append(f"{'vectors at layers' if layers[1:] else 'a vector at layer'} {ranges(layers)}")
    return ", ".join(words)


def made_in_words(output: Path, plan: Steering) -> list[str]:
    """What a command has made, line by line: where it is, what it is made of, each of its edits."""
    facts = plan_for_json(plan)
    lines = [f"{output}: steering {plan.fingerprint[:16]}…"]
    if sources := sources_of(plan.provenance):
        lines.append(f"{plan.provenance['made']}, from {', '.join(map(source_in_words, sources))}")
    if facts["activated"] or facts["deactivated"] or not facts["vectors"]:
        scopes = "/".join(sorted({edit.scope for edit in expert_edits(plan.edits)}))
        lines[0] += f" (layer:expert{f', scope {scopes}' if scopes else ''})"
        lines += [f"{way} {len(facts[way])}: {_places(facts[way])}" for way in ("activated", "deactivated")]
    # What a plan was made from is another tool's to say as it likes.
    doses = plan.provenance.get("doses")
    if isinstance(defaults := plan.provenance.get("defaults"), list) and defaults:
        lines.append(f"by default, as nobody named it: {', '.join(map(str, defaults))}")
    for entry in facts["vectors"]:
        dose = doses.get(str(entry["layer"])) if isinstance(doses, Mapping) else None
        lines.append(
            f"layer {entry['layer']}: {entry['operation']} × {entry['strength']:.4g}"
            f"{f', dose {dose:.2f}' if isinstance(dose, float) else ''}, scope {entry['scope']}"
        )
    skipped = plan.provenance.get("skipped")
    lines += [
        f"skipped {entry['layer']}:{entry['expert']}: {entry['reason']}"
        for entry in (skipped if isinstance(skipped, list) else ())
        if isinstance(entry, Mapping) and {"layer", "expert", "reason"} <= entry.keys()
    ]
    return [on_one_line(line) for line in lines]


def _places(entries: Sequence[Mapping[str, Any]]) -> str:
    return (
        ", ".join(
            f"{entry['layer']}:{entry['expert']}"
            + ("" if abs(entry["strength"]) == 1 else f" × {abs(entry['strength']):g}")
            for entry in entries
        )
        or "none"
    )


def heard(output: Path, plan: Steering) -> str:
    """The next step after making a plan, where its model's name is known, and how its chats were rendered."""
    if not plan.model:
        return ""
    step = next_steps("Next, hear the model steered by it", ["chat", plan.model, "--steering", output])
    if not (chats := chats_behind(plan.provenance)):
        return step
    said = on_one_line("; ".join(map(str, chats)))
    return f"{step}\n  (its chats had {said}: give the same, where the model's own are others)"


def tuning_step(*found: object) -> str:
    """How layer and dose are found, which until then are guesses; the tasks are the user's to name."""
    command = f"steersman tune {shlex.join(map(str, found))} --task TASK --keep TASK --cost 'kl <= 0.3'"
    return f"\n\nWhich layer and dose work, at a cost you name: {command} -o STEERING"


def composed(
    choices: Sequence[SteeringChoice],
    on_conflict: OnConflict,
    named: str = "--steering ",
    scope: Scope | None = None,
) -> Steering:
    """One plan of those that were named. Raises PlanError, which names the two that contradict each other."""
    from steersman import compose

    derived = len(choices) > 1 or scope is not None or choices[0].strength != 1
    plans = [choice.open(named, named=derived) for choice in choices]
    if scope is not None:
        plans = [plan.with_scope(scope) for plan in plans]
    if len(plans) == 1:
        return plans[0]
    try:
        return compose(*plans, on_conflict=on_conflict)
    except PlanError:
        for one, other in combinations(range(len(plans)), 2):
            conflict = _conflict(plans[one], plans[other])
            if conflict is not None:
                raise PlanError(
                    f"{named}{choices[one]} and {named}{choices[other]}: {conflict}; "
                    "--on-conflict sum adds them up"
                ) from None
        raise


def _conflict(one: Steering, other: Steering) -> str | None:
    """What two plans say against each other that a sum would settle, if they do."""
    from steersman import compose

    try:
        compose(one, other, on_conflict="sum")
    except PlanError:
        return None
    try:
        compose(one, other)
    except PlanError as error:
        return str(error).partition(";")[0]  # what follows is for Python
    return None
