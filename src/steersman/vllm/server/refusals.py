"""Errors in the form of OpenAI's API."""

from __future__ import annotations

import json

from starlette.responses import Response

KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
    413: "RequestTooLargeError",
}


def refusal(message: str, status: int = 400, param: str | None = "steering") -> Response:
    """An error response with the reason, in ASCII: what a client sent may be no valid text."""
    error = {"message": message, "type": KINDS[status], "param": param, "code": status}
    return Response(json.dumps({"error": error}), status_code=status, media_type="application/json")
