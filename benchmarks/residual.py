"""What residual edits cost: decode steps and a prefill with a vector added at every layer, alone and beside
expert edits in every layer, over the same without a plan.

The rival is the same model without a plan; a third, unsteered too, shows the machine's noise.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Literal

import torch
from measuring import Ratio, interleaved, options, ratio, report
from steering import EXPERTS, LAYERS, TOP_K, WIDTH, decoding, model, plan
from torch import nn

from steersman import Steering

BOUNDS = {"vectors": 1.03, "both levers": 1.06}


def vectors(opened: nn.Module, scope: Literal["all", "answer"]) -> Steering:
    """A vector at every layer."""
    generator = torch.Generator().manual_seed(2)
    directions = {layer: torch.randn(WIDTH, generator=generator) for layer in range(LAYERS)}
    return Steering.from_vectors(opened, directions, strength=0.1, scope=scope)


def arms(blocks: ExitStack, scope: Literal["all", "answer"]) -> dict[str, nn.Module]:
    """Copies of one model, each under its own plan, which stays open."""
    first = model()
    models = {
        name: copy.deepcopy(first) for name in ("unsteered", "unsteered again", "vectors", "both levers")
    }
    blocks.enter_context(vectors(first, scope).apply(models["vectors"]))
    blocks.enter_context((plan(first) + vectors(first, scope)).apply(models["both levers"]))
    return models


@torch.no_grad()
def main() -> None:
    given = options(__doc__ or "")
    torch.set_num_threads(1)
    ratios: list[Ratio] = []
    noise: list[str] = []

    def compare(what: str, times: dict[str, list[float]], bounded: bool) -> None:
        base = times["unsteered"]
        for name, bound in BOUNDS.items():
            limit = bound if bounded else None
            ratios.append(ratio(f"{what}: {name} / unsteered", times[name], base, bound=limit))
        noise.append(" ".join(str(ratio(f"{what}: unsteered again", times["unsteered again"], base)).split()))

    for rows in (1, 16):
        with ExitStack() as blocks:
            models = arms(blocks, "answer")
            run = {name: decoding(opened, rows) for name, opened in models.items()}
            compare(f"decode, batch {rows}", interleaved(run, given.rounds or 300), bounded=True)
    ids = torch.randint(3, 1000, (8, 256), generator=torch.Generator().manual_seed(1))
    for scope in ("all", "answer"):
        with ExitStack() as blocks:
            models = arms(blocks, scope)
            run = {name: (lambda m=opened: m(ids, use_cache=False)) for name, opened in models.items()}
            times = interleaved(run, max(9, (given.rounds or 300) // 12))
            compare(f"prefill 8 × 256, scope {scope}", times, bounded=False)
    shape = f"OLMoE, hidden {WIDTH}, {LAYERS} layers, {EXPERTS} experts, top-{TOP_K}"
    report(
        f"{shape}; a vector (and three experts) in every layer; CPU thread time",
        ratios,
        notes="noise: " + "; ".join(noise),
        name="residual",
        save=given.save,
    )


if __name__ == "__main__":
    main()
