"""The engine's HTTP application: steering for its endpoints, and the operator's side beside them."""

from __future__ import annotations

import sys
from typing import Any

from starlette.middleware import Middleware

from steersman.vllm.calls import expect_calls
from steersman.vllm.server.admin_key import admin_key
from steersman.vllm.settings import read_settings
from steersman.vllm.signatures import check_signature

_BUILDERS = (
    "vllm.entrypoints.launchers.api_server.entry",  # 0.32 and later
    "vllm.entrypoints.openai.api_server",
)
_GUARD = "AuthenticationMiddleware"


def extend_server() -> None:
    """Extend what builds the application, where this process is a server.

    Raises:
        ServingError: the engine's server is not as known.
    """
    for name in _BUILDERS:
        module = sys.modules.get(name)  # a process that is no server has not imported it, and need not
        if module is not None and hasattr(module, "build_app"):
            _extend(module)


def _extend(module: Any) -> None:
    original = module.build_app
    if getattr(original, "steersman", False):
        return
    check_signature(original, ("args", "supported_tasks", "model_config"))

    def build_app(args: Any, *more: Any, **named: Any) -> Any:
        app = original(args, *more, **named)
        if read_settings(getattr(args, "additional_config", None)) is not None:
            add_steering(app)
        return app

    build_app.steersman = True  # type: ignore[attr-defined]
    module.build_app = build_app


def add_steering(app: Any) -> None:
    """Put the steering of requests and the operator's endpoints into an application."""
    from steersman.vllm.server.admin import router
    from steersman.vllm.server.middleware import SteeringMiddleware

    app.include_router(router)
    # Last in the list is next to the endpoints: who may not ask is told so first, and answers are counted.
    app.user_middleware.append(Middleware(SteeringMiddleware))
    key = admin_key()
    for other in app.user_middleware:
        if key is not None and other.cls.__name__ == _GUARD:
            other.kwargs["tokens"] = [*other.kwargs["tokens"], key]
    if app.middleware_stack is not None:  # one of the packages around the server has built it already
        app.middleware_stack = app.build_middleware_stack()
    expect_calls()
