"""A plan that names every expert of 61 layers of 384: its size, and the time to load, check and attach it.

The rival is the same for a plan of one expert: what is left is what the model costs.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch
from measuring import RESULTS, hardware, options
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config

from steersman import ExpertEdit, Steering

LAYERS, EXPERTS, TOP_K = 61, 384, 8
MOST_SECONDS, MOST_BYTES = 0.5, 10_000_000


def model() -> nn.Module:
    """A narrow model with as many layers and experts as the largest have."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=4,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        n_shared_experts=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def plan(opened: nn.Module, layers: int) -> Steering:
    """Every expert of some layers named: k a layer pushed in softly, the others out."""
    small = Steering.from_experts(opened, {0: [0]})
    strengths = {
        layer: {expert: 0.5 if expert < TOP_K else -0.001 * (1 + expert) for expert in range(EXPERTS)}
        for layer in range(layers)
    }
    edits = (ExpertEdit(strengths),) if layers else small.edits
    return Steering(edits, small.architecture, small.weights_id, small.model)


def load_and_attach(opened: nn.Module, folder: Path) -> tuple[float, float, int]:
    """(seconds to load, seconds to check and attach with a forward's tables, peak bytes in Python)."""
    ids = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        plain = _seconds(lambda: opened(ids))
        start = time.perf_counter()
        loaded = Steering.from_pretrained(folder)
        read = time.perf_counter() - start
        start = time.perf_counter()
        with loaded.apply(opened):
            opened(ids)
            attached = time.perf_counter() - start - plain
    tracemalloc.start()
    with torch.no_grad(), Steering.from_pretrained(folder).apply(opened):
        opened(ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return read, attached, peak


def _seconds(run: object) -> float:
    start = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - start


def main() -> None:
    """Print both plans' figures; fail where the large one misses its bounds."""
    given = options(__doc__ or "")
    torch.set_num_threads(1)
    opened = model()
    lines, totals = [], []
    for name, layers in (("one expert", 0), (f"{LAYERS} layers × {EXPERTS} experts", LAYERS)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan"
            plan(opened, layers).save_pretrained(path)
            size = sum(file.stat().st_size for file in path.iterdir())
            found = [load_and_attach(opened, path) for _ in range(given.rounds or 7)]
        read, attached = (statistics.median(run[place] for run in found) for place in (0, 1))
        totals.append((read + attached, size))
        lines.append(
            f"{name}: {size / 1e6:.3f} MB on disk; load {read:.3f} s, check and attach {attached:.3f} s, "
            f"peak {found[0][2] / 1e6:.1f} MB"
        )
    seconds, size = totals[1]
    lines.append(f"ratio of times: {seconds / totals[0][0]:.1f}; bounds: {MOST_SECONDS} s, 10 MB")
    print("\n".join(lines))
    if given.save:
        content = {"what": "a plan for 61 layers × 384 experts", **hardware(), "lines": lines}
        path = RESULTS / "plan_size.json"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if seconds > MOST_SECONDS or size > MOST_BYTES:
        sys.exit("the bounds are missed")


if __name__ == "__main__":
    main()
