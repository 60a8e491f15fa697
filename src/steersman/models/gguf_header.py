"""The metadata of a GGUF file, walked through by the bytes.

The gguf package builds an array (the tokens of a model) element by element, as long as the file claims.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
ARRAY = 9
MOST = 1 << 24
"""Far above the entries, tensors, letters of a text or tokens of any file."""

_STRING = 8
# Types of single values, by their numbers there: unsigned and signed 8, 16 and 32 bits, float, bool, unsigned
# and signed 64 bits, double.
_SINGLE = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def start(stream: BinaryIO) -> tuple[int, int, int]:
    """(version, tensors, entries of metadata) that a file claims. Raises ValueError where it is no GGUF."""
    magic, version, tensors, entries = struct.unpack("<4sIQQ", stream.read(24))
    if magic != MAGIC:
        raise ValueError(f"it does not begin with {MAGIC.decode()}")
    return version, tensors, entries


def metadata(
    stream: BinaryIO, entries: int, other: Callable[[str, int], None] | None = None
) -> dict[str, Any]:
    """{key: value} of single values and texts.

    Args:
        stream: Where the metadata begins; left where it ends.
        entries: How many there are.
        other: Called with the key and the type of anything else; without it arrays are read past.

    Raises:
        ValueError, struct.error, LookupError: it is damaged.
    """
    found: dict[str, Any] = {}
    for _ in range(entries):
        key = text(stream)
        (kind,) = struct.unpack("<I", stream.read(4))
        if key in found:
            raise ValueError(f"{key[:80]!r} is given twice")
        if kind == _STRING:
            found[key] = text(stream)
        elif kind in _SINGLE:
            form = f"<{_SINGLE[kind]}"
            (found[key],) = struct.unpack(form, stream.read(struct.calcsize(form)))
        elif other is not None:
            other(key, kind)
        elif kind == ARRAY:
            _skip_array(stream)
        else:
            raise ValueError(f"{key[:80]!r} is of the unknown type {kind}")
    return found


def text(stream: BinaryIO) -> str:
    """A text: its length, and then UTF-8."""
    (length,) = struct.unpack("<Q", stream.read(8))
    content = stream.read(min(length, MOST))
    if len(content) < length:
        raise ValueError("a text that is longer than the file")
    return content.decode()


def _skip_array(stream: BinaryIO, depth: int = 0) -> None:
    kind, count = struct.unpack("<IQ", stream.read(12))
    if count > MOST or depth > 4:
        raise ValueError("an array that is longer than any")
    if kind in _SINGLE:
        stream.seek(struct.calcsize(f"<{_SINGLE[kind]}") * count, 1)
        return
    for _ in range(count):
        if kind == _STRING:
            (length,) = struct.unpack("<Q", stream.read(8))
            stream.seek(min(length, 1 << 40), 1)
        else:
            _skip_array(stream, depth + 1)
