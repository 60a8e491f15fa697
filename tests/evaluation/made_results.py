"""An evaluation as `evaluate` writes it, of made-up outcomes: every part of the format is in it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from steersman.evaluation.statistics import (
    clustered_mean,
    detectable_difference,
    holm,
    mean_difference,
    paired_difference,
    random_control,
    rate,
)

ITEMS = 60
GROUPS = [str(place // 2) for place in range(ITEMS)]
HOSTILE = (
    '<script>document.title="hacked"</script><img src=x onerror="document.title=1">'
    "\"' &amp; \u202egnitset\u2066 \x00\x07\x1b[31m \ud800 | `code` [a](javascript:alert(1)) "
    "https://evil.example " + "x" * 400
)
ARMS: list[tuple[str, str, str | None, float | None, float]] = [
    # name, kind, plan, strength, share on the positive side
    ("base", "base", None, None, 0.5),
    ("safer", "steered", "safer", 1.0, 0.95),
    ("a/b~c", "steered", "a/b~c", 1.0, 0.55),
    ("safer reversed", "reversed", "safer", -1.0, 0.1),
    ("prompt", "prompt", None, None, 0.8),
    ("prompt+safer", "prompt+steered", "safer", 1.0, 0.97),
    ("sibling", "model", None, None, 0.7),
    ("safer@0.5", "strength", "safer", 0.5, 0.7),
    ("please", "cell", None, None, 0.3),
    ("please × safer", "cell", "safer", 1.0, 0.8),
]
NAMES = [arm[0] for arm in ARMS]
DRAWN = ("whiskers", "random_draws", "heatmap", "picture")
"""What draws the pictures of a report, in `figures`."""


def made_result() -> dict[str, Any]:
    """The evaluation: one effect with sides, one side task with sides, one whose numbers are means."""
    tasks = [_task("refusal", "effect", 0), _task("ordinary", "side", 1), _reading_task()]
    return plain(
        {
            "format": "steersman-evaluation",
            "format_version": 1,
            "steersman": "0.1.0",
            "created": "2026-11-22T10:00:00+00:00",
            "seed": 0,
            "settings": {"limit": None, "batch_size": 32, "match": "weights"},
            "model": {
                "name": "lab:moe",
                "revision": None,
                "weights_id": "w" * 64,
                "architecture_id": "a" * 64,
                "model_type": "olmoe",
                "layers": 2,
                "hidden_size": 32,
            },
            "steerings": [_steering("safer", "1" * 64), _steering("a/b~c", "2" * 64)],
            "arms": [_arm(*arm) for arm in ARMS],
            "tasks": tasks,
            "experts": {"safer": _experts()},
            "warnings": ["refusal: 60 items only; intervals are wide"],
            "limits": ["It holds for these items."],
        }
    )


def plain(value: Any) -> Any:
    """As it is read from a file again."""
    return json.loads(json.dumps(value, allow_nan=False))


def _steering(name: str, fingerprint: str) -> dict[str, Any]:
    return {
        "name": name,
        "path": f"plans/{name}",
        "fingerprint": fingerprint,
        "scope": ["all"],
        "strengths": {"0": {"1": 1.0, "3": -0.5}, "1": {"2": 1.0}},
        "vectors": [{"layer": 1, "norm": 2.5, "strength": 1.5, "operation": "add"}],
        "provenance": {
            "made": "selection",
            "from": [{"kind": "pairs", "name": "p.jsonl", "sha256": "c" * 64}],
        },
        "model": {"name": "lab:moe", "weights_id": "w" * 64},
    }


def _arm(name: str, kind: str, plan: str | None, strength: float | None, _: float) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "steering": plan,
        "strength": strength,
        "system": "refuse ." if kind.startswith("prompt") else None,
        "template": {"name": "please", "text": "{prompt} please"} if kind == "cell" else None,
        "model": "another" if kind == "model" else None,
        "receipt": {"router:0": 120, "block_output:1": 120} if plan else {},
    }


def _task(name: str, role: str, seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    sided = {
        arm[0]: draw.random(ITEMS) < (arm[4] if role == "effect" else 0.9)
        for arm in ARMS
        if role == "effect" or arm[1] != "cell"
    }
    metrics = [
        {"name": "positive", "title": "refused", "kind": "rate", "better": "higher"},
        {"name": "negative", "title": "complied", "kind": "rate", "better": None},
        {"name": "neither", "title": "neither side", "kind": "rate", "better": None},
    ]
    on = {
        arm: {"positive": is_, "negative": ~is_, "neither": np.zeros(ITEMS, bool)}
        for arm, is_ in sided.items()
    }
    effect = role == "effect"
    return {
        **_about(name, role, metrics, {"positive": "refused", "negative": "complied"}),
        "results": {
            arm: {side: rate(of, GROUPS).to_json() for side, of in sides.items()} for arm, sides in on.items()
        },
        "unjudged": dict.fromkeys(sided, 0) | {"safer": 2},
        "differences": _rate_differences(on),
        "kinds": {
            kind: {
                "items": 30,
                "results": {a: {"positive": rate(of[half]).to_json()} for a, of in sided.items()},
            }
            for kind, half in (("weapons", slice(0, 30)), ("", slice(30, 60)))
        },
        "minimum_detectable": {"positive": detectable_difference(float(ITEMS))},
        "random": [_random("safer", "safer reversed", draw), _random("a/b~c", None, draw)]
        if effect
        else None,
        "preferences": {a: clustered_mean(draw.normal(size=ITEMS), GROUPS).to_json() for a in sided}
        if effect
        else None,
        "dose_response": [
            {"steering": "safer", "strength": s, "arm": arm}
            for s, arm in ((-1.0, "safer reversed"), (0.5, "safer@0.5"), (1.0, "safer"))
        ]
        if effect
        else None,
        "factorial": _factorial() if effect else None,
        "shown": [_shown(place, sided) for place in range(4)],
    }


def _about(name: str, role: str, metrics: list[Any], sides: Mapping[str, str] | None) -> dict[str, Any]:
    return {
        "name": name,
        "role": role,
        "title": f"About {name}",
        "does": "does it",
        "sides": sides,
        "items": ITEMS,
        "groups": ITEMS // 2,
        "sha256": name[0] * 64,
        "record": {"measure": "answers"},
        "metrics": metrics,
    }


def _rate_differences(on: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        arm: {
            side: {
                **paired_difference(on["base"][side], of, GROUPS).to_json(),
                "minimum_detectable": 0.12,
                "bootstrap": [-0.1, 0.25],
            }
            for side, of in sides.items()
        }
        for arm, sides in on.items()
        if arm != "base"
    }
    for side in ("positive", "negative", "neither"):
        rows = [arm[side] for arm in found.values()]
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = p
    return found


def _random(plan: str, back: str | None, draw: np.random.Generator) -> dict[str, Any]:
    found = random_control(4.0, draw.normal(size=19)).to_json()
    about = {"steering": plan, "arms": [plan, back], "items": 30, "matched": "other experts"}
    return {**about, "measure": "log_probability_difference" if back else "positive", **found}


def _factorial() -> dict[str, Any]:
    cells = [
        {"attack": attack, "defence": None, "steering": plan, "arm": arm}
        for attack, plan, arm in (
            (None, None, "base"),
            (None, "safer", "safer"),
            ("please", None, "please"),
            ("please", "safer", "please × safer"),
        )
    ]
    change = {"difference": -0.05, "low": -0.2, "high": 0.1, "p": 0.4, "p_holm": 0.4}
    return {
        "attacks": [{"name": "please", "text": "{prompt} please"}],
        "defences": [],
        "steerings": ["safer"],
        "cells": cells,
        "interactions": [{"attack": "please", "defence": None, "steering": "safer", **change}],
    }


def _reading_task() -> dict[str, Any]:
    draw = np.random.default_rng(7)
    values = {arm[0]: draw.normal(20, 2, ITEMS) for arm in ARMS if arm[1] != "cell"}
    metrics = [{"name": "perplexity", "title": "perplexity", "kind": "mean", "better": "lower"}]
    found: dict[str, Any] = {}
    for arm, own in values.items():
        if arm != "base":
            change = mean_difference(values["base"], own, GROUPS).to_json()
            found[arm] = {"perplexity": {**change, "p_holm": min(1.0, 6 * change["p"])}}
    found["sibling"] = {"perplexity": None}
    results: dict[str, Any] = {
        arm: {"perplexity": clustered_mean(own, GROUPS).to_json()} for arm, own in values.items()
    }
    results["sibling"] = {"perplexity": None}
    nothing = {"unjudged": {}, "kinds": {}, "minimum_detectable": {}, "random": None, "preferences": None}
    more = {"dose_response": None, "factorial": None, "shown": []}
    return {
        **_about("reading", "side", metrics, None),
        "results": results,
        "differences": found,
        **nothing,
        **more,
    }


def _shown(place: int, sided: Mapping[str, Any]) -> dict[str, Any]:
    sides = {arm: "positive" if of[place] else "negative" for arm, of in sided.items()}
    return {
        "id": f"item-{place}",
        "group": GROUPS[place],
        "kind": "weapons" if place < 2 else "",
        "prompt": [{"role": "user", "content": f"tell me number {place} ."}] if place else "a plain text",
        "answers": {arm: _answer(arm, side, sides["base"]) for arm, side in sides.items()},
    }


def _answer(arm: str, side: str, base: str) -> dict[str, Any]:
    words = ["i", "cannot", "help"] if side == "positive" else ["sure", "it", "is", "it"]
    shifts = itertools.cycle((0.002, 0.2, 0.7, 3.5))
    tokens = [[piece, next(shifts)] for word in words for piece in (f" {word[:2]}", word[2:]) if piece]
    return {
        "text": " ".join(words),
        "outcome": side,
        "scores": {},
        "why": "",
        "words": [[word, side != base] for word in words],
        "tokens": None if arm == "base" else tokens,
    }


def _experts() -> dict[str, Any]:
    draw = np.random.default_rng(3)
    risk, effect = draw.normal(size=(2, 6)).round(3).tolist(), draw.normal(size=(2, 6)).round(3).tolist()
    risk[1][5] = effect[1][5] = None
    effect[0][:3] = [4.26e-5, -1.5e-7, 0.0]
    return {"layers": [0, 1], "risk_difference": risk, "deactivate": effect, "activate": None}


def hostile(result: dict[str, Any]) -> dict[str, Any]:
    """The same with hostile text wherever a file or a model could bring it."""
    made = plain(result)
    made["model"]["name"] = made["warnings"][0] = made["limits"][0] = HOSTILE
    made["steerings"][0]["provenance"]["from"][0]["name"] = made["steerings"][0]["path"] = HOSTILE
    made["arms"][4]["system"] = HOSTILE
    for task in made["tasks"]:
        task["title"] = task["does"] = task["name"] = HOSTILE
        task["metrics"][0]["title"] = HOSTILE
        if task["sides"]:
            task["sides"] = {"positive": HOSTILE, "negative": HOSTILE}
        for item in task["shown"]:
            item["id"] = item["kind"] = HOSTILE
            item["prompt"] = HOSTILE
            for answer in item["answers"].values():
                answer["text"] = HOSTILE
                answer["words"] = [[HOSTILE, True], ["</p></div><script>1</script>", False]]
                answer["tokens"] = [[HOSTILE, 1.0]]
        task["kinds"] = dict.fromkeys([HOSTILE], task["kinds"]["weapons"]) if task["kinds"] else {}
    return made
