"""Reading data sets' files: every suffix, and every way in which a row can be wrong, by file and line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from steersman.errors import PairsError
from steersman.evaluation.tasks.rows import Row, read_rows

ROWS = [{"id": "a", "text": "one, two"}, {"id": "b", "text": 'say "x"\nthere'}]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.csv", 'id,text\na,"one, two"\nb,"say ""x""\nthere"\n'),
        ("r.csv", '\ufeffid,text\na,"one, two"\nb,"say ""x""\nthere"\n'),
        ("r.tsv", 'id\ttext\na\tone, two\nb\t"say ""x""\nthere"\n'),
        ("r.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("r.json", "".join(json.dumps(row) + "\n\n" for row in ROWS)),
        ("r.json", json.dumps(ROWS, indent=1)),
        ("r.json", json.dumps({"version": 1, "data": ROWS}, indent=1)),
    ],
)
def test_every_form_of_file_gives_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    assert [dict(row.fields) for row in read_rows(write(tmp_path / name, text), "x")] == ROWS


def test_parquet(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    assert [dict(row.fields) for row in read_rows(str(tmp_path / "r.parquet"), "x")] == ROWS


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.csv", "id,text\na,b,c\n", r"r\.csv:2: 3 cells under 2 columns"),
        ("r.csv", 'id,text\na,"b\n', r"r\.csv:\d+: not CSV"),
        ("r.csv", "id,text\n", "no rows"),
        ("r.jsonl", "", "no rows"),
        ("r.jsonl", '{"a": 1}\n{"a": \n', r"r\.jsonl:2: not JSON"),
        ("r.jsonl", '{"a": 1}\n[1]\n', r"r\.jsonl:2: \[1\] where an object"),
        ("r.json", '[{"a": 1},\n {"a": }]', r"r\.json:2: not JSON"),
        ("r.jsonl", '{"a": 1}\n{"a": NaN}\n', r'r\.jsonl:2: "a" holds NaN'),
        ("r.jsonl", '{"a": {"b": [1, Infinity]}}\n', r'r\.jsonl:1: "a" holds NaN or infinity'),
        ("r.parquet", "no parquet", "cannot be read as Parquet"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(PairsError, match=said) as caught:
        list(read_rows(write(tmp_path / name, text), "an example"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere.csv", "nowhere.csv: no such file; right is an example"),
        ("./folder/none", "no such file"),
        ("", "file is missing; right is an example"),
        ("what is this?", "no such file, and no name of a data set"),
    ],
)
def test_places_that_are_not_there(place: str, said: str) -> None:
    with pytest.raises(PairsError, match=re.escape(said)):
        list(read_rows(place, "an example"))


def test_names_of_data_sets_need_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(PairsError, match=r"owner/name@test: no such file.*pip install -e"):
        list(read_rows("owner/name@test", "x"))


def test_a_data_set_by_name_through_the_library(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the library datasets is not installed")
    for split in ("train", "test"):
        rows = [{**row, "id": f"{split}-{row['id']}"} for row in ROWS]
        write(tmp_path / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_rows(str(tmp_path), "x"))
    assert [row.fields["id"] for row in found] == ["test-a", "test-b"]
    with pytest.raises(PairsError, match="cannot be had") as caught:
        list(read_rows("owner/no-such-data-set", "x"))
    assert "\n" not in str(caught.value)


def test_fields() -> None:
    row = Row({"n": 3, "b": True, "s": "x", "blank": " ", "list": ["a", ""], "none": None}, "f:1")
    assert (row.label("none", "n"), row.label("missing"), row.text("missing", "s")) == ("3", "", "x")
    assert row.has("none", "s")
    assert not row.has("none", "missing")
    for wrong, said in (
        (lambda: row.text("n"), '"n" is 3; right is a text'),
        (lambda: row.text("blank"), '"blank" is empty'),
        (lambda: row.text("missing"), '"missing" is missing; there are n, b, s, blank, list, none'),
        (lambda: row.label("b"), '"b" is True; right is'),
        (lambda: row.texts("list"), '"list" is empty'),
        (lambda: row.texts("none"), '"none" is missing'),
    ):
        with pytest.raises(PairsError, match="^f:1: " + re.escape(said)):
            wrong()


def test_content_of_a_row() -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert Row({"messages": chat}, "f:1").content("prompt") == chat
    assert Row({"text": "go on"}, "f:1").content("prompt") == "go on"
    assert Row({"prompt": "hi"}, "f:1").content("prompt") == [{"role": "user", "content": "hi"}]
    for fields, said in (
        ({"messages": chat, "prompt": "hi"}, "both"),
        ({"messages": [*chat, {"role": "assistant", "content": "a"}]}, "must end with the user's"),
        ({"messages": [{"role": "user"}]}, '"content" is missing'),
        ({}, '"prompt" is missing'),
    ):
        with pytest.raises(PairsError, match=said):
            Row(fields, "f:1").content("prompt")
