"""Between the server and its endpoints: a request's steering is resolved or refused, its answer receipted.

What is asked for travels to the engine's front end in a context variable, so that it reaches every answer
that is generated for the request, whatever the endpoint makes of the body.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from starlette.datastructures import Headers, QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steersman.errors import RequestError
from steersman.vllm.calls import CALL, Call
from steersman.vllm.registry import Registry
from steersman.vllm.server.asking import (
    PREPARING,
    STEERED,
    Asked,
    check_address,
    check_steerable,
    read_asked,
    read_json,
)
from steersman.vllm.server.receipts import Receipted
from steersman.vllm.server.refusals import refusal

OWN = "/v1/steerings"
"""Where the paths of the operator's side begin."""
UNREAD = "what a request asks for is read from JSON; this one is {kind}, and what it names cannot be known"


class SteeringMiddleware:
    """Wraps the endpoints of the engine's server; plain ASGI, so that streams run through it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._run(_unread(_registry(scope), "a websocket"), scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and not path_of(scope).startswith(OWN):
            await self._post(_registry(scope), scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _post(self, registry: Registry, scope: Scope, receive: Receive, send: Send) -> None:
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            await self._run(_unread(registry, kind or "of no type"), scope, receive, send)
            return
        raw = await _body(receive)
        if raw is None:
            return  # the client has gone
        replayed = _replay(raw, receive)
        with ExitStack() as held:
            try:
                body = read_json(raw)
                asked = _asked(body, scope, registry)
                call = Call(held.enter_context(registry.following(asked.given)), asked.explicit)
                _check(call, body, scope, registry)
            except RequestError as error:
                await refusal(str(error))(scope, replayed, send)
                return
            except (ValueError, RecursionError):  # no JSON: the endpoint says so
                call = Call(refused=UNREAD.format(kind="no valid JSON"))
            await self._run(call, scope, replayed, send)

    async def _run(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        token = CALL.set(call)
        try:
            await self.app(scope, receive, Receipted(send, call))
        finally:
            CALL.reset(token)


def _registry(scope: Scope) -> Registry:
    registry: Registry = scope["app"].state.engine_client.input_processor.steersman
    return registry


def path_of(scope: Scope) -> str:
    """The path without what a proxy has put before it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _unread(registry: Registry, kind: str) -> Call:
    """A call whose body is not read: it may generate only where nothing could have been asked for."""
    settings = registry.settings
    could = settings.default is not None or bool(settings.aliases)
    return Call(refused=UNREAD.format(kind=kind) if could else None)


def _asked(body: object, scope: Scope, registry: Registry) -> Asked:
    path = path_of(scope)
    check_address([*Headers(scope=scope), *QueryParams(scope["query_string"])])
    asked = read_asked(body, path, registry.settings)
    if path == "/invocations":  # a header may name the model there
        for value in Headers(scope=scope).values():
            if value in registry.settings.aliases and not asked.explicit:
                raise RequestError(f"steering: {value!r} is an alias; name it as the body's model")
    return asked


def _check(call: Call, body: Any, scope: Scope, registry: Registry) -> None:
    """Refuse, before anything is generated, what cannot be steered exactly."""
    if call.resolved is None:
        return
    check_steerable(body)
    path = path_of(scope)
    if path not in STEERED | PREPARING:
        call.refused = f"{path} cannot be steered; ask for none"
    models = getattr(scope["app"].state, "openai_serving_models", None)
    adapters = getattr(models, "lora_requests", {})
    model = body.get("model") if isinstance(body, dict) else None
    if registry.settings.match == "weights" and isinstance(model, str) and model in adapters:
        raise RequestError("steering: an adapter changes the weights that the plans were made for")


async def _body(receive: Receive) -> bytes | None:
    """All of a request's body; None where the client has gone before its end."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what comes after it."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
