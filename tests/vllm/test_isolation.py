"""No request is touched by its neighbours: random mixed batches against each request alone.

A session of requests is drawn at random: plans and sums of them, strengths, scopes, prompts that share
prefixes, second turns that extend a first, arrivals between steps, cancellations, and a cache so small that
requests are preempted. It runs once in an engine with the plugin, all together; then every request alone.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from engine import closing, open_engine, params, plans_for, prompts, save_plans, save_tiny

from steersman.errors import RequestError

TOKENS = 36
BLOCKS = {"gpt_oss": 15, "deepseek_v3": 9}
"""Of the cache, for families that need more for one request of full length."""
STRENGTHS = ("", "@0.5", "@0.25", "@1", "@0.731", "@-0.3")


@dataclass
class Asked:
    """A request of a session."""

    name: str
    prompt: list[int]
    steering: str | None
    tokens: int
    arrives: int
    cancelled: int | None
    follows: str | None = None
    answer: list[int] = field(default_factory=list)


class Sessions:
    """An engine with the plugin, small enough that requests are preempted, and one without it."""

    def __init__(self, folder: Path, family: str) -> None:
        self.model = save_tiny(family, folder / "model")
        self.names = list(plans := plans_for(self.model, family))
        settings = {"steerings": save_plans(plans, folder / "plans")}
        options = {
            "block_size": 32,
            "num_gpu_blocks_override": BLOCKS.get(family, 7),
            "max_num_batched_tokens": 48,
            "max_num_seqs": 6,
        }
        self.steered = open_engine(folder / "model", family, settings, **options)
        self.plain = open_engine(folder / "model", family, None, **options)
        self.shared = prompts(3, length=70, seed=5)
        self.preempted = self.cached = 0
        scheduler = self.steered.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counted

    def draw(self, rng: random.Random, size: int) -> list[Asked]:
        """A session of so many requests."""
        asked: list[Asked] = []
        for number in range(size):
            prompt = rng.choice(self.shared)[: rng.choice((3, 31, 32, 33, 40, 64, 70))]
            if rng.random() < 0.5:
                prompt = [*prompt, *(rng.randrange(3, 64) for _ in range(rng.randrange(1, 9)))]
            follows = rng.choice(asked).name if asked and rng.random() < 0.35 else None
            arrives = rng.randrange(0, size)
            asked.append(
                Asked(
                    name=f"r{number}",
                    prompt=prompt,
                    steering=self.steering(rng),
                    tokens=rng.randrange(2, TOKENS),
                    arrives=arrives,
                    cancelled=arrives + rng.randrange(1, 6) if rng.random() < 0.12 else None,
                    follows=follows,
                )
            )
        return asked

    def steering(self, rng: random.Random) -> str | None:
        """What a request asks for: none, one plan, or two, at drawn strengths, where it can be had."""
        if rng.random() < 0.25:
            return None
        while True:
            chosen = rng.sample(self.names, rng.choice((1, 1, 2)))
            asked = ",".join(name + rng.choice(STRENGTHS) for name in chosen)
            try:
                self.steered.llm_engine.input_processor.steersman.resolve(asked)
            except RequestError:
                continue
            return asked


def run(sessions: Sessions, session: list[Asked]) -> None:
    """All requests of a session, each when it arrives; a second turn begins when its first has ended."""
    core = sessions.steered.llm_engine
    waiting, running, step = list(session), {}, 0
    ended = {one.name: one for one in session if one.cancelled is not None}
    seen: set[str] = set()
    while waiting or running:
        for one in list(waiting):
            first = next((other for other in session if other.name == one.follows), None)
            if one.arrives <= step and (first is None or first.name in seen or first.name in ended):
                if first is not None:
                    one.prompt = (first.prompt + first.answer + one.prompt[:5])[:100]
                asked = params(one.steering, tokens=one.tokens)
                core.add_request(one.name, {"prompt_token_ids": list(one.prompt)}, asked)
                waiting.remove(one)
                running[one.name] = one
        for output in core.step():
            one = running.get(output.request_id)
            if one is not None and output.finished:
                one.answer = list(output.outputs[0].token_ids)
                sessions.cached += output.num_cached_tokens or 0
                seen.add(one.name)
                del running[output.request_id]
        step += 1
        for one in list(running.values()):
            if one.cancelled is not None and step >= one.cancelled:
                core.abort_request([one.name])
                del running[one.name]
        assert step < 2000


def alone(engine: Any, one: Asked) -> list[int]:
    """A request by itself, nothing cached."""
    assert engine.reset_prefix_cache()
    given = params(one.steering, tokens=one.tokens)
    (output,) = engine.generate([{"prompt_token_ids": list(one.prompt)}], [given], use_tqdm=False)
    return list(output.outputs[0].token_ids)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    made = Sessions(tmp_path_factory.mktemp("olmoe"), "olmoe")
    with closing(made.steered), closing(made.plain):
        yield made


def check(sessions: Sessions, seed: int, size: int) -> dict[str, int]:
    """One session; how many requests differed from what they get alone, by kind."""
    session = sessions.draw(random.Random(seed), size)
    run(sessions, session)
    count = {"steered": 0, "unsteered": 0, "steered differ": 0, "unsteered differ": 0}
    for one in session:
        if not one.answer:
            continue
        kind = "unsteered" if one.steering is None else "steered"
        count[kind] += 1
        count[f"{kind} differ"] += one.answer != alone(
            sessions.steered if one.steering else sessions.plain, one
        )
    return count


@pytest.mark.parametrize("seed", range(4))
def test_mixed_batches(sessions: Sessions, seed: int) -> None:
    count = check(sessions, seed, size=16)
    assert count["steered"] >= 5
    assert count["steered differ"] == count["unsteered differ"] == 0, count


def test_sessions_are_hard(sessions: Sessions) -> None:
    """What they are to provoke has happened: preemption, hits of the prefix cache, plans that matter."""
    session = sessions.draw(random.Random(0), 16)
    before = sessions.preempted, sessions.cached
    run(sessions, session)
    assert sessions.preempted > before[0]
    assert sessions.cached > before[1]
    steered = [one for one in session if one.answer and one.steering]
    unlike = [one for one in steered if one.answer != alone(sessions.steered, replace(one, steering=None))]
    assert len(unlike) > len(steered) / 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "number"),
    [("olmoe", 400), ("gpt_oss", 200), ("llama", 200), ("deepseek_v3", 100), ("phimoe", 100)],
)
def test_a_thousand_sessions(family: str, number: int, tmp_path: Path) -> None:
    made = Sessions(tmp_path, family)
    total = Counter[str]()
    with closing(made.steered), closing(made.plain):
        for seed in range(number):
            total.update(check(made, seed, size=6))
            if seed % 20 == 19:
                print(family, seed + 1, dict(total), "preempted", made.preempted, "cached", made.cached)
    assert total["steered"] > 2 * number
    assert made.preempted > number / 10
    assert total["steered differ"] == total["unsteered differ"] == 0, total
