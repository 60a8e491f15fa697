"""ds4's expert map (github.com/antirez/ds4, pull request 168, `--expert-steering-file`): written, not read.

The file is raw: 43 layers × 256 experts of little-endian float32, layer by layer from layer 0, without a
header, for DeepSeek V4 Flash and nothing else. A positive entry lifts the expert above every other score, a
negative one puts it below; its size, times `--expert-steering-scale` (0.01 unless said otherwise), is only
by how much. So entries are 1, -1 and 0, every token is steered, and soft strengths cannot be said.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from steersman.errors import ArtifactError
from steersman.interop.easysteer import full_strengths
from steersman.interop.foreign_files import write_bytes
from steersman.steering import Architecture, Steering

MODEL_TYPE = "deepseek_v4"
LAYERS = 43
EXPERTS = 256
TOP_K = 6


def export_ds4(steering: Steering, target: str | Path, *, force: bool = False) -> None:
    """Write a steering of DeepSeek V4 Flash as ds4's map, 44 032 bytes.

    Args:
        steering: The plan.
        target: The file to write.
        force: Replace a file that is there.

    Raises:
        ArtifactError: the plan is for another model, has soft strengths or another scope than `all`, or the
            file cannot be written.

    Example:
        >>> routers = tuple(steersman.Router(layer, 256, 6, "softmax-topk") for layer in range(43))
        >>> flash = steersman.Architecture("deepseek_v4", 4096, routers)  # read_architecture gives a model's
        >>> plan = steersman.Steering((steersman.ExpertEdit({3: {5: 1.0}}),), flash, weights_id="")
        >>> steersman.export_ds4(plan, "plan.f32")
    """
    _check_architecture(steering.architecture)
    table = np.zeros((LAYERS, EXPERTS), "<f4")
    for layer, experts in full_strengths(steering, "ds4's map"):
        for expert, strength in experts.items():
            table[layer, expert] = strength
    write_bytes(target, table.tobytes(), force=force)


def _check_architecture(architecture: Architecture) -> None:
    expected = f"{MODEL_TYPE} with {LAYERS} layers of {EXPERTS} experts, {TOP_K} a token"
    found = f"{architecture.model_type} with {architecture.layer_count} layers"
    if architecture.model_type == MODEL_TYPE and architecture.layer_count == LAYERS:
        other = [
            router
            for router in architecture.routers
            if router.steerable and (router.experts, router.top_k) != (EXPERTS, TOP_K)
        ]
        if not other:
            return
        found += f", layer {other[0].layer} of {other[0].experts} experts, {other[0].top_k} a token"
    raise ArtifactError(f"ds4's map is for {expected}; this steering is for {found}")
