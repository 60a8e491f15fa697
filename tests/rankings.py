"""Rankings of the SteerMoE reference's form for tests, and its selection written out the slow way."""

from __future__ import annotations

import numpy as np
import pandas as pd

COLUMNS = [
    "layer",
    "expert",
    "a1",
    "a2",
    "d1",
    "d2",
    "a1_n",
    "a2_n",
    "risk_diff",
    "Layer_Expert",
    "risk_diff_abs",
]


def ranking(
    layers: int = 3, experts: int = 8, top_k: int = 2, tokens: tuple[int, int] = (40, 57), seed: int = 0
) -> pd.DataFrame:
    """Counts of a random routing, best first, as the reference's notebook keeps them."""
    random = np.random.default_rng(seed)
    used = np.zeros((2, layers, experts))
    for side in (0, 1):
        for layer in range(layers):
            liking = random.normal(size=experts)
            for _ in range(tokens[side]):
                used[side, layer, np.argsort(liking + random.gumbel(size=experts))[:top_k]] += 1
    rows = []
    for layer in range(layers):
        for expert in range(experts):
            a1, a2 = used[0, layer, expert], used[1, layer, expert]
            rows.append([layer, expert, a1, a2, tokens[0] - a1, tokens[1] - a2])
    frame = pd.DataFrame(rows, columns=COLUMNS[:6])
    frame["a1_n"] = frame["a1"] / (frame["a1"] + frame["d1"])
    frame["a2_n"] = frame["a2"] / (frame["a2"] + frame["d2"])
    frame["risk_diff"] = frame["a1_n"] - frame["a2_n"]
    frame["Layer_Expert"] = [f"L{layer:02d}\nE{expert:02d}" for layer, expert, *_ in rows]
    frame["risk_diff_abs"] = frame["risk_diff"].abs()
    frame = frame.astype({"layer": "int64", "expert": "int64"})
    return frame.sort_values("risk_diff_abs", ascending=False, kind="stable").reset_index(drop=True)


def reference_choice(
    frame: pd.DataFrame, activate: int, deactivate: int, top_k: int, *, reverse: bool = False
) -> dict[int, dict[int, float]]:
    """First N by sign in file order, then at most k activated in a layer: row by row."""
    sign = -1 if reverse else 1
    wanted = {"in": activate, "out": deactivate}
    chosen: dict[int, dict[int, float]] = {}
    for row in frame.to_dict("records"):
        difference = sign * row["risk_diff"]
        way = "in" if difference > 0 else "out"
        if difference == 0 or not wanted[way]:
            continue
        wanted[way] -= 1
        experts = chosen.setdefault(int(row["layer"]), {})
        if way == "out":
            experts[int(row["expert"])] = -1.0
        elif sum(value > 0 for value in experts.values()) < top_k:
            experts[int(row["expert"])] = 1.0
    assert wanted == {"in": 0, "out": 0}
    return {layer: experts for layer, experts in chosen.items() if experts}
