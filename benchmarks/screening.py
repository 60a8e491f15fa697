"""What screening costs: exact effects of all experts against one separate run of each, and the estimate.

The rival of exact screening is what one would do by hand: for each expert a plan that deactivates it, applied
while the model answers all items in one batch. Both must find the same effects. The estimate's rival is exact
screening; it must rank experts alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from measuring import Ratio, interleaved, options, ratio, report
from scipy.stats import spearmanr

from steersman import Steering, lab
from steersman.evaluation.arms import Subject
from steersman.evaluation.screening.effects import edits_of
from steersman.evaluation.screening.estimate import estimates
from steersman.evaluation.screening.exact import Edit, Instrument, instrument
from steersman.evaluation.screening.texts import preferences
from steersman.evaluation.tasks import load_task
from steersman.experts.causal_effects import Sign
from steersman.models.architecture import find_routers

ITEMS = 100
ROUNDS = 3
SIGNS: tuple[Sign, ...] = ("deactivate", "activate")


class Bench:
    """One task of the lab, screened in three ways; what each found is kept."""

    def __init__(self, tool: Instrument, subject: Subject, name: str) -> None:
        self.tool, self.subject = tool, subject
        task = load_task(f"lab:{name}/train", limit=ITEMS)
        (self.batch,) = tool.batches(preferences(task, subject.tokenizer))
        self.forks = subject.forks(task)
        self.edits = edits_of([site.facts for site in tool.sites.values()], SIGNS)
        self.found: dict[str, Any] = {}

    def edits_with(self, strength: float) -> dict[int, list[Edit]]:
        """Those that put experts in, or keep them out."""
        return {layer: [e for e in edits if e[2] == strength] for layer, edits in self.edits.items()}

    def exact(self, name: str, edits: dict[int, list[Edit]]) -> None:
        """All experts by exact screening."""
        base = self.tool.base(self.batch)
        self.found[name] = np.concatenate(
            [self.tool.singles(self.batch, base, of_layer) - base.values for of_layer in edits.values()]
        )

    def separate(self, edits: dict[int, list[Edit]]) -> None:
        """Each expert by a plan of its own."""
        base = self.subject.preference(self.forks)
        changes = [
            self.subject.preference(
                self.forks, Steering.from_experts(self.subject.model, deactivate={layer: [e]})
            )
            - base
            for of_layer in edits.values()
            for layer, e, _ in of_layer
        ]
        self.found["separate"] = np.stack(changes)[:, self.batch.texts]

    def estimate(self, name: str, edits: dict[int, list[Edit]]) -> None:
        """All experts at once."""
        self.found[name] = np.concatenate(list(estimates(self.tool, self.batch, edits)[1].values()))


def ratios_of(bench: Bench, name: str, rounds: int) -> tuple[list[Ratio], list[str]]:
    """The ratios, and in words how near what was found is."""
    out = bench.edits_with(-1.0)
    times = interleaved(
        {
            "exact, deactivated": lambda: bench.exact("exact, deactivated", out),
            "separate": lambda: bench.separate(out),
            "exact": lambda: bench.exact("exact", bench.edits),
            "estimate": lambda: bench.estimate("estimate", bench.edits),
        },
        rounds,
        warm=1,
    )
    found = bench.found
    furthest = float(np.abs(found["exact, deactivated"] - found["separate"]).max())
    if furthest > 1e-5:
        raise SystemExit(f"exact screening differs from separate runs by {furthest:.1e} nats")
    words = [f"{name}: exact effects and those of separate runs differ by {furthest:.1e} nats at most"]
    strengths = np.array([edit[2] for of_layer in bench.edits.values() for edit in of_layer])
    for sign, strength in zip(SIGNS, (-1.0, 1.0), strict=True):
        near, exact = (found[way][strengths == strength].mean(axis=1) for way in ("estimate", "exact"))
        words.append(f"{name}, {sign}: Spearman of estimate and exact {spearmanr(near, exact).statistic:.3f}")
    return [
        ratio(f"separate runs / exact, {name}", times["separate"], times["exact, deactivated"], bound=2),
        ratio(f"exact / the estimate, both signs, {name}", times["exact"], times["estimate"], bound=7),
    ], words


def main() -> None:
    """Print both ratios on faithfulness and refusal."""
    given = options(__doc__ or "")
    torch.set_num_threads(1)
    model, tokenizer = lab.load("moe")
    sites = [site for site in find_routers(model) if site.facts.reason is None]
    subject = Subject(model, tokenizer, batch_size=ITEMS)
    lines: list[Ratio] = []
    words: list[str] = []
    for name in ("faithfulness", "refusal"):
        with instrument(model, tokenizer, sites, batch_size=2 * ITEMS) as tool:
            more, said = ratios_of(Bench(tool, subject, name), name, given.rounds or ROUNDS)
        lines += more
        words += said
    report(
        f"Screening all experts of lab:moe (4 layers × 32 experts), {ITEMS} items",
        lines,
        notes="CPU thread time, one thread. " + "; ".join(words) + ".",
        name="screening",
        save=given.save,
    )


if __name__ == "__main__":
    main()
