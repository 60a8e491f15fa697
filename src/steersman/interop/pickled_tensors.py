"""PyTorch's files (`torch.save`, the zip format) read as data: their pickle by `inert_pickle`, their tensors
from the bytes beside it.

Such a file is a zip archive, nothing in it compressed: `NAME/data.pkl`, the pickle; `NAME/data/KEY`, the
numbers of a storage; `NAME/byteorder`. A tensor is a call of `_rebuild_tensor_v2` with a storage by its
persistent id, an offset, a shape and strides. Nothing is called, and a vector is never larger than the bytes
that the file has for it.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from steersman.interop.inert_pickle import PERSISTENT, Record, Word, read_inert
from steersman.interop.pickled_arrays import Column, record, unexpected

_STORAGES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "DoubleStorage": np.dtype("<f8"),
    # numpy has no bfloat16: it is the upper half of a float32.
    "BFloat16Storage": np.dtype("<u2"),
}

KNOWN_TENSORS: dict[tuple[str, str], str] = {
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch._utils", "_rebuild_parameter"): "parameter",
    ("collections", "OrderedDict"): "ordered dict",
    **{("torch", name): name for name in _STORAGES},
}
"""Every global of a saved tensor of floating-point numbers."""

_MOST_FILES = 10_000
_MOST_ROWS = 4096


class TensorFile:
    """A file of `torch.save`: its value, as plain data and records, and the vectors that the value names.

    Raises:
        HostilePickle: its pickle names what no tensor needs.
        Unexpected: it is another thing than a file of `torch.save`, or is compressed.
        ValueError, LookupError: it is damaged.
    """

    def __init__(self, content: bytes, known: Mapping[tuple[str, str], str], what: str) -> None:
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(content))
        except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
            raise ValueError(f"no zip archive: {error}") from None
        infos = self._archive.infolist()
        if len(infos) > _MOST_FILES or sum(info.file_size for info in infos) > len(content):
            unexpected("an archive of more files than its bytes can hold")
        # PyTorch compresses nothing: what is stored cannot unfold into more than the file.
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
            unexpected("a compressed archive, which torch.save never writes")
        pickles = [info.filename for info in infos if info.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            unexpected("an archive without the one data.pkl that torch.save writes")
        self._folder = pickles[0].removesuffix("data.pkl")
        self._sizes = {info.filename: info.file_size for info in infos}
        self._storages: dict[str, Column] = {}
        # Vectors may share a storage (the rows of one matrix), but need not unfold into far more than it.
        self._left = 4 * len(content) + (1 << 20)
        order = f"{self._folder}byteorder"
        if order in self._sizes and self._read(order) != b"little":
            unexpected("numbers that are not little-endian")
        self.value = read_inert(
            self._read(pickles[0]), {**KNOWN_TENSORS, **known}, persistent=True, what=what
        )

    def _read(self, name: str) -> bytes:
        try:
            return self._archive.read(name)
        except (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{name} in the archive: {error}") from None

    def vector(self, value: Any) -> Column:
        """The numbers of a tensor with one dimension, or with more that have the extent 1: float16, float32
        (from bfloat16 too) or float64.
        """
        storage, offset, shape, strides = self._form(value)
        long = [(extent, stride) for extent, stride in zip(shape, strides, strict=True) if extent != 1]
        if not shape or len(long) > 1:
            unexpected(f"a tensor of shape {list(shape)} where a vector should be")
        return self._line(storage, offset, long[0] if long else (1, 1), shape)

    def rows(self, value: Any) -> list[Column]:
        """The vectors of a tensor: itself, or the rows of a matrix."""
        storage, offset, shape, strides = self._form(value)
        if len(shape) != 2 or shape[0] == 1:
            return [self.vector(value)]
        if shape[0] > _MOST_ROWS:
            unexpected(f"a tensor of shape {list(shape)} where a vector a layer should be")
        line = (shape[1], strides[1])
        return [self._line(storage, offset + row * strides[0], line, shape) for row in range(shape[0])]

    def _form(self, value: Any) -> tuple[Any, int, tuple[int, ...], tuple[int, ...]]:
        """A tensor's storage, where in it the tensor begins, its shape and its strides."""
        if isinstance(value, Record) and value.word == "parameter" and value.arguments:
            value = value.arguments[0]
        arguments = record(value, "tensor", "a tensor").arguments
        if len(arguments) != 6:
            unexpected("a tensor without its form")
        storage, offset, shape, strides = arguments[:4]
        if not all(type(axes) is tuple and len(axes) <= 8 for axes in (shape, strides)):
            unexpected("a tensor of an unknown shape")
        if len(shape) != len(strides) or not all(_is_size(n) for n in (offset, *shape, *strides)):
            unexpected("a tensor of an unknown shape")
        return storage, offset, shape, strides

    def _line(self, storage: Any, offset: int, line: tuple[int, int], shape: tuple[int, ...]) -> Column:
        """(extent, stride) numbers of a storage."""
        extent, stride = line
        values = self._storage(storage)
        if not extent or offset + (extent - 1) * stride >= len(values):
            unexpected(f"a tensor of shape {list(shape)} that ends beyond its {len(values)} numbers")
        self._left -= extent * values.itemsize
        if self._left < 0 or (extent > 1 and not stride):
            unexpected("it unfolds into far more than it holds")
        return values[offset : offset + (extent - 1) * stride + 1 : max(stride, 1)].copy()

    def _storage(self, value: Any) -> Column:
        """('storage', kind, key, device, count): the numbers of a file of the archive."""
        named = value.arguments[0] if isinstance(value, Record) and value.word == PERSISTENT else None
        if type(named) is not tuple or len(named) != 5 or named[0] != "storage":
            unexpected("a tensor without its numbers")
        kind, key, count = named[1], named[2], named[4]
        if not isinstance(kind, Word) or kind.word not in _STORAGES or not isinstance(key, str):
            unexpected("a tensor of an unknown kind of numbers")
        dtype, name = _STORAGES[kind.word], f"{self._folder}data/{key}"
        if name not in self._sizes:
            unexpected("a tensor whose numbers are not in the archive")
        if not _is_size(count) or self._sizes[name] != count * dtype.itemsize:
            unexpected(f"a tensor of {count} numbers that has {self._sizes[name]} bytes")
        place = f"{kind.word} {key}"
        if place not in self._storages:
            values = np.frombuffer(self._read(name), dtype)
            if kind.word == "BFloat16Storage":
                values = (values.astype("<u4") << 16).view("<f4")
            self._storages[place] = values
        return self._storages[place]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40
