"""What the body of an HTTP request asks for: nothing in it that looks like a steering is ignored.

The engine's server takes unknown fields and says nothing, so that a steering in the wrong place would leave
the answer unsteered. Here such a request is refused, with the place that is right.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
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
_LABELS = frozenset({"metadata"})
"""Fields whose keys are the client's own words."""
_IN_ADDRESS = frozenset({ASKED, "vllmxargs"})
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
        if key != ASKED and _nearly(key):
            where = f"{place}." if place else ""
            raise RequestError(f"steering: {where}{_shown(key)} is nothing that can be asked for; {RIGHT}")
    return ASKED in fields


def _found(place: str, fields: Mapping[str, Any]) -> object:
    if fields[ASKED] is None:
        where = f"{place}.{ASKED}" if place else ASKED
        raise RequestError(f'steering: {where} is null; leave it out, or ask for "none"')
    return fields[ASKED]


def _check_elsewhere(body: Mapping[str, Any]) -> None:
    """Raise where any other field of the body holds what looks like a steering."""
    for field, held in body.items():
        if not isinstance(held, Mapping) or field == "vllm_xargs" or field in _LABELS:
            continue
        for key, below in held.items():
            if _nearly(key):
                raise RequestError(f"steering: it is not looked for in {_shown(field)}; {RIGHT}")
            inside = key in ("extra_args", "vllm_xargs") and isinstance(below, Mapping)
            if inside and any(map(_nearly, below)):
                raise RequestError(f"steering: it is not looked for in {_shown(field)}.{key}; {RIGHT}")


def _nearly(key: object) -> bool:
    """Whether a key can only have been meant to ask for a steering; also in other letters that look so."""
    return isinstance(key, str) and _letters(key).startswith(("steer", "xsteer", "activationsteer"))


def _letters(key: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", key))).casefold()


def check_address(keys: Iterable[str]) -> None:
    """Raise `RequestError` where a key of a request's query, or a header, names a steering."""
    for key in keys:
        if _letters(key).removeprefix("x") in _IN_ADDRESS:
            raise RequestError(
                f"steering: {_shown(key)} is not looked for in headers or after the path; {RIGHT} in the body"
            )


def read_json(raw: bytes) -> Any:
    """A body's JSON.

    Raises:
        RequestError: it names a steering, or the model, twice in one object: only the last would be heard.
        ValueError, RecursionError: it is none.
    """
    return json.loads(raw, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        for key in (ASKED, "vllm_xargs", "model"):
            if keys.count(key) > 1:
                raise RequestError(f'steering: "{key}" is in the body twice; give it once')
    return found


def _known() -> str:
    return ", ".join(sorted(STEERED))


def _shown(key: str) -> str:
    text = key if key.isidentifier() and key.isascii() else repr(key)
    return text if len(text) <= 60 else text[:57] + "..."
