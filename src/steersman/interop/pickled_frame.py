"""A pickled pandas frame, read as data: its columns of numbers and of text.

Neither pandas nor pyarrow takes part: their classes are words here (see `inert_pickle`), and this file knows
what a frame of pandas 0.20 to 3 says with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from steersman.errors import ArtifactError
from steersman.interop.inert_pickle import HostilePickle, Record, Word, read_inert
from steersman.interop.pickled_arrays import KNOWN_ARRAYS, ArrayReader, Column, Unexpected, record, unexpected

_STRINGS = ("pandas.arrays", "pandas.core.arrays", "pandas.core.arrays.string_")
_ARROW_STRINGS = ("pandas.arrays", "pandas.core.arrays", "pandas.core.arrays.string_arrow")

KNOWN: dict[tuple[str, str], str] = {
    **KNOWN_ARRAYS,
    ("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked"): "new",
    **{(module, "DataFrame"): "frame" for module in ("pandas", "pandas.core.frame")},
    **{
        (module, "BlockManager"): "manager"
        for module in ("pandas.core.internals", "pandas.core.internals.managers", "pandas._libs.internals")
    },
    ("pandas._libs.internals", "_unpickle_block"): "block",
    **{
        (module, "_new_Index"): "new index"
        for module in ("pandas.core.indexes.base", "pandas.indexes.base", "pandas.core.index")
    },
    **{
        (module, "Index"): "index"
        for module in ("pandas", "pandas.core.indexes.base", "pandas.indexes.base", "pandas.core.index")
    },
    **{
        (module, "RangeIndex"): "range"
        for module in ("pandas", "pandas.core.indexes.range", "pandas.indexes.range")
    },
    **{
        (module, "Int64Index"): "index"
        for module in ("pandas", "pandas.core.indexes.numeric", "pandas.indexes.numeric")
    },
    **{
        (module, name): "strings"
        for module in _STRINGS
        for name in ("StringArray", "StringArrayNumpySemantics")
    },
    **{
        (module, name): "arrow strings"
        for module in _ARROW_STRINGS
        for name in ("ArrowStringArray", "ArrowStringArrayNumpySemantics")
    },
    **{(module, "StringDtype"): "string dtype" for module in ("pandas", "pandas.core.arrays.string_")},
    **{(module, "NA"): "missing" for module in ("pandas", "pandas._libs.missing")},
    ("pyarrow.lib", "_restore_array"): "arrow array",
    ("pyarrow.lib", "chunked_array"): "arrow chunks",
    ("pyarrow.lib", "py_buffer"): "arrow buffer",
    ("pyarrow.lib", "type_for_alias"): "arrow type",
}
"""Every global of a pickled frame, at its places in pandas 0.2 to 3 and numpy 1 and 2."""


def read_frame(content: bytes, where: str) -> dict[str, Column]:
    """The columns of a pickled `pandas.DataFrame` by name, in the frame's order, rows in the order they have.

    Args:
        content: The pickle's bytes.
        where: The file's name, for messages.

    Raises:
        ArtifactError: it is damaged, of another thing than a table of numbers and text, or names anything
            that a table does not need.
    """
    try:
        return _FrameReader(len(content)).read(read_inert(content, KNOWN))
    except HostilePickle as error:
        raise ArtifactError(f"{where}: refused, and nothing of it was run: {error}") from None
    except Unexpected as error:
        raise ArtifactError(f"{where}: not a pickled table that can be read: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ArtifactError(f"{where}: damaged, or not a pickled table ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    text = repr(" ".join(str(error).split())[:200])[1:-1]
    return text or type(error).__name__


class _Block(NamedTuple):
    """Some columns of one kind: where they stand in the frame, and their values [columns, rows]."""

    places: list[int]
    values: Column


class _FrameReader:
    """Puts the columns of one frame together."""

    def __init__(self, file_bytes: int) -> None:
        self._arrays = ArrayReader(file_bytes)

    def read(self, value: Any) -> dict[str, Column]:
        state = record(value, "frame", "a table").state
        if not isinstance(state, dict):
            unexpected("the table has no content")
        axes, blocks = _axes_and_blocks(record(state.get("_mgr", state.get("_data")), "manager", "columns"))
        names, rows = self._names(axes[0]), self._length(axes[1])
        columns: dict[int, Column] = {}
        for block in self._blocks(blocks, len(names)):
            if len(block.places) != len(block.values):
                unexpected(f"{len(block.values)} columns for {len(block.places)} places")
            for place, column in zip(block.places, block.values, strict=True):
                if place in columns:
                    unexpected("a column is there twice")
                if len(column) != rows:
                    unexpected(f"a column has {len(column)} rows, the table {rows}")
                columns[place] = column
        if len(columns) != len(names):
            unexpected(f"{len(columns)} columns for {len(names)} names")
        if len(set(names)) != len(names):
            unexpected("two columns have the same name")
        return {name: columns[place] for place, name in enumerate(names)}

    def _blocks(self, blocks: list[Any], columns: int) -> Iterator[_Block]:
        for block in blocks:
            if isinstance(block, dict):  # before pandas 1.3
                places, values = block.get("mgr_locs"), block.get("values")
            else:
                arguments = record(block, "block", "a block of columns").arguments
                if len(arguments) != 3:
                    unexpected("a block of columns without its place")
                values, places = arguments[:2]
            read = self._arrays.values(values)
            # A column of text from an extension array has one dimension.
            yield _Block(self._places(places, columns), read[None, :] if read.ndim == 1 else read)

    def _places(self, value: Any, columns: int) -> list[int]:
        if isinstance(value, Record) and value.word == "slice":
            bounds = value.arguments
            if len(bounds) != 3 or not all(bound is None or type(bound) is int for bound in bounds):
                unexpected("a place of columns that is no slice")
            return list(range(*slice(*bounds).indices(columns)))
        array = self._arrays.values(value)
        if array.dtype.kind != "i" or array.ndim != 1:
            unexpected("a place of columns that is no list of whole numbers")
        if ((array < 0) | (array >= columns)).any():
            unexpected("a column outside of the table")
        return [int(place) for place in array]

    def _names(self, axis: Any) -> list[str]:
        kind, content = _index(axis)
        names = [] if kind == "range" else self._arrays.values(content.get("data")).tolist()
        if not names or not all(isinstance(name, str) for name in names):
            unexpected("its columns have no names")
        return names

    def _length(self, axis: Any) -> int:
        kind, content = _index(axis)
        if kind != "range":
            return len(self._arrays.values(content.get("data")))
        start, stop, step = (content.get(name) for name in ("start", "stop", "step"))
        if type(start) is not int or type(stop) is not int or type(step) is not int:
            unexpected("its rows are counted by what are no whole numbers")
        return len(range(start, stop, step))


def _axes_and_blocks(manager: Record) -> tuple[list[Any], list[Any]]:
    """The two axes and the blocks of a frame's block manager.

    Since pandas 1.3 its arguments are (blocks, axes); before, its state is (axes, values, items, {"0.14.1":
    {"axes": …, "blocks": [{"values": …, "mgr_locs": …}]}}).
    """
    if len(manager.arguments) == 2:
        blocks, axes = manager.arguments
    else:
        state = manager.state
        content = state[3].get("0.14.1") if isinstance(state, tuple) and len(state) == 4 else None
        if not isinstance(content, dict):
            unexpected("its columns are kept in an unknown way")
        blocks, axes = content.get("blocks"), content.get("axes")
    if not isinstance(axes, list) or len(axes) != 2 or not isinstance(blocks, tuple | list):
        unexpected("it does not have rows and columns")
    return axes, list(blocks)


def _index(axis: Any) -> tuple[str, dict[str, Any]]:
    arguments = record(axis, "new index", "an axis").arguments
    if len(arguments) != 2 or not isinstance(arguments[0], Word) or not isinstance(arguments[1], dict):
        unexpected("an axis of an unknown kind")
    kind = arguments[0].word
    if kind not in ("index", "range"):
        unexpected("an axis of an unknown kind")
    return kind, arguments[1]
