"""Arrays in a pickle that was read as data: numbers from the buffers that are in the file, text from numpy's,
pandas' and Arrow's ways to keep it.

An array is as large as the bytes or items that the file has for it, never as large as the file claims; and
all arrays together are no larger than a small multiple of the file, however often it recalls the same bytes.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from steersman.interop.inert_pickle import Record, Word

Column = np.ndarray[Any, Any]
"""Numbers, or text (None where it is missing) with dtype object."""

_NUMPY_CORE = ("numpy.core", "numpy._core")

KNOWN_ARRAYS: dict[tuple[str, str], str] = {
    **{
        (module, name): name
        for module in ("builtins", "__builtin__")
        for name in ("slice", "bytes", "bytearray", "object")
    },
    **{(module, "_reconstructor"): "new" for module in ("copyreg", "copy_reg")},
    ("_codecs", "encode"): "encode",
    **{(f"{core}.multiarray", "_reconstruct"): "empty array" for core in _NUMPY_CORE},
    **{(f"{core}.numeric", "_frombuffer"): "array" for core in _NUMPY_CORE},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
}
"""Every global of a pickled array of numbers, at its places in numpy 1 and 2."""

_NUMBERS = {kind + size for kinds, sizes in (("iu", "1248"), ("f", "48")) for kind in kinds for size in sizes}
_MISSING = Word("missing")
_OFFSETS = {"large_string": "<i8", "string": "<i4"}


class Unexpected(Exception):
    """What is there is not what a table has there."""


def unexpected(what: str) -> NoReturn:
    raise Unexpected(what)


def record(value: Any, word: str, what: str) -> Record:
    """The record of a call of `word`. Raises `Unexpected` that misses `what` where there is another thing."""
    found = plain_record(value)
    if found is None or found.word != word:
        unexpected(f"something else where {what} should be")
    return found


def plain_record(value: Any) -> Record | None:
    """A record as it is; one of a function that makes an empty object of the class it is given (copyreg's in
    protocols 0 and 1, pandas' of its compiled arrays) as the one it means.
    """
    if not isinstance(value, Record):
        return None
    named = value.arguments[0] if value.arguments else None
    if value.word == "new" and isinstance(named, Word):
        return Record(named.word, (), value.state, value.built)
    return value


class ArrayReader:
    """Reads the arrays of one file, within a budget of bytes."""

    def __init__(self, file_bytes: int) -> None:
        # Legitimate files read each byte once, and take 8 bytes for an item of 2 that was recalled.
        self._left = 8 * file_bytes + (1 << 20)

    def values(self, value: Any) -> Column:
        """Any array: of numbers, or of text as dtype object; one or two dimensions."""
        found = plain_record(value)
        if found is not None:
            if found.word == "array":
                return self._from_buffer(found)
            if found.word == "empty array":
                return self._from_state(found)
            if found.word == "strings":
                return self._strings(found)
            if found.word == "arrow strings":
                return self._arrow_strings(found)
        unexpected("something else where an array should be")

    def _from_buffer(self, array: Record) -> Column:
        if len(array.arguments) != 4:
            unexpected("an array without its form")
        buffer, dtype, shape, order = array.arguments
        return self._numbers(buffer, _dtype(dtype), _shape(shape), order == "F")

    def _from_state(self, array: Record) -> Column:
        """numpy's older way: an empty array, then (version, shape, dtype, Fortran order, bytes or list)."""
        state = array.state
        if not isinstance(state, tuple) or len(state) != 5:
            unexpected("an array without its content")
        shape, dtype, content = _shape(state[1]), _dtype(state[2]), state[4]
        if dtype is not None:
            return self._numbers(content, dtype, shape, bool(state[3]))
        if not isinstance(content, list):
            unexpected("an array of objects without a list of them")
        return self._objects(content, shape)

    def _numbers(
        self, buffer: Any, dtype: np.dtype[Any] | None, shape: tuple[int, ...], fortran: bool
    ) -> Column:
        if dtype is None:
            unexpected("an array of objects made of bytes")
        content = self._bytes(buffer)
        if _size(shape) * dtype.itemsize != len(content):
            unexpected(f"an array of {shape} numbers that has {len(content)} bytes")
        values = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
        return values.astype(dtype.newbyteorder("="))

    def _objects(self, items: list[Any], shape: tuple[int, ...]) -> Column:
        if _size(shape) != len(items):
            unexpected(f"an array of {shape} objects that has {len(items)}")
        self._spend(8 * len(items))
        items = [None if type(item) is Word and item == _MISSING else item for item in items]
        if not all(item is None or type(item) in (str, int, float, bool) for item in items):
            unexpected("an array holds something else than numbers and text")
        values = np.empty(len(items), dtype=object)
        values[:] = items
        return values.reshape(shape)

    def _bytes(self, value: Any) -> bytes:
        """Bytes as they are, or as older protocols have them: in a bytearray, or text encoded in latin1."""
        if isinstance(value, Record) and value.word in ("bytearray", "bytes"):
            value = value.arguments[0] if value.arguments else b""
        if isinstance(value, Record) and value.word == "encode":
            arguments = value.arguments
            if len(arguments) != 2 or arguments[1] != "latin1" or not isinstance(arguments[0], str):
                unexpected("bytes in an unknown encoding")
            self._spend(len(arguments[0]))
            return arguments[0].encode("latin1")
        if not isinstance(value, bytes):
            unexpected("something else where bytes should be")
        self._spend(len(value))
        return value

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            unexpected("it unfolds into far more than it holds")

    # ------------------------------------------------------------ text of pandas 2 and 3

    def _strings(self, array: Record) -> Column:
        """pandas' StringArray: an array of objects in its state."""
        for part in _state_parts(array):
            if isinstance(part, Record) and part.word in ("empty array", "array"):
                values = self.values(part)
                if values.dtype == object and values.ndim == 1:
                    return values
        unexpected("a column of text without its text")

    def _arrow_strings(self, array: Record) -> Column:
        for part in _state_parts(array):
            if isinstance(part, Record) and part.word in ("arrow array", "arrow chunks"):
                texts = [text for chunk in _chunks(part) for text in self._texts(chunk)]
                return self._objects(texts, (len(texts),))
        unexpected("a column of text without its text")

    def _texts(self, value: Any) -> list[str | None]:
        """Arrow's text: (type, length, nulls, first, [validity, offsets, bytes], children, dictionary)."""
        arguments = record(value, "arrow array", "a piece of text").arguments
        parts = arguments[0] if len(arguments) == 1 else None
        if not isinstance(parts, tuple) or len(parts) < 5:
            unexpected("a piece of text of an unknown form")
        kind, length, _, first, buffers = parts[:5]
        alias = record(kind, "arrow type", "a type of text").arguments
        width = _OFFSETS.get(alias[0]) if len(alias) == 1 and isinstance(alias[0], str) else None
        if width is None or not isinstance(buffers, list) or len(buffers) != 3:
            unexpected("a piece of text of an unknown form")
        if any(type(number) is not int or number < 0 for number in (length, first)):
            unexpected("a piece of text of an unknown length")
        if not length:
            return []
        valid, offsets, text = (None if part is None else self._bytes(_buffer(part)) for part in buffers)
        ends = np.frombuffer(offsets or b"", width)[first : first + length + 1].tolist()
        whole = text or b""
        if len(ends) != length + 1 or ends != sorted(ends) or ends[0] < 0 or ends[-1] > len(whole):
            unexpected("a piece of text whose ends do not fit it")
        there = _bits(valid, first, length)
        bounds = zip(ends[:-1], ends[1:], there, strict=True)
        return [whole[start:end].decode() if known else None for start, end, known in bounds]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not 1 <= len(value) <= 2:
        unexpected("an array of neither one nor two dimensions")
    if any(type(extent) is not int or not 0 <= extent < 1 << 40 for extent in value):
        unexpected("an array whose size is no whole number")
    return value


def _dtype(value: Any) -> np.dtype[Any] | None:
    """A dtype of plain numbers; None for objects."""
    found = record(value, "dtype", "a dtype")
    code = found.arguments[0] if found.arguments else None
    if not isinstance(code, str):
        unexpected("an array of neither numbers nor text")
    if code in ("O", "O8", "O4"):
        return None
    if code == "b1":
        return np.dtype(np.bool_)
    if code not in _NUMBERS:
        unexpected("an array of neither numbers nor text")
    state = found.state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
    if order not in ("<", ">", "|", "="):
        unexpected("an array of an unknown byte order")
    return np.dtype(f"{order}{code}")


def _state_parts(array: Record) -> list[Any]:
    """The parts of an extension array's state: a dict's, or those of the tuple of its compiled base."""
    parts: list[Any] = []
    for state in array.state if isinstance(array.state, tuple | list) else [array.state]:
        parts.extend(state.values() if isinstance(state, dict) else [state])
    return parts


def _chunks(text: Record) -> list[Any]:
    if text.word == "arrow array":
        return [text]
    chunks = text.arguments[0] if text.arguments else None
    if not isinstance(chunks, list | tuple):
        unexpected("a column of text without its text")
    return list(chunks)


def _bits(valid: bytes | None, first: int, length: int) -> list[bool]:
    if valid is None:
        return [True] * length
    bits = np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")[first : first + length]
    if len(bits) != length:
        unexpected("a piece of text whose gaps do not fit it")
    return [bool(bit) for bit in bits]


def _buffer(value: Any) -> Any:
    arguments = record(value, "arrow buffer", "a buffer").arguments
    if len(arguments) != 1:
        unexpected("a buffer without its bytes")
    return arguments[0]
