"""The operator's side over HTTP: `/v1/steerings`, to list, add, replace and remove while the server runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from steersman.errors import ArchitectureMismatch, RequestError, ServingError, WeightsMismatch
from steersman.vllm.registry import Registry
from steersman.vllm.server.admin_key import VARIABLE, admin_key, bears
from steersman.vllm.server.changing import Changes
from steersman.vllm.server.described import described, listed
from steersman.vllm.server.plan_files import LARGEST, read_files
from steersman.vllm.server.refusals import refusal
from steersman.vllm.settings import check_name

_BASE64 = {"type": "string", "format": "byte"}
_NAME = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}
_FILES = {"manifest": _BASE64, "tensors": _BASE64}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The reason"},
    401: {"description": "The operator's key is not this one"},
    403: {"description": "The server has no operator's key"},
    404: {"description": "There is no such steering"},
    409: {"description": "The state of the server forbids it"},
    413: {"description": "The body is too large"},
}
router = APIRouter(tags=["steersman"])


class _Refused(Exception):
    """A response instead of an answer."""

    def __init__(self, message: str, status: int, param: str | None = None) -> None:
        super().__init__(message)
        self.response = refusal(message, status, param)


def _registry(request: Request) -> Registry:
    registry: Registry = request.app.state.engine_client.input_processor.steersman
    return registry


def _changes(request: Request) -> Changes:
    state = request.app.state
    if not hasattr(state, "steersman_changes"):
        state.steersman_changes = Changes(state.engine_client, _registry(request))
    changes: Changes = state.steersman_changes
    return changes


@router.get("/v1/steerings")
async def list_steerings(request: Request) -> Response:
    """The steerings that can be asked for, the default, the aliases and the bounds of a request."""
    return JSONResponse(listed(_registry(request)))


@router.get("/v1/steerings/{name}", responses={404: _ERRORS[404]})
async def show_steering(name: str, request: Request) -> Response:
    """One steering."""
    for one in _registry(request).names():
        if one.name == name:
            return JSONResponse(described(one))
    return refusal("there is no steering of this name", 404, "name")


def _body(properties: Mapping[str, Any]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post(
    "/v1/steerings", status_code=201, responses=_ERRORS, openapi_extra=_body({"name": _NAME, **_FILES})
)
async def add_steering(request: Request) -> Response:
    """Add a steering: its name, and the files of its folder in base64."""
    return await _answered(_put(request, None))


@router.put(
    "/v1/steerings/{name}",
    responses={**_ERRORS, 201: {"description": "Added"}},
    openapi_extra=_body(_FILES),
)
async def put_steering(name: str, request: Request) -> Response:
    """Add a steering, or put it in the place of the one of its name."""
    return await _answered(_put(request, name))


@router.delete("/v1/steerings/{name}", responses=_ERRORS)
async def remove_steering(name: str, request: Request) -> Response:
    """Remove a steering; requests that follow it go on to their end."""

    async def run() -> Response:
        _authorised(request)
        if all(one.name != name for one in _registry(request).names()):
            raise _Refused("there is no steering of this name", 404, "name")
        try:
            await _changes(request).remove(name)
        except ServingError as error:
            raise _Refused(str(error), 409) from None
        return JSONResponse({"object": "steering", "id": name, "deleted": True})

    return await _answered(run())


@router.put(
    "/v1/steerings-default",
    responses=_ERRORS,
    openapi_extra=_body({"steering": {"type": ["string", "null"]}}),
)
async def put_default(request: Request) -> Response:
    """Change what requests get that ask for nothing; null: the model as it is."""

    async def run() -> Response:
        _authorised(request)
        body = await _json(request, {"steering"})
        given = body["steering"]
        if given is not None and not isinstance(given, str):
            raise RequestError('steering: right is "name", "name@0.5", "name,other@0.5" or null')
        await _changes(request).set_default(given)
        return JSONResponse({"default": given})

    return await _answered(run())


async def _put(request: Request, name: str | None) -> Response:
    changes = _authorised(request)
    body = await _json(request, {"manifest", "tensors"} | ({"name"} if name is None else set()))
    asked = check_name(body["name"] if name is None else name)
    try:
        steering, replaced = await changes.put(asked, read_files(body), new=name is None)
    except FileExistsError:
        raise _Refused(
            f'there is a steering "{asked}"; PUT /v1/steerings/{asked} replaces it', 409, "name"
        ) from None
    except (ArchitectureMismatch, WeightsMismatch) as error:
        raise RequestError(str(error)) from None
    answer = {"object": "steering", "id": asked, "fingerprint": steering.fingerprint, "replaced": replaced}
    return JSONResponse(answer, status_code=200 if replaced else 201)


async def _answered(run: Any) -> Response:
    """An answer, or its refusal in the API's form."""
    try:
        response: Response = await run
        return response
    except _Refused as error:
        return error.response
    except (RequestError, ServingError) as error:
        return refusal(str(error), 400, None)


def _authorised(request: Request) -> Changes:
    key = admin_key()
    if key is None:
        raise _Refused(f"plans cannot be changed: the server was started without {VARIABLE}", 403)
    if not bears(request.headers, key):
        raise _Refused("the operator's key is not this one: right is Authorization: Bearer KEY", 401)
    changes = _changes(request)
    try:
        changes.check_possible()
    except ServingError as error:
        raise _Refused(str(error), 409) from None
    return changes


async def _json(request: Request, fields: set[str]) -> dict[str, Any]:
    """A body that is an object with just these fields."""
    kept = bytearray()
    async for part in request.stream():
        kept += part
        if len(kept) > LARGEST:
            raise _Refused(f"the body has more than {LARGEST} bytes", 413)
    try:
        body = json.loads(bytes(kept))
    except (ValueError, RecursionError):
        raise RequestError("the body is no JSON") from None
    if not isinstance(body, dict) or set(body) != fields:
        raise RequestError(f"right is a JSON object with {', '.join(sorted(fields))}, and nothing else")
    return body
