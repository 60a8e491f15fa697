"""Nothing is left behind: plans replaced under load, strengths without number, requests that are cut off."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import WIDTH, closing, open_engine, params, prompts, save_plans, save_tiny

from steersman import Steering
from steersman.vllm.registry import COMBINATIONS, Registry

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """This process's memory, in MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


class Served:
    """An engine, and what it takes to change its plans while it runs."""

    def __init__(self, folder: Path) -> None:
        self.model = save_tiny("olmoe", folder / "model")
        torch.manual_seed(1)
        self.plans = [self.plan(seed) for seed in range(4)]
        settings = {
            "steerings": save_plans({"plan": self.plans[0]}, folder / "plans"),
            "sites": "all",
            "max_steerings": 8,
            "max_vectors": 40,
        }
        self.files = []
        for number, plan in enumerate(self.plans):
            plan.save_pretrained(folder / str(number))
            names = ("manifest.json", "tensors.safetensors")
            self.files.append({name: (folder / str(number) / name).read_bytes() for name in names})
        # Few blocks: an engine with many grows by each that it uses for the first time.
        self.engine = open_engine(folder / "model", "olmoe", settings, num_gpu_blocks_override=16)

    def plan(self, seed: int) -> Steering:
        experts = Steering.from_experts(self.model, activate={1: [seed]}, deactivate={2: [7 - seed]})
        return experts + Steering.from_vectors(self.model, {0: torch.randn(WIDTH), 2: torch.randn(WIDTH)})

    @property
    def registry(self) -> Registry:
        return self.engine.llm_engine.input_processor.steersman  # type: ignore[no-any-return]

    def replace(self, number: int) -> None:
        """Another plan under the same name."""
        slot = self.registry.reserve(self.plans[number])
        refused = self.engine.collective_rpc("steersman_write", args=(slot, self.files[number]))
        assert refused == [None]
        self.registry.publish("plan", slot, self.plans[number], "test")

    def facts(self) -> dict[str, Any]:
        return self.engine.collective_rpc("steersman_facts")[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("leaks"))
    with closing(made.engine):
        yield made


def load(served: Served, rng: random.Random, running: dict[str, int], number: int) -> None:
    """One step of the engine, with arrivals and cancellations."""
    core = served.engine.llm_engine
    while len(running) < 6:
        name = f"{number}-{len(running)}-{rng.random()}"
        strength = round(rng.uniform(0, 1), 6)
        core.add_request(
            name,
            {"prompt_token_ids": prompts(1, length=rng.randrange(3, 40), seed=number)[0]},
            params(f"plan@{strength}", tokens=rng.randrange(1, 6)),
        )
        running[name] = number
    for output in core.step():
        if output.finished:
            running.pop(output.request_id, None)
    if rng.random() < 0.1 and running:
        cut = rng.choice(list(running))
        core.abort_request([cut])
        running.pop(cut)


def finish(served: Served) -> None:
    while served.engine.llm_engine.has_unfinished_requests():
        served.engine.llm_engine.step()
    served.engine.llm_engine.step()  # the engine tells its workers of what has ended with the next step
    served.engine.generate([{"prompt_token_ids": [5, 6]}], params(tokens=1), use_tqdm=False)


def check_replacing(served: Served, times: int, warm: int = 20) -> float:
    rng, running = random.Random(0), dict[str, int]()
    for number in range(warm):
        served.replace(number % 4)
        load(served, rng, running, number)
    before = resident()
    for number in range(times):
        served.replace(number % 4)
        load(served, rng, running, number)
    finish(served)
    assert served.registry.followers == 0
    facts = served.facts()
    assert facts["live"] == 0
    served.replace(0)
    return resident() - before


def test_replacing_under_load(served: Served) -> None:
    check_replacing(served, 60)


def check_strengths(served: Served, number: int) -> float:
    registry = served.registry
    before = resident()
    for start in range(0, number, 8):
        asked = [f"plan@{(start + one) / number:.8f}" for one in range(8)]
        given = [{"prompt_token_ids": [3, 4, 5 + one]} for one in range(8)]
        served.engine.generate(given, [params(each, tokens=1) for each in asked], use_tqdm=False)
    finish(served)
    assert registry.followers == 0
    assert len(registry._known) <= COMBINATIONS
    assert served.facts()["live"] == 0
    return resident() - before


def test_strengths_take_no_slots(served: Served) -> None:
    check_strengths(served, 400)


@pytest.mark.long
def test_a_thousand_plans_and_ten_thousand_strengths(served: Served) -> None:
    # The engine's own memory settles only after some hundreds of steps, steered or not.
    grown = check_replacing(served, 1000, warm=1000)
    more = check_strengths(served, 10_000)
    print(f"memory grew by {grown:.1f} MiB in 1 000 replacements, {more:.1f} MiB in 10 000 strengths")
    assert grown < 30
    assert more < 30
