"""Pickles that would run code when loaded: refused, with nothing of them run, imported or allocated."""

from __future__ import annotations

import builtins
import collections
import copyreg
import functools
import io
import operator
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rankings import ranking
from steersman.errors import ArtifactError
from steersman.interop.inert_pickle import MOST_BYTES, HostilePickle, read_inert
from steersman.interop.pickled_frame import KNOWN, read_frame


class Evil:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, **rest: Any) -> None:
        self.reduced = (function, arguments, *rest.values())

    def __reduce__(self) -> Any:
        return self.reduced


def _evil(canary: str) -> dict[str, Any]:
    """Name → an object that makes the canary when it is unpickled (or would try to)."""
    code = f"open({canary!r}, 'w').close()"
    touch = Evil(os.system, f"touch {canary}")
    return {
        "os.system": touch,
        "eval": Evil(eval, code),
        "exec": Evil(exec, code),
        "compile": Evil(compile, code, "x", "exec"),
        "open": Evil(open, canary, "w"),
        "__import__": Evil(builtins.__import__, "antigravity"),
        "getattr": Evil(getattr, Evil(builtins.__import__, "os"), "system"),
        "getattr called": Evil(functools.partial, os.system, f"touch {canary}"),
        "map": Evil(list, Evil(map, os.system, [f"touch {canary}"])),
        "subprocess": Evil(subprocess.call, ["touch", canary]),
        "operator.call": Evil(operator.methodcaller, "upper"),
        "attrgetter": Evil(operator.attrgetter("__class__"), 1),
        "pandas.eval": Evil(pd.eval, f"@__import__('os').system('touch {canary}')"),
        "pandas.read_pickle": Evil(pd.read_pickle, canary),
        "DataFrame.query": Evil(pd.DataFrame.query, pd.DataFrame({"a": [1]}), "a == 1"),
        "DataFrame.to_csv": Evil(pd.DataFrame.to_csv, pd.DataFrame({"a": [1]}), canary),
        "numpy.load": Evil(np.load, canary, None, True),
        "numpy.save": Evil(np.save, canary, 1),
        "numpy.fromfile": Evil(np.fromfile, "/dev/zero", np.uint8, 8),
        "numpy.testing": Evil(np.testing.assert_equal, 1, 1),
        "numpy.memmap": Evil(np.memmap, canary, np.uint8, "w+", 0, (8,)),
        "DataFrame with arguments": Evil(pd.DataFrame, {"a": [touch]}),
        "copyreg.add_extension": Evil(copyreg.add_extension, "os", "system", 240),
        "copyreg of another class": Evil(copyreg._reconstructor, collections.Counter, dict, {}),
        "state of a list": [1, touch],
        "state in a dict": {"_mgr": touch},
        "in a list's extension": Evil(list, (), None, iter([touch])),
        "in a dict's items": Evil(dict, (), None, None, iter([("a", touch)])),
        "with a setter of state": _WithSetter(touch),
        "in an object array": np.array([touch, None], dtype=object),
        "in a frame's cells": pd.DataFrame({"layer": pd.Series([touch], dtype=object)}),
        "in a frame's attributes": _with_attributes({"note": touch}),
        "in a frame's columns": pd.DataFrame([[1]], columns=pd.Index([touch], dtype=object)),
    }


class _WithSetter:
    """Pickles with a sixth item: a function that sets the state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        return (list, (), self.state, None, None, operator.setitem)


def _with_attributes(attributes: dict[str, Any]) -> pd.DataFrame:
    frame = ranking()
    frame.attrs = attributes
    return frame


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", sorted(_evil("/nowhere")))
def test_nothing_of_it_runs(kind: str, protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content = pickle.dumps(_evil(str(canary))[kind], protocol=protocol)
    with pytest.raises(ArtifactError) as caught:
        read_frame(content, "file")
    assert not canary.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["os.system", "exec", "open", "subprocess", "numpy.save", "in an object array"]
)
def test_the_same_files_do_run_when_they_are_unpickled(kind: str, tmp_path: Path) -> None:
    """So that the test above cannot pass for want of a charge."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(_evil(str(canary))[kind]))  # noqa: S301
    assert canary.exists() or canary.with_suffix(".npy").exists()


@pytest.mark.parametrize("kind", ["os.system", "numpy.load", "in a frame's cells", "in a frame's attributes"])
def test_it_says_what_was_named(kind: str, tmp_path: Path) -> None:
    content = pickle.dumps(_evil(str(tmp_path / "canary"))[kind])
    with pytest.raises(ArtifactError, match=r"refused, and nothing of it was run: it names [\w.]+"):
        read_frame(content, "file")


