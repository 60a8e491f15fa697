"""What the middleware lets generate, without a server: an application behind it looks at its call."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from steersman.errors import RequestError
from steersman.vllm.calls import CALL, Call
from steersman.vllm.registry import Registry
from steersman.vllm.server.middleware import SteeringMiddleware
from steersman.vllm.settings import Settings


def call_of(
    body: bytes, headers: dict[str, str] | None = None, query: bytes = b""
) -> tuple[Call | None, bytes]:
    """The call under which a request reaches its endpoint, and what is answered."""
    seen: list[Call | None] = [None]
    answer = bytearray()

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        seen[0] = CALL.get()

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        answer.extend(message.get("body", b""))

    processor = SimpleNamespace(steersman=Registry(Settings(), lambda steering: None))
    state = SimpleNamespace(engine_client=SimpleNamespace(input_processor=processor))
    given = {"content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": query,
        "headers": [(key.encode(), value.encode()) for key, value in given.items()],
        "app": SimpleNamespace(state=state),
    }
    asyncio.run(SteeringMiddleware(endpoint)(scope, receive, send))
    return seen[0], bytes(answer)


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b'{"steering": "a", "x": "\xff"}'])
def test_what_is_no_json_generates_nothing(body: bytes) -> None:
    """Also where no alias and no default could have been meant: the endpoint may read what this could not."""
    call, _ = call_of(body)
    assert call is not None
    with pytest.raises(RequestError, match="no valid JSON"):
        call.check(False)


@pytest.mark.parametrize(
    ("headers", "query"), [({"x-steering": "a"}, b""), ({}, b"steering=a"), ({}, b"vllm_xargs=%7B%7D")]
)
def test_a_steering_beside_the_body_is_refused(headers: dict[str, str], query: bytes) -> None:
    call, answer = call_of(b'{"prompt": "a"}', headers, query)
    assert call is None
    assert b"is not looked for in headers" in answer


def test_a_key_that_stands_twice_is_refused() -> None:
    call, answer = call_of(b'{"vllm_xargs": {"steering": "a"}, "vllm_xargs": {}}')
    assert call is None
    assert b"is in the body twice" in answer
    call, _ = call_of(b'{"prompt": "a"}')
    assert call is not None
    assert call.resolved is None
    call.check(False)
