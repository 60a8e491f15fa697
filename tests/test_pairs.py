"""Contrast pairs: every form that is read, every way to get one wrong."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from steersman.errors import PairsError
from steersman.pairs import ContrastPair, ContrastPairs, load_pairs, persona_pairs

# ---------------------------------------------------------------------------------------------------- reading


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_form_reads_as_the_same_pairs(tmp_path: Path) -> None:
    own = write(
        tmp_path / "own.jsonl", {"positive": "yes", "negative": "no"}, {"positive": "a b", "negative": "c"}
    )
    steermoe = write(
        tmp_path / "steermoe.jsonl",
        {"messages_0": "yes", "messages_1": "no"},
        {"messages_0": "a b", "messages_1": "c"},
    )
    lists = write(tmp_path / "lists.json", {"pos": ["yes", "a b"], "neg": ["no", "c"]})
    per_line = write(
        tmp_path / "lines.jsonl", {"pos": ["yes"], "neg": ["no"]}, {"pos": ["a b"], "neg": ["c"]}
    )
    pretty = tmp_path / "pretty.json"
    pretty.write_text(json.dumps({"pos": ["yes", "a b"], "neg": ["no", "c"]}, indent=2))
    table = tmp_path / "table.csv"
    table.write_text("positive,negative\nyes,no\na b,c\n")
    rows = [{"positive": "yes", "negative": "no"}, {"positive": "a b", "negative": "c"}]

    read = [load_pairs(source) for source in (own, steermoe, lists, per_line, pretty, table, str(own), rows)]

    assert {pairs.sha256 for pairs in read} == {load_pairs(own).sha256}
    for pairs in read:
        assert [(pair.positive, pair.negative) for pair in pairs] == [("yes", "no"), ("a b", "c")]


def test_arrays_tuples_and_whatever_gives_rows(tmp_path: Path) -> None:
    rows = [{"positive": "yes", "negative": "no"}, {"positive": "a b", "negative": "c"}]
    tuples = [(row["positive"], row["negative"]) for row in rows]
    sources: dict[str, str] = {
        "one line.json": json.dumps(rows),
        "many lines.json": json.dumps(rows, indent=1),
        "a row a line.jsonl": "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
        "tuples.json": json.dumps(tuples),
        "many lines of tuples.json": json.dumps(tuples, indent=2),
        "a tuple a line.jsonl": "\n".join(map(json.dumps, tuples)),
    }
    expected = load_pairs(rows).sha256
    for name, content in sources.items():
        (tmp_path / name).write_text(content)
        pairs = load_pairs(tmp_path / name)
        assert pairs.sha256 == expected, name
        assert pairs[1].where.startswith(f"{tmp_path / name}:"), name
    for given in (iter(rows), (row for row in tuples), map(list, tuples), tuple(tuples)):
        assert load_pairs(given).sha256 == expected


def test_rows_of_an_array_name_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    good = '{"positive": "a", "negative": "b"}'
    wrong = {
        f'[\n{good},\n\n{{"positive": "c"}}]': ':4, row 2: "negative" is missing',
        f"[{good},\n{good}": ":2: after row 2 a comma, or the list's end, is missing",
        f"[{good}\n{good}]": ":1: after row 1 a comma, or the list's end, is missing",
        f"[{good},\n]": ":2: not JSON",
        f"[\n{good},\n{{]": ":3: not JSON",
        f"[{good}]\n{good}": ":1: more text after the list",
        "[]": "no pairs in it",
        "[\n]": "no pairs in it",
        "[" * 100_000: "nested too deeply",
        f'[{good}, {{"positive": "a", "positive": "b"}}]': 'the key "positive" twice',
    }
    for content, message in wrong.items():
        path.write_text(content)
        with pytest.raises(PairsError) as error:
            load_pairs(path)
        assert str(path) in str(error.value)
        assert message in str(error.value)


ASK, YES, NO = (
    {"role": role, "content": content}
    for role, content in (("user", "may i ?"), ("assistant", "yes"), ("assistant", "no"))
)


@pytest.mark.parametrize(
    ("row", "sides", "targets"),
    [
        (
            {"prompt": "may i ? ", "chosen": "yes", "rejected": "no"},
            ("may i ? yes", "may i ? no"),
            ("yes", "no"),
        ),
        (
            {"chosen": "may i ? yes", "rejected": "may i ? yet"},
            ("may i ? yes", "may i ? yet"),
            ("yes", "yet"),
        ),
        ({"chosen": "yes", "rejected": "no"}, ("yes", "no"), ("yes", "no")),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, ([ASK, YES], [ASK, NO]), (None, None)),
        ({"prompt": [ASK], "chosen": "yes", "rejected": "no"}, ([ASK, YES], [ASK, NO]), (None, None)),
        ({"prompt": "may i ?", "chosen": [YES], "rejected": [NO]}, ([ASK, YES], [ASK, NO]), (None, None)),
        ({"prompt": "may i ?", "chosen": [YES], "rejected": "no"}, ([ASK, YES], [ASK, NO]), (None, None)),
        (
            {"prompt": "may i ?\n", "chosen": [ASK, YES], "rejected": [ASK, NO]},
            ([ASK, YES], [ASK, NO]),
            (None, None),
        ),
        (
            {"prompt": [ASK, YES], "chosen": [ASK, YES], "rejected": [ASK, NO]},
            ([ASK, YES, ASK, YES], [ASK, YES, ASK, NO]),
            (None, None),
        ),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, ([ASK, YES], [ASK, NO]), (None, None)),
        (
            {"prompt": None, "chosen": [ASK, YES], "rejected": [ASK, NO]},
            ([ASK, YES], [ASK, NO]),
            (None, None),
        ),
        (
            {"prompt": "may i ?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
            ([ASK, YES], [ASK, NO]),
            (None, None),
        ),
    ],
)
def test_preferences_are_pairs_whose_answers_are_compared(
    tmp_path: Path, row: dict[str, object], sides: object, targets: object
) -> None:
    given = {**row, "id": 7, "group": "g"}
    for pairs in (load_pairs([given]), load_pairs(write(tmp_path / "dpo.jsonl", given))):
        (pair,) = pairs
        assert (pair.positive, pair.negative) == sides
        assert (pair.positive_target, pair.negative_target) == targets
        assert (pair.id, pair.group) == ("7", "g")
    (tmp_path / "dpo.csv").write_text("prompt,chosen,rejected\nmay i ? ,yes,no\n,may i ? yes,may i ? no\n")
    table = load_pairs(tmp_path / "dpo.csv")
    assert [(pair.positive, pair.positive_target) for pair in table] == [("may i ? yes", "yes")] * 2


BINARIZED = {
    "prompt": "may i ?",
    "prompt_id": "0a1b",
    "chosen": [ASK, YES],
    "rejected": [ASK, NO],
    "messages": [ASK, YES],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
ORCA = {
    "system": "",
    "prompt": "may i ?",
    "chosen": "yes",
    "rejected": "no",
    "status": "tie",
    "system_prompt": None,
}


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        (BINARIZED, "messages, prompt_id, score_chosen, score_rejected"),
        (
            {k: v for k, v in BINARIZED.items() if k != "prompt"},
            "messages, prompt_id, score_chosen, score_rej",
        ),
        (ORCA, "status, system"),
    ],
)
def test_columns_of_preferences_that_are_not_read_are_named_once(
    tmp_path: Path, row: dict[str, object], unread: str
) -> None:
    plain = {key: value for key, value in row.items() if key in ("prompt", "chosen", "rejected")}
    lines, array_ = write(tmp_path / "dpo.jsonl", row, row), tmp_path / "dpo.json"
    array_.write_text(json.dumps([row, row]))
    for source in (lines, array_, [row, row], (each for each in (row, row))):
        name = source if isinstance(source, Path) else "pairs"
        with pytest.warns(UserWarning, match=f"^{name}: not read of its columns: {unread}") as said:
            pairs = load_pairs(source)
        assert pairs.sha256 == load_pairs([plain] * 2).sha256
        assert len(said) == 1


def test_a_chat_shows_where_its_sides_differ() -> None:
    pairs = load_pairs([([ASK, YES], [ASK, NO])] * 25)
    assert pairs[0].in_words().endswith(f"[{YES}] / [{NO}]")
    ((_, rows),) = pairs.as_tables()
    assert (len(rows), rows[-1]) == (21, ("… 5 more", "", "", ""))
    with pytest.raises(PairsError, match=r'"chosen" is missing, and there is "choosen"; a pair has both'):
        load_pairs([{"prompt": "a", "choosen": "b", "rejected": "c"}])


def test_answers_as_messages_do_not_hold_a_question_that_stands_beside_them() -> None:
    answers = {"chosen": [YES], "rejected": [NO]}
    for beside in ({"question": "may i ?"}, {"messages": [ASK], "prompt": None}):
        with pytest.raises(PairsError, match="says what the model is asked"):
            load_pairs([{**beside, **answers}])
    whole = {"chosen": [ASK, YES], "rejected": [ASK, NO]}
    with pytest.warns(UserWarning, match="question"):
        assert load_pairs([{"question": "may i ?", **whole}])[0].positive == [ASK, YES]


@pytest.mark.parametrize("nothing", [None, "", [], float("nan"), np.array([]), False])
def test_columns_with_nothing_in_them_ask_nothing(nothing: object) -> None:
    row = {"prompt": "may i ? ", "chosen": "yes", "rejected": "no", "system": nothing}
    assert load_pairs([row])[0].positive == "may i ? yes"


def test_columns_of_a_table_that_are_not_read_are_named_and_the_question_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dpo.csv").write_text("source,prompt,chosen,rejected,system\nx,may i ? ,yes,no,\n")
    with pytest.warns(UserWarning, match=r"dpo\.csv: not read of its columns: source$"):
        assert load_pairs(tmp_path / "dpo.csv")[0].positive == "may i ? yes"
    (tmp_path / "dpo.csv").write_text("question,chosen,rejected\nmay i ?,yes,no\n")
    with pytest.raises(PairsError, match=r'dpo\.csv:2: "question" says what the model is asked'):
        load_pairs(tmp_path / "dpo.csv")


@pytest.mark.parametrize("source", ["a\0b", "", 5, None, True])
def test_what_is_no_source_of_pairs_is_refused(source: object) -> None:
    with pytest.raises(PairsError, match=r"is no name of a file|where rows are expected"):
        load_pairs(source)  # type: ignore[arg-type]


def test_a_dataset_gives_rows() -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO], "group": None},
        {"prompt": [{**ASK, "name": "ann"}], "chosen": [YES], "rejected": [NO], "group": "g"},
    ]
    data = datasets.Dataset.from_list(rows)
    with pytest.raises(PairsError, match=r'pair 2: "prompt", message 1: unknown key "name"'):
        load_pairs(data)
    pairs = load_pairs(data.select([0]))  # where the table has nulls for "name" and "group"
    assert (pairs[0].positive, pairs[0].group) == ([ASK, YES], None)
    assert load_pairs(data.select([0]).to_iterable_dataset()).sha256 == pairs.sha256
    scored = datasets.Dataset.from_list([{**rows[0], "score_chosen": 1.0, "system": ""}])
    for given in (scored, scored.to_iterable_dataset()):
        with pytest.warns(UserWarning, match=r"pairs: not read of its columns: score_chosen, system$"):
            assert load_pairs(given).sha256 == pairs.sha256
    with pytest.raises(PairsError, match='"system" says what the model is asked'):
        load_pairs(datasets.Dataset.from_list([{**rows[0], "system": "be kind"}]))
    with pytest.raises(PairsError, match=r"DatasetDict with train; right is .* one part of data"):
        load_pairs(datasets.DatasetDict(train=data))


def test_personas_and_suffixes() -> None:
    template = "Act as a {persona} person, {who}."
    pairs = persona_pairs(template, ["kind", "good"], ["cruel", "bad"], ["I think", "People"])
    assert len(pairs) == 4
    assert pairs[1].positive == [
        {"role": "user", "content": "Act as a kind person, {who}."},
        {"role": "assistant", "content": "People"},
    ]
    assert pairs[1].negative[0]["content"] == "Act as a cruel person, {who}."
    assert [pair.cluster for pair in pairs] == ["I think", "People"] * 2
    assert persona_pairs(template, "kind", "cruel")[0].negative == [
        {"role": "user", "content": "Act as a cruel person, {who}."}
    ]
    (text,) = persona_pairs("Be {persona}:", "kind", "cruel", "I", chat=False)
    assert (text.positive, text.negative) == ("Be kind: I", "Be cruel: I")
    for wrong, why in (
        (("Be kind", "a", "b"), "no place for the persona"),
        (("Be {persona}", ["a", "b"], "c"), "2 positive personas and 1 negative"),
        (("Be {persona}", "a", "a"), "a and a: both sides are the same"),
    ):
        with pytest.raises(PairsError, match=why):
            persona_pairs(*wrong)


def test_targets_ids_and_groups_are_read(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "1 2"}]
    other = [chat[0], {"role": "assistant", "content": "x y"}]
    path = write(
        tmp_path / "pairs.jsonl",
        {
            "positive": chat,
            "negative": other,
            "positive_target": "1",
            "negative_target": "y",
            "id": 7,
            "group": 3,
        },
        {"positive": "p", "negative": "n", "positive_target": None, "id": None, "group": None},
    )
    first, second = load_pairs(path)
    assert first == ContrastPair(chat, other, "1", "y", id="7", group="3", where=f"{path}:1")
    assert second == ContrastPair("p", "n", where=f"{path}:2")
    steermoe = {"messages_0": chat, "messages_1": other, "messages_0_target": "1", "messages_1_target": "y"}
    (same,) = load_pairs([steermoe])
    assert (same.positive, same.negative, same.positive_target, same.negative_target) == (
        chat,
        other,
        "1",
        "y",
    )


def test_csv_cells_may_be_empty_where_optional_and_run_over_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(
        'negative,positive,group,id\n"no\nthanks",yes,,\nc,"a, ""b""",doc,x\n', encoding="utf-8-sig"
    )
    first, second = load_pairs(path)
    assert (first.positive, first.negative, first.group, first.id) == ("yes", "no\nthanks", None, "")
    assert (second.positive, second.negative, second.group, second.id) == ('a, "b"', "c", "doc", "x")
    assert (first.where, second.where) == (f"{path}:2", f"{path}:4")


