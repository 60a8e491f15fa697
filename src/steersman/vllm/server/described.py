"""What the server tells about its steerings."""

from __future__ import annotations

from typing import Any

from steersman.vllm.registry import Registered, Registry


def listed(registry: Registry) -> dict[str, Any]:
    """All of them, what requests get that name none, and the bounds of a request."""
    settings = registry.settings
    return {
        "object": "list",
        "data": [described(one) for one in registry.names()],
        "default": settings.default,
        "aliases": dict(settings.aliases),
        "strengths": list(settings.strengths),
        "max_per_request": settings.max_per_request,
        "max_steerings": settings.max_steerings,
        **(registry.dtypes.as_json() if registry.dtypes is not None else {}),
    }


def described(one: Registered) -> dict[str, Any]:
    """One of them."""
    edits = [
        {"site": edit.point, "layers": list(edit.layers), "scope": edit.scope} for edit in one.steering.edits
    ]
    return {
        "object": "steering",
        "id": one.name,
        "fingerprint": one.steering.fingerprint,
        "edits": edits,
    }
