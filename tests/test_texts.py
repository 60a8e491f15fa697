"""Texts to read a model with: from files, from the lab, from Python; everything else with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steersman.errors import PairsError
from steersman.texts import Texts, load_texts

CHAT = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]


def test_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    chat = '{"messages": [{"role": "user", "content": "who?"}]}'
    path.write_text(f'\ufeffa text\n\n  17 \n{{"text": "another"}}\r\n{chat}\n"x"\n')
    texts = load_texts(path)
    assert [text.content for text in texts] == ["a text", "17", "another", CHAT[:1], '"x"']
    assert [text.where.removeprefix(str(path)) for text in texts] == [":1", ":3", ":4", ":5", ":6"]
    assert texts.name == str(path)
    assert texts[1:3].sha256 == load_texts(["17", {"text": "another"}]).sha256 != texts.sha256


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n"b"\n[{"role": "user", "content": "who?"}]\n')
    assert [text.content for text in load_texts(str(path))] == ["a", "b", CHAT[:1]]


def test_from_python() -> None:
    texts = load_texts(["a", {"text": "b"}, CHAT, {"messages": CHAT}])
    assert [text.content for text in texts] == ["a", "b", CHAT, CHAT]
    assert isinstance(texts, Texts)
    assert load_texts(texts) is texts


def test_the_lab_gives_both_sides_once() -> None:
    texts = load_texts("lab:refusal/dev")
    contents = [str(text.content) for text in texts]
    assert len(set(contents)) == len(contents) > 100
    assert texts[0].where == "lab:refusal/dev:1"
    with pytest.raises(PairsError, match="the lab has no pairs"):
        load_texts("lab:nothing")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', "right is one text a line"),
        ('{"text": "a", "id": 1}', "the keys are text, id"),
        ('{"prompt": "a"}', "the keys are prompt"),
        ('{"text": "a", "text": "b"}', 'the key "text" twice'),
        ('{"messages": "a"}', "right is one text a line"),
        ('{"messages": []}', "neither a text nor messages"),
        ('{"messages": [{"role": "x", "content": "a"}]}', "the role 'x' is unknown"),
        ("{}", "the keys are none"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_lines_that_are_none(line: str, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"texts.{suffix}"
    path.write_text(line + "\n")
    with pytest.raises(PairsError, match=message) as caught:
        load_texts(path)
    assert str(caught.value).startswith(f"{path}:1")


@pytest.mark.parametrize(("line", "message"), [("a text", "not JSON"), ("17", "neither a text nor messages")])
def test_json_lines_that_are_none(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(line)
    with pytest.raises(PairsError, match=message):
        load_texts(path)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_files_without_texts(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(content)
    with pytest.raises(PairsError):
        load_texts(path)
    with pytest.raises(PairsError, match="no such file"):
        load_texts(tmp_path / "none")


def test_nothing_in_python() -> None:
    values: list[Any] = []
    with pytest.raises(PairsError, match="no texts in it"):
        load_texts(values)
    with pytest.raises(PairsError, match="text 1: neither a text nor messages"):
        load_texts([3])  # type: ignore[list-item]


def test_an_empty_text_is_said_as_one() -> None:
    with pytest.raises(PairsError, match="text 2 is empty; right is one text a line"):
        load_texts(["a", " "])
