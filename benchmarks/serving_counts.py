"""What the edits move on a GPU, counted: kernels and bytes of a decode step, over those of the model's own.

Nothing is run, and nothing here is measured. The counts follow from the code (`vllm/kernels.py`,
`vllm/routing_kernel.py`, `vllm/sites.py`): one kernel at every site, whether its tokens are steered or not;
of each token its rows, of each steered one what it follows. A time is bytes over the memory's bandwidth,
and a launch for each kernel. Of the model's own step, the bytes are its weights alone, without the cache of
keys and values, and its launches are a round number: a real step is longer, and the edits' share smaller.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
BANDWIDTH = 4.8e12
"""Bytes a second of an H200's memory."""
LAUNCH = 2e-6
"""Seconds of a kernel inside a replayed graph that does nothing."""
OWN_LAUNCHES = {True: 15, False: 10}
"""Kernels of a layer of the engine's own, with experts and without: norms, projections, rotation, cache,
attention, router, choice, sorting, two products, sum.
"""
COMPONENTS = 4
"""Plans that one request may ask for, by default (`max_per_request`)."""
NUMBER = 4
"""Bytes of a number in the tables; scores and states have 2."""
BATCHES = (1, 32, 256)


@dataclass(frozen=True)
class Shape:
    """A model as its decode step reads it; weights in bytes of `weight` each."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    inner: int
    vocabulary: int
    experts: int = 0
    top_k: int = 0
    weight: float = 2.0
    """Of the feed-forward's weights: 2 is bfloat16, 0.53 MXFP4 with its scales."""

    def layer_bytes(self, tokens: int) -> float:
        """Weights that one layer reads for so many tokens, whose experts are drawn evenly."""
        attention = 2 * self.width * self.head * (2 * self.heads + 2 * self.kv_heads)
        feed_forward = 3 * self.width * self.inner * self.weight
        if not self.experts:
            return attention + feed_forward
        touched = self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)
        return attention + touched * feed_forward + 2 * self.width * self.experts

    def step_bytes(self, tokens: int) -> float:
        """Weights that one step reads, with the output layer; no cache of keys and values."""
        return self.layers * self.layer_bytes(tokens) + 2 * self.width * self.vocabulary

    @property
    def kernels(self) -> int:
        """Of edits, in one layer."""
        return 2 if self.experts else 1


SHAPES = (
    Shape("OLMoE-1B-7B", 16, 2048, 16, 16, 128, 1024, 50304, 64, 8),
    Shape("Qwen3-30B-A3B", 48, 2048, 32, 4, 128, 768, 151936, 128, 8),
    Shape("GPT-OSS-20B", 24, 2880, 64, 8, 64, 2880, 201088, 32, 4, weight=0.53),
    Shape("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256),
)


def edit_bytes(shape: Shape, tokens: int, plans: int) -> float:
    """Bytes that the edits of one layer move for so many tokens, all of them steered, or none (plans = 0)."""
    rows = NUMBER * COMPONENTS  # who follows what
    counted = 2 * NUMBER + NUMBER  # `ran`, read and written; the site's number
    idle = shape.kernels * (tokens * rows + counted)
    if not plans:
        return idle
    block = tokens * (NUMBER + NUMBER * COMPONENTS)  # which vector; strengths
    block += plans * NUMBER * shape.width  # each vector once, then from the cache
    block += tokens * 2 * 2 * shape.width  # states, read and written
    router = tokens * (NUMBER * COMPONENTS + 2 * 2 * shape.experts) + plans * NUMBER * shape.experts
    return idle + block + (router if shape.experts else 0)


def lines() -> list[dict[str, float | int | str]]:
    """One line for each shape, batch and number of plans."""
    found: list[dict[str, float | int | str]] = []
    for shape in SHAPES:
        for batch in BATCHES:
            for plans in (0, 1, batch) if batch > 1 else (0, 1):
                bytes_ = edit_bytes(shape, batch, plans)
                own = shape.step_bytes(batch) / BANDWIDTH
                own += shape.layers * OWN_LAUNCHES[shape.experts > 0] * LAUNCH
                added = shape.layers * (shape.kernels * LAUNCH + bytes_ / BANDWIDTH)
                found.append(
                    {
                        "model": shape.name,
                        "batch": batch,
                        "plans": plans,
                        "kernels_a_layer": shape.kernels,
                        "kernels_a_step": shape.layers * shape.kernels,
                        "edit_bytes_a_layer": int(bytes_),
                        "layer_bytes": int(shape.layer_bytes(batch)),
                        "bytes_ratio": bytes_ / shape.layer_bytes(batch),
                        "step_us": 1e6 * own,
                        "added_us": 1e6 * added,
                        "throughput": own / (own + added),
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="keep the counts in benchmarks/results/")
    given = parser.parse_args()
    counted = lines()
    print("counted, not measured")
    header = (
        "model",
        "batch",
        "plans",
        "kernels a layer",
        "edit bytes a layer",
        "of the layer's",
        "step, µs",
    )
    print("  " + " ".join(f"{name:>18}" for name in (*header, "added, µs", "throughput")))
    for line in counted:
        cells = (
            line["model"],
            line["batch"],
            line["plans"],
            line["kernels_a_layer"],
            line["edit_bytes_a_layer"],
            f"{line['bytes_ratio']:.5%}",
            f"{line['step_us']:.0f}",
            f"{line['added_us']:.0f}",
            f"{line['throughput']:.3f}",
        )
        print("  " + " ".join(f"{cell!s:>18}" for cell in cells))
    if given.save:
        content = {
            "what": "kernels and bytes of the edits of a decode step, counted; nothing is measured",
            "assumptions": {
                "bandwidth": BANDWIDTH,
                "launch_seconds": LAUNCH,
                "components": COMPONENTS,
                "own_kernels_a_layer": {"with experts": OWN_LAUNCHES[True], "without": OWN_LAUNCHES[False]},
            },
            "measured_speed": "not measured",
            "lines": counted,
        }
        path = RESULTS / "serving_counts.json"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"  kept in {path}")


if __name__ == "__main__":
    main()
