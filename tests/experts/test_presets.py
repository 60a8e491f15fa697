"""Published sizes: by name, for their own architecture only."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.errors import PlanError
from steersman.experts.contrast import RoutingContrast
from steersman.experts.presets import PRESETS, preset_for
from steersman.experts.risk_difference import ClusterSums
from steersman.limits import Router
from steersman.steering import Architecture


def architecture(name: str, **changes: int) -> Architecture:
    preset = PRESETS[name]
    layers, experts = changes.get("layers", preset.layers), changes.get("experts", preset.experts)
    routers = tuple(
        Router(layer, experts, changes.get("top_k", preset.top_k), "softmax-topk") for layer in range(layers)
    )
    return Architecture(preset.model_type, 64, routers)


def test_the_published_sizes() -> None:
    sizes = {name: (preset.activate, preset.deactivate) for name, preset in PRESETS.items()}
    assert sizes == {
        "qwen3-30b-a3b/faithful": (0, 500),
        "qwen3-30b-a3b/safe": (15, 0),
        "gpt-oss-120b/faithful": (5, 100),
        "gpt-oss-120b/safe": (5, 0),
        "gpt-oss-20b/faithful": (10, 50),
        "gpt-oss-20b/safe": (5, 0),
        "mixtral-8x7b/faithful": (10, 100),
        "mixtral-8x7b/safe": (20, 0),
        "olmoe-1b-7b/faithful": (0, 50),
        "olmoe-1b-7b/safe": (5, 0),
        "phi-3.5-moe/faithful": (10, 75),
        "phi-3.5-moe/safe": (5, 0),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_each_is_for_its_own_architecture(name: str) -> None:
    assert preset_for(name, architecture(name)) == PRESETS[name]
    for changes in ({"layers": 7}, {"experts": 24}, {"top_k": 1}):
        with pytest.raises(PlanError, match=f"the preset {name} is for "):
            preset_for(name, architecture(name, **changes))


def test_of_two_sizes_of_one_model_type() -> None:
    with pytest.raises(PlanError, match="24 layers of 32 experts, 4 a token: choose sizes for it instead"):
        preset_for("gpt-oss-120b/safe", architecture("gpt-oss-20b/safe"))


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(PlanError, match="no preset is called 'olmoe'; known: qwen3-30b-a3b/faithful, "):
        preset_for("olmoe", architecture("olmoe-1b-7b/safe"))


def test_selecting_by_one() -> None:
    made_for = architecture("gpt-oss-20b/faithful")
    shape = (24, 32)
    random = np.random.default_rng(0)
    tokens = 1000
    activations = np.stack(
        [
            np.stack([np.bincount(random.integers(0, 32, tokens * 4), minlength=32) for _ in range(24)])
            for _ in range(2)
        ]
    ).astype(np.int64)
    sums = ClusterSums.zeros(*shape)
    sums.a1, sums.a2 = activations
    sums.n1 = sums.n2 = tokens
    contrast = RoutingContrast(
        activations, np.array([tokens, tokens]), sums, made_for, "0" * 64, np.zeros(0, np.int64), pairs=0
    )
    by_name = contrast.select(preset="gpt-oss-20b/faithful")
    assert by_name.fingerprint == contrast.select(activate=10, deactivate=50).fingerprint
    assert by_name.provenance["preset"] == "gpt-oss-20b/faithful"
    other_way = contrast.select(preset="gpt-oss-20b/faithful", reverse=True)
    assert other_way.fingerprint == contrast.select(activate=10, deactivate=50, reverse=True).fingerprint
    with pytest.raises(PlanError, match="a preset says how many experts"):
        contrast.select(preset="gpt-oss-20b/faithful", activate=3)
