"""What select says of the plan that it has made, of a contrast or of a screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.cli.composition import heard, made_in_words, plan_for_json
from steersman.cli.output import put_out

if TYPE_CHECKING:
    from steersman import CausalScreen, Steering
    from steersman.edits import Scope


def select_of_screen(
    screen: CausalScreen,
    output: Path,
    numbers: Mapping[str, int | None],
    *,
    reverse: bool,
    scope: Scope | None,
    strength: float,
    force: bool,
    as_json: bool,
) -> None:
    """Save the set that a screen chose, or so many of the experts that pass its gate."""
    steering = screen.select(
        activate=numbers["activate"],
        deactivate=numbers["deactivate"],
        top=numbers["top"],
        reverse=reverse,
        scope=scope,
        strength=strength,
    )
    steering.save_pretrained(output, force=force)
    result = {**selection_for_json(output, steering), "by": "causal"}
    put_out(result, as_json, lambda: "\n".join(made_in_words(output, steering)) + heard(output, steering))


def selection_for_json(output: Path, steering: Steering) -> dict[str, Any]:
    """The experts of a selection, and which were skipped."""
    facts = plan_for_json(steering)
    del facts["vectors"]
    return {"output": str(output), **facts, "skipped": list(steering.provenance.get("skipped", []))}
