"""What the body of an HTTP request asks for: nothing in it that looks like a steering is ignored.

The engine's server takes unknown fields and says nothing, so that a steering in the wrong place would leave
the answer unsteered. Here such a request is refused, with the place that is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steersman.errors import RequestError
from steersman.vllm.registry import ASKED
from steersman.vllm.settings import Settings

RIGHT = f'right is "vllm_xargs": {{"{ASKED}": "name"}}'
STEERED = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/inference/v1/generate",
        "/generative_scoring",
        "/invocations",
    }
)
"""Paths under which what is generated follows a steering exactly."""
PREPARING = frozenset(
    {
        "/v1/completions/render",
        "/v1/chat/completions/render",
        "/v1/responses/render",
        "/v1/messages/render",
    }
)
"""Paths that only prepare a request for another: what they are asked is checked, and handed on."""
_ELSEWHERE = ("extra_body", "extra_args", "sampling_params", "steering_params")
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        given: The steering, as text; None: none.
        explicit: Whether the request names it itself; else it is the alias's or the default.
    """

    given: object = None
    explicit: bool = False


def read_asked(body: object, path: str, settings: Settings) -> Asked:
    """What a request's body asks for.

    A steering that the request names wins over the alias that it names as its model, and that over the
    default.

    Args:
        body: The JSON of the request.
        path: Its path.
        settings: The operator's.

    Raises:
        RequestError: a steering stands where it would not be heard, or twice.
    """
    if not isinstance(body, Mapping):
        return Asked()
    places = [("", body), ("vllm_xargs", _object(body, "vllm_xargs"))]
    if path == "/inference/v1/generate":
        sampling = body.get("sampling_params")
        extra = sampling.get("extra_args") if isinstance(sampling, Mapping) else None
        places.append(("sampling_params.extra_args", extra if isinstance(extra, Mapping) else _NOTHING))
    else:
        _check_elsewhere(body)
    found = [_found(place, fields) for place, fields in places if _names(place, fields)]
    if len(found) > 1 and any(other != found[0] for other in found):
        raise RequestError("steering: the request names two that differ; give one")
    if found:
        if path not in STEERED | PREPARING:
            raise RequestError(f"steering: {path} cannot be steered; {_known()} can")
        return Asked(found[0], explicit=True)
    model = body.get("model")
    if isinstance(model, str) and model in settings.aliases:
        return Asked(settings.aliases[model])
    return Asked(settings.default)


def check_steerable(body: object) -> None:
    """Raise `RequestError` where a request wants what cannot be steered exactly."""
    if not isinstance(body, Mapping):
        return
    for field, why in (
        ("use_beam_search", "beam search runs as many short requests, whose prompts hold the answer so far"),
        ("background", "an answer in the background comes without its receipt"),
        ("prompt_embeds", "a prompt given as embeddings has no tokens"),
    ):
        if body.get(field) not in (None, False):
            raise RequestError(f'steering: a request with "{field}" cannot be steered: {why}')


def _object(body: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = body.get(field)
    if value is None:
        return _NOTHING
    if not isinstance(value, Mapping):
        raise RequestError(f"steering: {field} is no object; {RIGHT}")
    return value


def _names(place: str, fields: Mapping[str, Any]) -> bool:
    """Whether a place names a steering; raises where it nearly does."""
    for key in fields:
        if isinstance(key, str) and key != ASKED and key.strip().lower().startswith("steer"):
            where = f"{place}." if place else ""
            raise RequestError(f"steering: {where}{_shown(key)} is nothing that can be asked for; {RIGHT}")
    return ASKED in fields


def _found(place: str, fields: Mapping[str, Any]) -> object:
    if fields[ASKED] is None:
        where = f"{place}.{ASKED}" if place else ASKED
        raise RequestError(f'steering: {where} is null; leave it out, or ask for "none"')
    return fields[ASKED]


def _check_elsewhere(body: Mapping[str, Any]) -> None:
    for field in _ELSEWHERE:
        value = body.get(field)
        held = value if isinstance(value, Mapping) else _NOTHING
        below = held.get("extra_args")
        for fields in (held, below if isinstance(below, Mapping) else _NOTHING):
            if any(isinstance(key, str) and key.strip().lower().startswith("steer") for key in fields):
                raise RequestError(f"steering: it is not looked for in {field}; {RIGHT}")
        xargs = held.get("vllm_xargs")
        if isinstance(xargs, Mapping) and ASKED in xargs:
            raise RequestError(f"steering: it is not looked for in {field}.vllm_xargs; {RIGHT}")


def _known() -> str:
    return ", ".join(sorted(STEERED))


def _shown(key: str) -> str:
    text = repr(key)
    return text if len(text) <= 60 else text[:57] + "..."