def test_byte_order_mark_line_ends_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = '{"positive": "a\u2028b", "negative": "c"}\r\n\r\n{"positive": "d", "negative": "e"}'
    path.write_bytes(rows.encode("utf-8-sig"))
    pairs = load_pairs(path)
    assert [(pair.positive, pair.where) for pair in pairs] == [("a\u2028b", f"{path}:1"), ("d", f"{path}:3")]


WRONG_ROWS = {
    "an unknown key": ('{"positive": "a", "negative": "b", "label": 1}', ':1: unknown key "label"'),
    "keys of two forms": (
        '{"positive": "a", "negative": "b", "messages_0": "c"}',
        'unknown key "messages_0"',
    ),
    "one side only": ('{"positive": "a"}', '"negative" is missing'),
    "the other side only": ('{"messages_1": "a"}', '"messages_0" is missing'),
    "no side": ('{"text": "a"}', "neither side"),
    "a list of texts": ('["a", "b", "c"]', ":1, row 1: a text where a pair is expected"),
    "three sides": ('[["a", "b", "c"]]', ":1, row 1: a list where a pair is expected"),
    "no chosen": ('{"prompt": "a", "rejected": "b"}', '"chosen" is missing'),
    "a key of another form among preferences": (
        '{"prompt": "a", "chosen": "b", "rejected": "c", "positive_target": "b"}',
        ':1: unknown key "positive_target"; right are chosen, rejected, prompt, id, group',
    ),
    "a system column of preferences": (
        '{"prompt": "a", "chosen": "b", "rejected": "c", "system": "be kind"}',
        ':1: "system" says what the model is asked, and would not be read; right is "prompt", as',
    ),
    "a question in place of the prompt": (
        '{"system": "", "question": "a", "chosen": "b", "rejected": "c"}',
        ':1: "question" says what the model is asked',
    ),
    "pictures beside the prompt": (
        '{"prompt": "a", "chosen": "b", "rejected": "c", "images": ["cat.png"]}',
        ':1: "images" says what the model is asked',
    ),
    "a number chosen": ('{"prompt": "a", "chosen": 3, "rejected": "c"}', '"chosen" is a number'),
    "an empty prompt": ('{"prompt": " ", "chosen": "b", "rejected": "c"}', '"prompt" is empty'),
    "a chat without an answer": (
        '{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}',
        '"chosen" ends with a message of the role user; right is an answer of the assistant',
    ),
    "one the beginning of the other": (
        '{"chosen": "question ? ", "rejected": "question ? yes"}',
        '"chosen" is only the beginning of the other, so it has no answer',
    ),
    "another prompt in an answer": (
        '{"prompt": "q", "chosen": [{"role": "user", "content": "p"}, '
        '{"role": "assistant", "content": "y"}], "rejected": "n"}',
        '"chosen" begins with a message of the role user that is not the "prompt"',
    ),
    "a system text after the prompt": (
        '{"prompt": "q", "chosen": "y", "rejected": [{"role": "system", "content": "s"}, '
        '{"role": "user", "content": "q"}, {"role": "assistant", "content": "n"}]}',
        '"rejected" begins with a message of the role system',
    ),
    "a chat and a text": (
        '{"positive": [{"role": "user", "content": "a"}], "negative": "b"}',
        ":1: one side is a text and the other a chat",
    ),
    "a chat and a text of preferences": (
        '{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "y"}], '
        '"rejected": "b"}',
        ":1: one side is a text and the other a chat",
    ),
    "a text and a chat in lists": (
        '{"pos": ["a"], "neg": [[{"role": "user", "content": "a"}]]}',
        "item 1: one side is a text and the other a chat",
    ),
    "the same answers": ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "both sides are the same"),
    "an empty side": ('{"positive": "a", "negative": " "}', '"negative" is empty'),
    "no messages": ('{"positive": [], "negative": "b"}', '"positive" has no messages'),
    "a number": ('{"positive": 1, "negative": "b"}', '"positive" is a number'),
    "null": ('{"positive": null, "negative": "b"}', '"positive" is null'),
    "a message that is a text": ('{"positive": ["a"], "negative": "b"}', "message 1 is a text"),
    "a wrong role": (
        '{"positive": [{"role": "bot", "content": "a"}], "negative": "b"}',
        "message 1: the role 'bot' is unknown; right are system, developer, user, assistant, tool",
    ),
    "content that is a list": (
        '{"positive": [{"role": "user", "content": [{"type": "text"}]}], "negative": "b"}',
        'message 1: "content" is a list',
    ),
    "empty content": (
        '{"positive": [{"role": "user", "content": ""}], "negative": "b"}',
        '"content" is empty',
    ),
    "no content": ('{"positive": [{"role": "user"}], "negative": "b"}', '"content" is missing'),
    "more in a message": (
        '{"positive": [{"role": "user", "content": "a", "name": "x"}], "negative": "b"}',
        'message 1: unknown key "name"',
    ),
    "an empty target": (
        '{"positive": "a", "negative": "b", "positive_target": ""}',
        '"positive_target" is empty',
    ),
    "a target that is no text": ('{"positive": "a", "negative": "b", "negative_target": 3}', "is a number"),
    "an empty group": ('{"positive": "a", "negative": "b", "group": ""}', '"group" is empty'),
    "a group that is true": ('{"positive": "a", "negative": "b", "group": true}', '"group" is true or false'),
    "an id that is a list": ('{"positive": "a", "negative": "b", "id": []}', '"id" is a list'),
    "two equal sides": ('{"positive": "a", "negative": "a"}', "both sides are the same"),
    "bad JSON": ('{"positive": "a", "negative": "b"', "1: not JSON (Expecting"),
    "a key twice": ('{"positive": "a", "positive": "c", "negative": "b"}', 'the key "positive" twice'),
    "half a character": ('{"positive": "a\\ud800", "negative": "b"}', "lone surrogate"),
    "a number too long": ('{"positive": "a", "negative": "b", "id": ' + "9" * 5000 + "}", "1: not JSON"),
    "nesting too deep": ("[" * 100_000, "nested too deeply"),
    "lists of two lengths": ('{"pos": ["a", "b"], "neg": ["c"]}', '"pos" has 2 items and "neg" 1'),
    "a text for a list": ('{"pos": "a", "neg": "c"}', '"pos" is a text'),
    "one chat for a list": (
        '{"pos": [{"role": "user", "content": "a"}], "neg": ["c"]}',
        "holds messages directly",
    ),
    "a target beside lists": ('{"pos": ["a"], "neg": ["c"], "positive_target": "a"}', "unknown key"),
    "empty lists": ('{"pos": [], "neg": []}', "no pairs in it"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_wrong_row_is_an_error_that_names_file_and_fault(tmp_path: Path, name: str) -> None:
    line, message = WRONG_ROWS[name]
    path = tmp_path / "pairs.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(PairsError) as error:
        load_pairs(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_line_of_the_fault_is_named(tmp_path: Path) -> None:
    good = '{"positive": "a", "negative": "b", "id": "x"}'
    path = tmp_path / "pairs.jsonl"
    for bad, message in {
        "{oops": ":3: not JSON",
        '{"positive": "c", "negative": "d", "id": "x"}': f'the id "x" was already given at {path}:1',
        '{"messages_0": "c", "messages_1": "d"}': f'after rows with "positive" (from {path}:1)',
        "[1": ":3: not JSON",
    }.items():
        path.write_text(f"{good}\n\n{bad}\n")
        with pytest.raises(PairsError) as error:
            load_pairs(path)
        assert f"{path}:3" in str(error.value)
        assert message in str(error.value)


def test_one_object_over_many_lines_names_the_line_of_its_fault(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text('{\n  "pos": ["a"],\n  "neg": ["b",]\n}\n')
    with pytest.raises(PairsError, match=r"pairs\.json:3: not JSON"):
        load_pairs(path)


WRONG_CSV = {
    "": "the file is empty",
    "positive,negative\n": "no pairs in it",
    "positive\na\n": ':1: the column "negative" is missing',
    "positive,negative,label\na,b,1\n": ':1: unknown column "label"',
    "positive,negative,positive\na,b,c\n": ':1: the column "positive" twice',
    "positive,negative\na,b\na\n": ":3: 1 cells under 2 columns",
    "positive,negative\na,b,c\n": ":2: 3 cells under 2 columns",
    'positive,negative\na,"b\n': "not CSV",
    "positive,negative\na,\n": ':2: "negative" is empty',
    'positive,negative\n"[{""role"": ""user""}]",b\n': ':2: "positive" holds chat messages',
}


@pytest.mark.parametrize("content", WRONG_CSV)
def test_wrong_csv(tmp_path: Path, content: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(content)
    with pytest.raises(PairsError) as error:
        load_pairs(path)
    assert str(error.value).startswith(str(path))
    assert WRONG_CSV[content] in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match=r"absent\.jsonl: no such file"):
        load_pairs(tmp_path / "absent.jsonl")
    with pytest.raises(PairsError, match="is a folder; pairs are a file or lab:NAME"):
        load_pairs(tmp_path)
    for content, message in {
        b"": "is empty",
        b" \n\n": "is empty",
        b'{"positive": "caf\xe9"}': "not UTF-8 \\(byte 17",
    }.items():
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(content)
        with pytest.raises(PairsError, match=message):
            load_pairs(path)
    path.write_bytes('{"positive": "a", "negative": "b"}'.encode("utf-16"))
    with pytest.raises(PairsError, match="not UTF-8"):
        load_pairs(path)


def test_rows_in_python_name_the_pair() -> None:
    with pytest.raises(PairsError, match='pair 2: "negative" is missing'):
        load_pairs([{"positive": "a", "negative": "b"}, {"positive": "c"}])
    with pytest.raises(PairsError, match="no pairs"):
        load_pairs([])
    with pytest.raises(PairsError, match="a text where a pair is expected"):
        load_pairs(["positive"])  # type: ignore[list-item]
    with pytest.raises(PairsError, match='"negative" is empty'):
        ContrastPair("a", "")


def test_the_hash_is_of_what_the_pairs_say() -> None:
    rows = [{"positive": "a", "negative": "b"}, {"positive": "c", "negative": "d", "group": "g"}]
    sides = ("positive", "negative")
    pairs = load_pairs(rows)
    assert pairs.sha256 == load_pairs([{**row, "id": str(n)} for n, row in enumerate(rows)]).sha256
    changed = [
        [rows[0]],
        rows[::-1],
        [rows[0], {**rows[1], "group": "h"}],
        [rows[0], {**rows[1], "positive_target": "c"}],
        [rows[0], {**rows[1], "negative": "e"}],
        [rows[0], {**rows[1], **{side: [{"role": "user", "content": rows[1][side]}] for side in sides}}],
    ]
    hashes = {load_pairs(other).sha256 for other in changed}
    assert len(hashes) == len(changed)
    assert pairs.sha256 not in hashes


def test_a_cluster_is_the_group_or_the_pair_itself() -> None:
    pairs = load_pairs(
        [
            {"positive": "a", "negative": "b", "group": "g"},
            {"positive": "c", "negative": "d", "group": "g"},
            {"positive": "c", "negative": "d"},
            {"positive": "c", "negative": "d", "id": "again"},
            {"positive": "c", "negative": "d", "negative_target": "d"},
        ]
    )
    clusters = [pair.cluster for pair in pairs]
    assert clusters[0] == clusters[1] == "g"
    assert clusters[2] == clusters[3]
    assert len(set(clusters)) == 3


def test_slices_are_pairs_again() -> None:
    pairs = load_pairs([{"positive": f"a{n}", "negative": "b"} for n in range(5)])
    assert isinstance(pairs[1:3], ContrastPairs)
    assert [pair.positive for pair in pairs[1:3]] == ["a1", "a2"]
    assert load_pairs(pairs) is pairs


# Files that stay files --------------------------------------------------------------------------------------


def lines(path: Path, number: int) -> Path:
    """Blank lines, a byte order mark, letters of several bytes, a lone U+2028."""
    rows = [
        json.dumps(
            {"positive": f"é {n}\u2028", "negative": f"日本 {n}", "group": f"g{n % 3}", "id": n},
            ensure_ascii=False,
        )
        for n in range(number)
    ]
    path.write_bytes(("\n\n" + "\r\n  \n".join(rows)).encode("utf-8-sig"))
    return path


def test_pairs_of_a_file_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    pairs = load_pairs(lines(tmp_path / "pairs.jsonl", 20))
    kept = ContrastPairs(list(pairs), name=pairs.name)
    assert list(pairs) == list(kept)
    assert [pairs[n] for n in (0, 7, -1)] == [kept[n] for n in (0, 7, -1)]
    assert list(pairs[3:17:4]) == list(kept[3:17:4])
    assert (len(pairs), pairs.sha256, pairs[5].where) == (20, kept.sha256, f"{pairs.name}:13")
    for wrong in (20, -21):
        with pytest.raises(IndexError):
            pairs[wrong]


def test_a_file_that_is_no_longer_what_it_was_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "pairs.jsonl", 20)
    pairs = load_pairs(path)
    lines(path, 21)
    for use in (lambda: pairs[0], lambda: list(pairs), lambda: pairs.sha256):
        with pytest.raises(PairsError, match="was changed since it was first read"):
            use()
    path.unlink()
    with pytest.raises(PairsError, match="no such file"):
        pairs[0]


def test_memory_does_not_grow_with_the_length_of_a_files_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = json.dumps({"positive": "a " * 5000, "negative": "b " * 5000}) + "\n"
    path.write_text(row * 300)
    tracemalloc.start()
    pairs = load_pairs(path)
    assert sum(len(pair.positive) for pair in pairs) == 300 * 10_000
    assert tracemalloc.get_traced_memory()[1] < 10 * len(row)
    tracemalloc.stop()
