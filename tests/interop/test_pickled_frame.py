"""Frames read from pickles as pandas reads them, whatever protocol; damaged and other ones refused."""

from __future__ import annotations

import gzip
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankings import ranking
from steersman.errors import ArtifactError
from steersman.interop.pickled_frame import read_frame


def pickled(value: Any, protocol: int = 5) -> bytes:
    stream = io.BytesIO()
    pickle.dump(value, stream, protocol=protocol)
    return stream.getvalue()


def assert_read(frame: pd.DataFrame, content: bytes) -> None:
    columns = read_frame(content, "file")
    assert list(columns) == list(frame.columns)
    for name, values in columns.items():
        expected = frame[name].to_numpy(dtype=object if values.dtype == object else None)
        np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_any_protocol(protocol: int) -> None:
    frame = ranking()
    assert_read(frame, pickled(frame, protocol))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("dtype", ["object", "string[python]", "string[pyarrow]", "str"])
def test_every_way_pandas_keeps_text(dtype: str, protocol: int) -> None:
    frame = ranking().astype({"Layer_Expert": dtype})
    frame.columns = pd.Index(list(frame.columns), dtype=dtype)
    assert_read(frame, pickled(frame, protocol))


def test_text_of_arrow_in_pieces_and_with_gaps() -> None:
    text = pd.Series(["ä", None, "", "long " * 20, "x", None], dtype="string[pyarrow]")
    frame = pd.DataFrame({"text": pd.concat([text[2:5], text[:1]], ignore_index=True), "n": range(4)})
    assert_read(frame, pickled(frame))
    gaps = pd.DataFrame({"text": text[1:].reset_index(drop=True)})
    read = read_frame(pickled(gaps), "file")["text"].tolist()
    assert read == [None, "", "long " * 20, "x", None]


def test_text_of_pandas_from_arrow_chunks() -> None:
    import pyarrow

    chunked = pyarrow.chunked_array([["a", "bc"], ["def"]], type=pyarrow.large_string())
    frame = pd.DataFrame({"text": pd.arrays.ArrowStringArray(chunked)})
    assert read_frame(pickled(frame), "file")["text"].tolist() == ["a", "bc", "def"]


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from(["int8", "uint16", ">i4", "int64", "float32", ">f8", "bool"]), min_size=1, max_size=6
    ),
    st.integers(0, 5),
    st.integers(0, 7),
    st.integers(0, 2**32 - 1),
)
def test_numbers_of_any_kind(dtypes: list[str], protocol: int, rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    columns = {
        f"column {place}": random.integers(0, 100, rows).astype(dtype) for place, dtype in enumerate(dtypes)
    }
    frame = pd.DataFrame(columns)
    if rows and seed % 2 and ">" not in "".join(dtypes):  # pandas cannot permute those
        frame = frame.iloc[random.permutation(rows)]  # an index of its own, rows out of order in memory
    assert_read(frame, pickled(frame, protocol))


def test_the_way_of_pandas_before_1_3() -> None:
    """Its block managers keep a state; the classes are stood in for by words that pickle as theirs did."""
    frame = ranking()
    numbers = ["a1", "a2", "risk_diff"]
    axes = [pd.Index([*numbers, "layer"], dtype=object), pd.RangeIndex(len(frame))]
    blocks = [
        {"values": frame[numbers].to_numpy().T.copy(), "mgr_locs": slice(0, 3, 1)},
        {"values": frame[["layer"]].to_numpy().T.copy(), "mgr_locs": np.array([3])},
    ]
    content = {"0.14.1": {"axes": axes, "blocks": blocks}}
    state = (axes, [block["values"] for block in blocks], [axes[0][:3], axes[0][3:]], content)
    manager = _Named("pandas.core.internals", "BlockManager", state)
    old = _Named("pandas.core.frame", "DataFrame", {"_data": manager, "_typ": "dataframe", "_metadata": []})
    assert_read(frame[[*numbers, "layer"]], _dump(old))


class _Named:
    """What is written as `module.name()` with a state."""

    def __init__(self, module: str, name: str, state: Any) -> None:
        self.module, self.name, self.state = module, name, state


class _Writer(pickle._Pickler):  # type: ignore[name-defined]
    """Writes `_Named` as a new object of the class it names, without importing one."""

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(value, _Named):
            super().save(value, save_persistent_id)
            return
        self.write(f"c{value.module}\n{value.name}\n)\x81".encode("latin1"))
        self.save(value.state)
        self.write(b"b")


def _dump(value: Any) -> bytes:
    stream = io.BytesIO()
    _Writer(stream, protocol=2).dump(value)
    return stream.getvalue()


# ---------------------------------------------------------------- other and damaged files


@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        "text",
        [1, 2],
        {"a": 1},
        np.arange(6.0),
        pd.Series([1, 2], name="a"),
        pd.Index([1, 2]),
        pd.DataFrame({"when": pd.to_datetime(["2024-01-01"])}),
        pd.DataFrame({"kind": pd.Categorical(["a", "b"])}),
        pd.DataFrame({"maybe": pd.array([1, None], dtype="Int64")}),
        pd.DataFrame({"complex": [1j]}),
        pd.DataFrame({"nested": [[1], [2]]}),
        pd.DataFrame([[1, 2]]),
        pd.DataFrame([[1, 2]], columns=["a", "a"]),
        pd.DataFrame([[1]], columns=pd.MultiIndex.from_tuples([("a", "b")])),
        {1: 2},
        {("a",): 1},
        {1, 2},
        pickle.PickleBuffer(b"ab"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", repr(value)),
)
def test_other_things_are_refused(value: Any) -> None:
    with pytest.raises(ArtifactError) as caught:
        read_frame(pickled(value), "the file")
    message = str(caught.value)
    assert message.startswith("the file: ")
    assert "\n" not in message
    assert len(message) < 400


def test_cut_off_anywhere() -> None:
    content = pickled(ranking(layers=1, experts=4))
    for length in range(1, len(content)):
        with pytest.raises(ArtifactError):
            read_frame(content[:length], "file")


@settings(max_examples=300)
@given(st.data())
def test_changed_bytes_give_a_table_or_one_clear_line(data: st.DataObject) -> None:
    content = bytearray(_SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    columns, complaint = None, ""
    try:
        columns = read_frame(bytes(content), "file")
    except ArtifactError as error:
        complaint = str(error)
    assert complaint.isprintable()
    assert columns is None or len({len(values) for values in columns.values()}) == 1


_SMALL = pickled(ranking(layers=1, experts=4))


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ArtifactError):
        read_frame(b"\x80\x04" + noise, "file")


def test_compressed(tmp_path: Path) -> None:
    from steersman.interop.steermoe import read_ranking

    path = tmp_path / "ranking.pkl.gz"
    path.write_bytes(gzip.compress(_SMALL))
    with pytest.raises(ArtifactError, match="compressed with gzip; unpack it first"):
        read_ranking(path)
