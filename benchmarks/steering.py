"""What steering costs: decode steps and a prefill with every layer steered, over the same without a plan.

The rival is the same model without a plan; a third, unsteered too, shows the machine's noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from measuring import Ratio, interleaved, options, ratio, report
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig

from steersman import Steering, apply_rows

LAYERS, EXPERTS, TOP_K, WIDTH = 8, 16, 4, 256


def model() -> nn.Module:
    """An OLMoE with random weights."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=4096,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def plan(opened: nn.Module, shift: int = 0) -> Steering:
    """One expert in and two out, in every layer."""
    return Steering.from_experts(
        opened,
        activate={layer: [(3 + shift + layer) % EXPERTS] for layer in range(LAYERS)},
        deactivate={
            layer: [(5 + shift + layer) % EXPERTS, (8 + shift + layer) % EXPERTS] for layer in range(LAYERS)
        },
    )


class Arms:
    """Copies of one model, each under its own plans, which stay open."""

    def __init__(self, rows: int) -> None:
        self._blocks = ExitStack()
        first = model()
        one, two = plan(first), plan(first, shift=1)
        mixed = [one if row % 2 else two for row in range(rows)]
        self.models = {
            name: copy.deepcopy(first) for name in ("unsteered", "unsteered again", "steered", "two plans")
        }
        self._blocks.enter_context(one.apply(self.models["steered"]))
        self._blocks.enter_context(apply_rows(self.models["two plans"], mixed))

    def __enter__(self) -> Arms:
        return self

    def __exit__(self, *error: object) -> None:
        self._blocks.__exit__(*error)


def decoding(opened: nn.Module, rows: int) -> Callable[[], Any]:
    """A function that decodes one more token of every row."""
    ids = torch.randint(3, 1000, (rows, 16), generator=torch.Generator().manual_seed(1))
    output = opened(ids, use_cache=True)
    name = next(name for name in ("cache", "past_key_values") if name in output)  # transformers 5.24, before
    cache = {name: output[name]}
    token = ids[:, -1:]

    def step() -> None:
        opened(token, **cache, use_cache=True)

    return step


@torch.no_grad()
def main() -> None:
    given = options(__doc__ or "")
    torch.set_num_threads(1)
    ratios: list[Ratio] = []
    noise: list[str] = []
    for rows in (1, 16):
        with Arms(rows) as arms:
            times = interleaved({n: decoding(m, rows) for n, m in arms.models.items()}, given.rounds or 300)
        ratios.append(
            ratio(
                f"decode, batch {rows}: steered / unsteered", times["steered"], times["unsteered"], bound=1.03
            )
        )
        if rows > 1:
            ratios.append(
                ratio(
                    f"decode, batch {rows}: two plans / unsteered",
                    times["two plans"],
                    times["unsteered"],
                    bound=1.06,
                )
            )
        noise.append(
            str(
                ratio(
                    f"decode, batch {rows}: unsteered again / unsteered",
                    times["unsteered again"],
                    times["unsteered"],
                )
            )
        )
    ids = torch.randint(3, 1000, (8, 256), generator=torch.Generator().manual_seed(1))
    with Arms(8) as arms:
        run = {name: (lambda m=opened: m(ids, use_cache=False)) for name, opened in arms.models.items()}
        times = interleaved(run, max(9, (given.rounds or 300) // 12))
    ratios.append(
        ratio("prefill 8 × 256: steered / unsteered", times["steered"], times["unsteered"], bound=1.02)
    )
    noise.append(
        str(
            ratio(
                "prefill 8 × 256: unsteered again / unsteered", times["unsteered again"], times["unsteered"]
            )
        )
    )
    shape = f"OLMoE, hidden {WIDTH}, {LAYERS} layers, {EXPERTS} experts, top-{TOP_K}"
    title = f"{shape}; all layers steered; CPU thread time"
    report(
        title,
        ratios,
        notes="noise: " + "; ".join(" ".join(line.split()) for line in noise),
        name="steering",
        save=given.save,
    )


if __name__ == "__main__":
    main()
