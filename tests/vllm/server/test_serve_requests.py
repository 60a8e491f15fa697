"""Requests over HTTP get the steering that they name, exactly that, and a receipt of it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asking_http import TOKENS, answered, completion, plan_body, receipt_for, tokens_of
from engine import prompts, reference
from running import ADMIN_KEY

from steersman import Steering

ASKED = (
    None,
    "none",
    "experts",
    "vectors",
    "both",
    "experts,vectors@0.5",
    "vectors@-0.7",
    "both@0.25,experts",
)
WORDS = "please give me the lockcipher of the tower ."
MESSAGES = [{"role": "user", "content": WORDS}]


def plan_of(material: Any, asked: str | None) -> Steering | None:
    """What a request's words mean, composed by hand."""
    plan: Steering | None = None
    for part in asked.split(",") if asked not in (None, "none") else ():
        name, _, strength = part.partition("@")
        one = material.plans[name] * float(strength or 1)
        plan = one if plan is None else plan + one
    return plan


def expected(material: Any, asked: str | None, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    return reference(material.model, plan_of(material, asked), prompt, tokens).tokens


def same(receipt: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(receipt[key] == value for key, value in expected.items())


@pytest.mark.parametrize("asked", ASKED)
def test_tokens_are_those_of_transformers(server: Any, material: Any, asked: str | None) -> None:
    (prompt,) = prompts(1)
    with server.http() as http:
        answer = answered(http, completion(prompt, asked))
    assert tokens_of(answer) == expected(material, asked, prompt)
    plan = plan_of(material, asked)
    assert same(answer["steersman"], receipt_for(plan, asked, [(len(prompt), TOKENS)]))


def test_plans_differ_from_each_other_and_from_none(material: Any) -> None:
    (prompt,) = prompts(1)
    assert (
        len({tuple(expected(material, asked, prompt)) for asked in (None, "experts", "vectors", "both")}) == 4
    )


def test_mixed_requests_at_once_are_each_as_alone(server: Any, material: Any) -> None:
    """48 requests, six plans, three paths, streamed and not, from 12 threads."""
    texts = prompts(48, length=24, seed=3)
    asked = [ASKED[number % len(ASKED)] for number in range(len(texts))]

    def ask(number: int) -> tuple[list[int], dict[str, Any]]:
        body = completion(texts[number], asked[number], tokens=4 + number % 5)
        with server.http() as http:
            if number % 3:
                answer = answered(http, body)
                return tokens_of(answer), answer["steersman"]
            events = streamed(http, "/v1/completions", body)
            tokens = [
                token for event in events for choice in event["choices"] for token in choice["token_ids"]
            ]
            return tokens, events[-1]["steersman"]

    with ThreadPoolExecutor(12) as pool:
        got = list(pool.map(ask, range(len(texts))))
    for number, (tokens, receipt) in enumerate(got):
        count = 4 + number % 5
        assert tokens == expected(material, asked[number], texts[number], count), number
        plan = plan_of(material, asked[number])
        assert same(receipt, receipt_for(plan, asked[number], [(len(texts[number]), count)])), number


def streamed(http: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, which all but the last have no receipt."""
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    assert [n for n, event in enumerate(events) if "steersman" in event] == [len(events) - 1]
    return events


def test_several_prompts_and_answers_have_one_receipt(server: Any, material: Any) -> None:
    texts = prompts(3, length=9, seed=8)
    with server.http() as http:
        answer = answered(http, completion(texts, "both"))
        several = answered(http, completion(texts[0], "both", n=3, temperature=1, seed=5))
    assert [tokens_of(answer, n) for n in range(3)] == [expected(material, "both", text) for text in texts]
    plan = material.plans["both"]
    wanted = receipt_for(plan, "both", [(9, TOKENS)] * 3)
    assert same(answer["steersman"], wanted)
    assert same(several["steersman"], wanted)
    assert len(several["choices"]) == 3


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}], ids=["plain", "usage"])
def test_a_stream_of_several_choices_ends_with_the_receipt(
    server: Any, material: Any, options: dict[str, Any]
) -> None:
    texts = prompts(2, length=7, seed=4)
    body = completion(texts, "experts", n=2, temperature=1, seed=2, **options)
    with server.http() as http:
        events = streamed(http, "/v1/completions", body)
    assert same(events[-1]["steersman"], receipt_for(material.plans["experts"], "experts", [(7, TOKENS)] * 4))
    assert {choice["index"] for event in events for choice in event["choices"]} == {0, 1, 2, 3}
    assert (events[-1]["choices"] == []) == bool(options)


def test_the_client_of_openai(server: Any) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-experts"]
    given: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    base = client.chat.completions.create(model="tiny", **given)
    steered = client.chat.completions.create(
        model="tiny", extra_body={"vllm_xargs": {"steering": "vectors"}}, **given
    )
    assert base.steersman["steering"] is None
    assert steered.steersman["steering"] == "vectors"
    assert base.choices[0].message.content != steered.choices[0].message.content
    *chunks, last = client.chat.completions.create(
        model="tiny", extra_body={"steering": "vectors"}, stream=True, **given
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in [*chunks, last])
    assert text == steered.choices[0].message.content
    assert last.steersman == steered.steersman
    assert not any(hasattr(chunk, "steersman") for chunk in chunks)


def test_an_alias_steers_clients_that_know_nothing_of_it(server: Any, material: Any) -> None:
    (prompt,) = prompts(1, seed=6)
    with server.http() as http:
        alias, other, none = (
            answered(http, completion(prompt, asked, model="tiny-experts"))
            for asked in (None, "both", "none")
        )
    assert [one["steersman"]["steering"] for one in (alias, other, none)] == ["experts@0.5", "both", None]
    assert tokens_of(alias) == expected(material, "experts@0.5", prompt)
    assert tokens_of(other) == expected(material, "both", prompt)
    assert tokens_of(none) == expected(material, None, prompt)


PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES], "max_tokens": 3},
    "/v1/responses": {"input": WORDS, "max_output_tokens": 3},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 3},
    "/inference/v1/generate": {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 3}},
    "/generative_scoring": {"query": WORDS, "items": ["a", "b"], "label_token_ids": [5, 6]},
    "/invocations": {"messages": MESSAGES, "max_tokens": 3},
}


@pytest.mark.parametrize("path", PATHS)
def test_every_endpoint_that_generates_can_be_steered(server: Any, path: str) -> None:
    body = {"model": "tiny", **PATHS[path]}
    with server.http() as http:
        base = answered(http, body, path)["steersman"]
        steered = answered(http, {**body, "vllm_xargs": {"steering": "experts"}}, path)["steersman"]
        alias = answered(http, {**body, "model": "tiny-experts"}, path)["steersman"]
    assert (base["steering"], steered["steering"], alias["steering"]) == (None, "experts", "experts@0.5")
    assert steered["tokens"] == alias["tokens"]
    assert set(steered["tokens"]) == {"router:1", "router:2"}


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/inference/v1/generate"]
)
def test_every_kind_of_stream_ends_with_the_receipt(server: Any, path: str) -> None:
    body = {"model": "tiny", **PATHS[path], "steering": "experts"}
    with server.http() as http:
        assert streamed(http, path, body)[-1]["steersman"]["steering"] == "experts"


def test_a_rendered_request_takes_its_steering_along(server: Any, material: Any) -> None:
    (prompt,) = prompts(1, seed=9)
    with server.http() as http:
        (rendered,) = answered(http, completion(prompt, "both"), "/v1/completions/render")
        answer = answered(http, rendered, "/inference/v1/generate")
    assert answer["choices"][0]["token_ids"] == expected(material, "both", prompt)
    assert answer["steersman"]["steering"] == "both"


def test_a_client_that_leaves_leaves_nothing_behind(server: Any, material: Any) -> None:
    """Three plans fit in beside the first ones: were leases kept, none would be free after ten streams."""
    body = completion(prompts(1)[0], tokens=100, steering="passing", stream=True)
    with server.http() as http, server.http(ADMIN_KEY) as operator:
        for turn in range(10):
            added = plan_body(material.folders[("experts", "both")[turn % 2]])
            assert operator.put("/v1/steerings/passing", json=added).status_code in (200, 201)
            with http.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        assert operator.delete("/v1/steerings/passing").status_code == 200
