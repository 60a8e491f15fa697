"""Figures of tunings and evaluations of real models in one file, benchmarks/results/real_concepts.json.

    python benchmarks/real/collect.py NAME=FOLDER …

A FOLDER is a tuning (`…-tuning`), an evaluation, or a file of JSON. Those that were collected before stay.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import RESULTS, hardware

OUT = RESULTS / "real_concepts.json"


def tuned(found: dict[str, Any]) -> dict[str, Any]:
    """What a tuning chose and confirmed, how many candidates passed, and the best of each layer."""
    layers: dict[str, dict[str, Any]] = {}
    for one in found["candidates"]:
        best = layers.setdefault(",".join(map(str, one["layers"])), one)
        if (one["passes"], one["effect"]) > (best["passes"], best["effect"]):
            layers[",".join(map(str, one["layers"]))] = one
    short = ("dose", "effect", "effect_low", "effect_high", "passes")
    return {
        "chosen": found["chosen"],
        "confirmed": found["confirmed"],
        "why_none": found["why_none"],
        "tried": len(found["candidates"]),
        "passing": sum(one["passes"] for one in found["candidates"]),
        "by_layer": {name: {key: one[key] for key in short} for name, one in layers.items()},
        "finalists": found["finalists"],
        "bounds": found["bounds"],
        "options": found["options"],
    }


def evaluated(found: dict[str, Any]) -> dict[str, Any]:
    """The arms of an evaluation's tasks, with their paired differences."""
    return {"tasks": found["tasks"]}


def main() -> int:
    known: dict[str, Any] = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {"figures": {}}
    for given in sys.argv[1:]:
        name, _, place = given.partition("=")
        folder = Path(place)
        if (folder / "tuning.json").exists():
            entry = tuned(json.loads((folder / "tuning.json").read_text("utf-8")))
        elif (folder / "evaluation.json").exists():
            entry = evaluated(json.loads((folder / "evaluation.json").read_text("utf-8")))
        else:
            entry = json.loads(folder.read_text("utf-8"))
        known["figures"][name] = entry
    known = {"date": date.today().isoformat(), "hardware": hardware(), "figures": known["figures"]}
    OUT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(f"{OUT}: {', '.join(known['figures'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