def test_nothing_is_imported(tmp_path: Path) -> None:
    (tmp_path / "trap_of_a_pickle.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ArtifactError, match=r"trap_of_a_pickle\.DataFrame"):
            read_frame(b"\x80\x02ctrap_of_a_pickle\nDataFrame\n)\x81.", "file")
    finally:
        sys.path.remove(str(tmp_path))
    assert "trap_of_a_pickle" not in sys.modules


BYTES = {
    "extension registry": b"\x80\x02\x82\xf0.",
    "extension registry, 2 bytes": b"\x80\x02\x83\xf0\x00.",
    "extension registry, 4 bytes": b"\x80\x02\x84\xf0\x00\x00\x00.",
    "persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "persistent id, protocol 0": b"Pabc\n.",
    "INST": b"(S'x'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nX\x01\x00\x00\x00ao.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n)}\x92.",
    "NEWOBJ_EX of a known class": b"\x80\x04cpandas\nDataFrame\n)}\x92.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "read-only buffer": b"\x80\x05\x97\x98.",
    "set": b"\x80\x04\x8f.",
    "dotted name": b"\x80\x04\x8c\x08builtins\x8c\x12slice.__init__.abc\x93.",
    "dotted name of a known class": b"\x80\x04\x8c\x06pandas\x8c\x0fDataFrame.query\x93.",
    "name by numbers": b"\x80\x04K\x01K\x02\x93.",
    "name with a sub-module": b"\x80\x02cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
    "call of a call": b"\x80\x02cnumpy\ndtype\n)R)R.",
    "call of text": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "arguments that are no tuple": b"\x80\x02cnumpy\ndtype\n]R.",
    "state of a tuple": b"\x80\x02)}b.",
    "state of a name": b"\x80\x02cnumpy\ndtype\n}b.",
    "state twice": b"\x80\x02cnumpy\ndtype\n)R}b}b.",
    "append to a record": b"\x80\x02cnumpy\ndtype\n)RK\x01a.",
    "items of a record": b"\x80\x02cnumpy\ndtype\n)RX\x01\x00\x00\x00aK\x01s.",
    "key that is a record": b"\x80\x02}cnumpy\ndtype\nK\x01s.",
    "Python 2 text": b"S'text'\n.",
}
DAMAGED = {
    "stack too short": b"\x80\x02R.",
    "mark too short": b"\x80\x02t.",
    "mark in a tuple": b"\x80\x02(\x85.",
    "memo of nothing": b"\x80\x02h\x05.",
    "two values": b"\x80\x02NN.",
    "no end": b"\x80\x02N",
    "nothing": b"\x80\x02.",
    "half a dict": b"\x80\x02(Nd.",
    "number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "text that claims more": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"abc.",
    "bytes that claim more": b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b"abc.",
    "negative size": b"\x80\x02T\xff\xff\xff\xffabc.",
    "unknown opcode": b"\x80\x02\xff.",
}


@pytest.mark.parametrize("kind", BYTES)
def test_opcodes_that_no_table_needs(kind: str) -> None:
    with pytest.raises(HostilePickle):
        read_inert(BYTES[kind], KNOWN)
    with pytest.raises(ArtifactError, match="refused, and nothing of it was run"):
        read_frame(BYTES[kind], "file")


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_streams(kind: str) -> None:
    with pytest.raises(ValueError):
        read_inert(DAMAGED[kind], KNOWN)
    with pytest.raises(ArtifactError):
        read_frame(DAMAGED[kind], "file")


def test_names_cannot_reach_the_terminal() -> None:
    content = b"\x80\x04\x8c\x0e\x1b[2J\x1b]0;evil\x07\x8c\x01a\x93."
    with pytest.raises(ArtifactError) as caught:
        read_frame(content, "file")
    assert str(caught.value).isprintable()


def test_known_names_are_exact() -> None:
    """No prefix, no other module's function of the same name."""
    for module, name in (
        ("pandas.core.frame", "DataFrame2"),
        ("os", "DataFrame"),
        ("numpy.core.multiarray", "fromfile"),
        ("pandas.core.indexes.base", "Index.map"),
        ("builtins", "eval"),
        ("numpy", "dtype.type"),
    ):
        with pytest.raises(HostilePickle, match="which no table"):
            read_inert(f"\x80\x02c{module}\n{name}\n.".encode("latin1"), KNOWN)


# ---------------------------------------------------------------- bombs


def frame_with(
    shape: tuple[Any, ...], buffer: bytes, columns: int = 1, rows: int = 1, copies: int = 1
) -> bytes:
    """A frame whose blocks claim a shape, written by hand."""
    stream = io.BytesIO()
    writer = pickle._Pickler(stream, protocol=3)  # type: ignore[attr-defined]
    write, save = stream.write, writer.save

    def name(module: str, word: str) -> None:
        write(f"c{module}\n{word}\n".encode())

    write(b"\x80\x04")
    name("pandas", "DataFrame")
    write(b")\x81}(\x8c\x04_mgr")
    name("pandas.core.internals.managers", "BlockManager")
    write(b"(")  # arguments
    for copy in range(copies):
        name("pandas._libs.internals", "_unpickle_block")
        write(b"(")
        name("numpy.core.numeric", "_frombuffer")
        write(b"(")
        if copy:
            write(b"j\x00\x00\x00\x40")
        else:
            save(buffer)
            write(b"r\x00\x00\x00\x40")
        name("numpy", "dtype")
        write(b"\x8c\x02f8\x85R")
        save(shape)
        save("C")
        write(b"tR")
        name("builtins", "slice")
        save(copy)
        save(copy + 1)
        save(None)
        write(b"\x87RK\x02tR")
    write(b"t](")
    name("pandas", "Index")
    write(b"0")
    for axis in (0, 1):
        name("pandas.core.indexes.base", "_new_Index")
        name("pandas", "Index" if axis == 0 else "RangeIndex")
        write(b"}(")
        if axis == 0:
            save("data")
            name("numpy.core.multiarray", "_reconstruct")
            write(b")R(K\x01")
            save((columns,))
            name("numpy", "dtype")
            write(b"\x8c\x02O8\x85R\x89")
            save([f"c{number}" for number in range(columns)])
            write(b"tb")
        else:
            for key, value in (("start", 0), ("stop", rows), ("step", 1)):
                save(key)
                save(value)
        write(b"u\x86R")
    write(b"e\x86Rub.")
    return stream.getvalue()


def test_the_frame_written_by_hand_is_one() -> None:
    columns = read_frame(frame_with((1, 3), bytes(24), rows=3), "file")
    assert columns["c0"].tolist() == [0, 0, 0]
    shared = read_frame(frame_with((1, 3), bytes(24), columns=4, rows=3, copies=4), "file")
    assert list(shared) == ["c0", "c1", "c2", "c3"]


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1, 1 << 39), 1 << 39),
        ((1 << 39, 1 << 39), 1),
        ((1, 1 << 80), 1),
        ((-1, 3), 3),
        ((1, True), 1),
        ((1, 4), 4),
    ],
    ids=str,
)
def test_shapes_beyond_the_bytes(shape: tuple[int, int], rows: int) -> None:
    with LittleMemory(), pytest.raises(ArtifactError):
        read_frame(frame_with(shape, bytes(24), rows=rows), "file")


