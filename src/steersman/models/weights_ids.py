"""Ids of weights as text: the scheme that each names before a colon.

`bytes-sha256` is over every byte of every tensor, `gguf-sha256` over those of a GGUF file, which are
quantised, and over its metadata. An id without a scheme is by a sample of the bytes, as earlier versions
made them.
"""

from __future__ import annotations

SCHEME = "bytes-sha256"
GGUF_SCHEME = "gguf-sha256"

UNKNOWN = "unknown:"
"""Of a model that was opened for its structure alone, because its weights are not at hand."""


def is_by_sample(identity: str) -> bool:
    """Whether an id is over a sample of the bytes."""
    return ":" not in identity


def of_gguf(identity: str) -> bool:
    """Whether an id is of a GGUF file."""
    return identity.startswith(f"{GGUF_SCHEME}:")


def in_brief(identity: str) -> str:
    """An id for people: its scheme, and the first digits."""
    scheme, colon, digits = identity.rpartition(":")
    return f"{scheme}{colon}{digits[:16]}…"
