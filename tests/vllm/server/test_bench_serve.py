"""`steersman bench serve` against a running server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from running import API_KEY, Running

from steersman.vllm.client_benchmark import ARMS, asked_for
from steersman.vllm.request import parse_request


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from steersman.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, "bench", "serve", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENAI_API_KEY": API_KEY},
    )


def asked_of(server: Running) -> dict[str, float]:
    """Answered requests that the server has counted."""
    text = server.http().get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total")]
    return {"tokens": sum(float(line.split()[-1]) for line in lines)}


@pytest.mark.long
def test_four_kinds_of_requests_are_measured(server: Running) -> None:
    before = asked_of(server)["tokens"]
    load = ("--requests", "6", "--concurrency", "3", "--prompt-tokens", "9", "--answer-tokens", "7")
    ran = bench(
        *("--url", server.process.address, "--steering", "experts", "--steering", "vectors"),
        *(*load, "--rounds", "1", "--json"),
    )
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout)
    assert [row["arm"] for row in result["arms"]] == list(ARMS)
    for row in result["arms"]:
        assert row["tokens_per_second"] > 0
        assert row["least"] <= row["ratio"] <= row["most"]
    assert result["arms"][0]["ratio"] == 1
    # Every arm twice, the first time to warm up; and each name once, to see that it is known.
    assert asked_of(server)["tokens"] - before == 2 * len(ARMS) * 6 * 7 + 2


def test_a_steering_that_the_server_does_not_know(server: Running) -> None:
    ran = bench("--url", server.root, "--steering", "nobody", "--requests", "2", "--rounds", "1")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1
    assert 'there is no "nobody" (there are: ' in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://127.0.0.1:9", "--steering", "a"], "127.0.0.1:9/v1/models"),
        (["--steering", "a,b"], "'a,b': right is the name of one steering"),
        (["--steering", "none"], "right is the name of one steering"),
        ([], "Missing option"),
    ],
)
def test_wrong_calls(arguments: list[str], said: str) -> None:
    ran = bench(*arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert said in ran.stderr


def test_what_requests_ask_for() -> None:
    names = ("a", "b")
    assert asked_for("unsteered", names, 2) == ["none", "none"]
    assert asked_for("all alike", names, 2) == ["a", "a"]
    different = asked_for("all differently", names, 300)
    assert len(set(different)) == 300
    assert {parse_request(one, 1)[0].name for one in different} == {"a", "b"}
    assert all(0.5 <= parse_request(one, 1)[0].strength <= 1 for one in different)
    assert asked_for("mixed", names, 7).count("none") == 3
