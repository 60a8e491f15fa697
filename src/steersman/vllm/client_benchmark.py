"""The engine's own benchmark client against a server whose requests ask for steerings.

`vllm bench serve` sends every request with the same `--extra-body`; its function, called here, takes one for
each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import statistics
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steersman.errors import ServingError

ARMS = ("unsteered", "all alike", "all differently", "mixed")


@dataclass(frozen=True)
class Load:
    """What is sent in each run.

    Attributes:
        requests: How many.
        concurrency: How many of them at a time.
        prompt_tokens: Of each request.
        answer_tokens: Of each request; answers do not end before.
    """

    requests: int
    concurrency: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Run:
    """What one run of one arm gave: tokens of answers a second, and medians in milliseconds."""

    arm: str
    tokens_per_second: float
    first_token: float
    next_token: float


def asked_for(arm: str, names: Sequence[str], requests: int) -> list[str]:
    """What the requests of an arm ask for.

    `all differently` goes round the names, each turn at another strength; of `mixed`, a third is unsteered.
    """
    different = [
        f"{names[number % len(names)]}@{1 - 0.5 * (number // len(names)) / requests:.6g}"
        for number in range(requests)
    ]
    if arm == "unsteered":
        return ["none"] * requests
    if arm == "all alike":
        return [names[0]] * requests
    if arm == "all differently":
        return different
    return [("none", names[0], different[number])[number % 3] for number in range(requests)]


def measure(url: str, names: Sequence[str], load: Load, rounds: int, seed: int) -> list[Run]:
    """Run every arm once a round, in random order, after a round that is not counted.

    Args:
        url: Of the server, such as http://127.0.0.1:8000.
        names: Steerings that the server knows, as requests ask for them.
        load: What is sent in each run.
        rounds: How often each arm is counted.
        seed: Of prompts and order.

    Raises:
        ServingError: the server does not answer, or refuses a request, and why.
    """
    model = _get(f"{url}/v1/models")["data"][0]["id"]
    prompts = _prompts(url, model, load, seed)
    for name in names:  # what the engine's client does not repeat is why a request is refused
        one = {"model": model, "prompt": prompts[0], "max_tokens": 1, "vllm_xargs": {"steering": name}}
        _get(f"{url}/v1/completions", one)
    shuffle = random.Random(seed).shuffle
    order, runs = list(ARMS), []
    for turn in range(1 + rounds):
        shuffle(order)
        for arm in order:
            run = _run(url, model, arm, prompts, asked_for(arm, names, load.requests), load)
            runs += [run] if turn else []
    return runs


def _run(
    url: str, model: str, arm: str, prompts: Sequence[list[int]], asked: Sequence[str], load: Load
) -> Run:
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    requests = [
        SampleRequest(
            prompt=prompt,
            prompt_len=len(prompt),
            expected_output_len=load.answer_tokens,
            request_overrides={"vllm_xargs": {"steering": steering}},
        )
        for prompt, steering in zip(prompts, asked, strict=True)
    ]
    running = benchmark(
        task_type=TaskType.GENERATION,
        endpoint_type="openai",
        api_url=f"{url}/v1/completions",
        base_url=url,
        model_id=model,
        model_name=model,
        tokenizer=None,
        input_requests=requests,
        logprobs=None,
        request_rate=float("inf"),
        burstiness=1.0,
        disable_tqdm=True,
        num_warmups=0,
        profile=False,
        selected_percentile_metrics=[],
        selected_percentiles=[],
        ignore_eos=True,
        goodput_config_dict={},
        max_concurrency=load.concurrency,
        lora_modules=None,
        extra_headers=None,
        extra_body={"temperature": 0.0},
        ready_check_timeout_sec=0,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # its own tables
        result: dict[str, Any] = asyncio.run(running)
    errors = [error for error in result["errors"] if error]
    if errors or result["completed"] != len(requests):
        why = errors[0].strip().splitlines()[-1] if errors else "it did not say why"
        raise ServingError(f"{url}: {len(requests) - result['completed']} requests were not answered: {why}")
    after_first = [
        (latency - first) / (length - 1)
        for latency, first, length in zip(
            result["latencies"], result["ttfts"], result["output_lens"], strict=True
        )
        if length > 1
    ]
    return Run(
        arm,
        sum(result["output_lens"]) / result["duration"],
        1000 * statistics.median(result["ttfts"]),
        1000 * statistics.median(after_first or [0.0]),
    )


def _prompts(url: str, model: str, load: Load, seed: int) -> list[list[int]]:
    """Prompts of tokens that the model has, in random order: no two begin alike."""
    text = "The quick brown fox jumps over the lazy dog, while 12 men watch it from a green hill."
    known = _get(f"{url}/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})["tokens"]
    randomly = random.Random(seed)
    return [randomly.choices(known, k=load.prompt_tokens) for _ in range(load.requests)]


def _get(address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):  # where the engine's client looks for it
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ServingError(f"{address}: {_reason(error)}") from None
    except (OSError, ValueError) as error:
        raise ServingError(f"{address}: {error}; is this a server that `steersman serve` started?") from None


def _reason(error: urllib.error.HTTPError) -> str:
    said = error.read().decode(errors="replace")
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"