def test_rows_beyond_any_table() -> None:
    for rows in (1 << 62, 1 << 80):
        with LittleMemory(), pytest.raises(ArtifactError):
            read_frame(frame_with((1, 3), bytes(24), rows=rows), "file")


def test_the_same_bytes_again_and_again() -> None:
    megabytes = 4
    content = frame_with((1, megabytes << 17), bytes(megabytes << 20), 2000, megabytes << 17, 2000)
    with LittleMemory(), pytest.raises(ArtifactError, match="unfolds into far more than it holds"):
        read_frame(content, "file")


def test_deep_nesting() -> None:
    deep = {
        "tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
        "lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "records": b"\x80\x02cnumpy\ndtype\nq\x00" * 100_000 + b")" + b"R\x85" * 100_000 + b".",
        "keys": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
        "marks": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        "doubling": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 100_000 + b".",
    }
    for content in deep.values():
        with LittleMemory(), pytest.raises(ArtifactError):
            read_frame(content, "file")


def test_itself_within_itself() -> None:
    with pytest.raises(ArtifactError):
        read_frame(b"\x80\x02]q\x00h\x00a.", "file")
    with pytest.raises(ArtifactError):
        read_frame(b"\x80\x02cpandas\nDataFrame\n)\x81q\x00}(X\x04\x00\x00\x00_mgrh\x00ub.", "file")


def test_size_and_time_are_bounded() -> None:
    with pytest.raises(ArtifactError, match="larger than 64 MiB"):
        read_frame(bytes(MOST_BYTES + 1), "file")
    start = time.process_time()
    with pytest.raises(ArtifactError, match="steps"):
        read_frame(b"\x80\x02" + b"N0" * 500_100 + b"N.", "file")
    assert time.process_time() - start < 60


class LittleMemory:
    """Within it, no gigabyte can be had that was not in use before."""

    def __enter__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)
