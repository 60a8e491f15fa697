"""What the benchmarks share: arms that run in random order, their medians and ratios, kept results."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "numpy", "steersman")


@dataclass(frozen=True)
class Ratio:
    """How much longer one arm takes than its rival: median over rounds, with an interval by bootstrap."""

    name: str
    ratio: float
    low: float
    high: float
    bound: float | None = None

    def __str__(self) -> str:
        bound = "" if self.bound is None else f"  (must reach {self.bound:g})"
        return f"{self.name:<52} {self.ratio:.3f}  [{self.low:.3f}, {self.high:.3f}]{bound}"


def interleaved(
    arms: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm: int = 3,
    seed: int = 0,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, list[float]]:
    """Seconds of each arm in each round, by default of this thread's CPU time; in every round all arms run
    once, in random order, so that what slows the machine slows all of them.
    """
    order, times = list(arms), {name: [] for name in arms}
    shuffle = random.Random(seed).shuffle
    gc.collect()
    gc.disable()
    try:
        for turn in range(warm + rounds):
            shuffle(order)
            for name in order:
                start = clock()
                arms[name]()
                if turn >= warm:
                    times[name].append(clock() - start)
    finally:
        gc.enable()
    return times


def ratio(
    name: str, arm: list[float], rival: list[float], *, bound: float | None = None, draws: int = 2000
) -> Ratio:
    """Median of an arm over the median of its rival, and a 95 % interval over resampled rounds."""
    randomly = random.Random(0)
    rounds = range(len(arm))
    drawn = []
    for _ in range(draws):
        chosen = randomly.choices(rounds, k=len(arm))
        drawn.append(statistics.median(arm[r] for r in chosen) / statistics.median(rival[r] for r in chosen))
    drawn.sort()
    value = statistics.median(arm) / statistics.median(rival)
    return Ratio(name, value, drawn[int(0.025 * draws)], drawn[int(0.975 * draws)], bound)


def hardware() -> dict[str, str]:
    """The machine and the versions that a figure belongs to."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if "model name" in line
        ]
        processor = f"{names[0]}, {len(names)} logical cores" if names else processor
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }


def report(title: str, ratios: list[Ratio], *, notes: str, name: str, save: bool) -> None:
    """Print ratios; with `save`, keep them as JSON in results/."""
    print(title)
    for line in ratios:
        print(f"  {line}")
    print(f"  {notes}")
    if save:
        RESULTS.mkdir(exist_ok=True)
        content = {"what": title, "notes": notes, **hardware(), "ratios": [vars(line) for line in ratios]}
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        print(f"  kept in {path}")


def options(description: str) -> argparse.Namespace:
    """--save and --rounds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--rounds", type=int, help="how often each arm runs")
    return parser.parse_args()
