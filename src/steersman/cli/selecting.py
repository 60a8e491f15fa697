"""What select says of the plan that it has made, of a contrast or of a screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.cli.output import put_out
from steersman.showing import on_one_line

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
    put_out(result, as_json, lambda: "\n".join(selected_in_words(result)))


def selection_for_json(output: Path, steering: Steering) -> dict[str, Any]:
    """The experts of a selection, and which were skipped."""
    chosen = [
        {"layer": layer, "expert": expert, "strength": value}
        for layer, experts in steering.strengths.items()
        for expert, value in experts.items()
    ]
    return {
        "output": str(output),
        "fingerprint": steering.fingerprint,
        "activated": [entry for entry in chosen if entry["strength"] > 0],
        "deactivated": [entry for entry in chosen if entry["strength"] < 0],
        "skipped": list(steering.provenance.get("skipped", [])),
    }


def selected_in_words(result: dict[str, Any]) -> list[str]:
    """The same in words, line by line."""
    result = on_one_line(result)

    def places(entries: list[dict[str, Any]]) -> str:
        return ", ".join(f"{entry['layer']}:{entry['expert']}" for entry in entries) or "none"

    return [
        f"{result['output']}: steering {result['fingerprint'][:16]}… (layer:expert)",
        f"activated {len(result['activated'])}: {places(result['activated'])}",
        f"deactivated {len(result['deactivated'])}: {places(result['deactivated'])}",
        *(f"skipped {entry['layer']}:{entry['expert']}: {entry['reason']}" for entry in result["skipped"]),
    ]
