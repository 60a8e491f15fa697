"""Servers of several processes: two engines side by side, two API processes before one engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from asking_http import plan_body
from running import ADMIN_KEY, Running, start

MESSAGES = [{"role": "user", "content": "tell me the gaterune of the fountain ."}]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A plan for `lab:target` that changes what it says, and that model."""
    from steersman import Steering, load_model

    folder = tmp_path_factory.mktemp("plans") / "loud"
    model, _ = load_model("lab:target")
    vector = torch.randn(128, generator=torch.Generator().manual_seed(3))
    Steering.from_vectors(model, {2: 100 * vector}).save_pretrained(folder)  # states have norms of about 700
    return str(folder), model


def said(http: Any, steering: str, rank: int | None = None) -> tuple[str, str | None]:
    """An answer, and the fingerprint of what was applied."""
    body = {
        "model": "lab:target",
        "messages": MESSAGES,
        "max_tokens": 8,
        "temperature": 0,
        "steering": steering,
    }
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    response = http.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["message"]["content"], answer["steersman"]["fingerprint"]


@pytest.mark.long
def test_a_change_reaches_both_of_two_engines(plan: tuple[str, Any]) -> None:
    two = ("--data-parallel-size", "2", "--api-server-count", "1")
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    with start("lab:target", f"--steering=loud={plan[0]}", engine=two, environment=cores) as process:
        server = Running(process)
        with server.http(ADMIN_KEY) as http:
            assert http.put("/v1/steerings/late", json=plan_body(plan[0])).status_code == 201
            for rank in (0, 1):
                base, first, late = (said(http, asked, rank) for asked in ("none", "loud", "late"))
                assert first == late
                assert base[0] != first[0]
                assert base[1] is None
            answered = [
                line for line in http.get("/metrics").text.splitlines() if "request_success_total{" in line
            ]
            counts = dict.fromkeys("01", 0.0)
            for line in answered:
                counts[line.split('engine="')[1][0]] += float(line.split()[-1])
    assert counts == {"0": 3.0, "1": 3.0}


@pytest.mark.long
def test_two_api_processes_steer_alike_and_refuse_changes(plan: tuple[str, Any]) -> None:
    with start("lab:target", f"--steering=loud={plan[0]}", engine=("--api-server-count", "2")) as process:
        server = Running(process)
        seen = set()
        for _ in range(12):  # a new connection each: the kernel hands them to either
            with server.http(ADMIN_KEY) as http:
                refused = http.put("/v1/steerings/late", json=plan_body(plan[0]))
                assert refused.status_code == 409
                assert "--api-server-count 1" in refused.json()["error"]["message"]
                seen.add((said(http, "none"), said(http, "loud")))
    assert len(seen) == 1
    ((base, steered),) = seen
    assert base[0] != steered[0]
    assert steered[1] is not None
