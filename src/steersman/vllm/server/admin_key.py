"""Who may change plans: the bearer of the operator's key."""

from __future__ import annotations

import hashlib
import os
import secrets

from starlette.datastructures import Headers

VARIABLE = "STEERSMAN_ADMIN_KEY"
"""The environment variable that holds the key; without it nobody may."""


def admin_key() -> str | None:
    """The operator's key."""
    return os.environ.get(VARIABLE) or None


def bears(headers: Headers, key: str) -> bool:
    """Whether a request bears the key; the time it takes says nothing about it."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    digests = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given, key)]
    return secrets.compare_digest(*digests) and scheme.lower() == "bearer"
