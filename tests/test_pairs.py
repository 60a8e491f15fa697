"""Contrast pairs: every form that is read, every way to get one wrong, target tokens against slow loops."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from steersman.errors import ModelError, PairsError
from steersman.pairs import ContrastPair, ContrastPairs, TruncatedTarget, encode, load_pairs, render

SENTENCES = [
    "count to ten , please . how are you today ? the weather is fine .",
    "one two three four five six seven eight nine ten",
    "the café in málaga was naïve about 😀 and 日本 , i cannot help with that .",
]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _fast(backend: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **tokens
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def _with_bos(backend: Tokenizer) -> Tokenizer:
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return backend


def byte_level(trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>"],
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return _fast(backend)


def metaspace_unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        show_progress=False,
        unk_token="<unk>",
        special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return _fast(_with_bos(backend), unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As the Llama and Mistral families': a prefix space, and bytes for characters outside the vocabulary."""
    vocabulary = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", "<pad>"])}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz,.?"]:
        vocabulary[token] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _fast(_with_bos(backend), unk_token="<unk>")


def word_level() -> PreTrainedTokenizerFast:
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = {word: n for n, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _fast(_with_bos(backend), unk_token="<unk>")


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level, trimmed": byte_level(trim_offsets=True),
    "metaspace": metaspace_unigram(),
    "byte-fallback": byte_fallback(),
    "word-level": word_level(),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


def words_of(tokenizer: PreTrainedTokenizerFast, text: str, target: str | None = None) -> str:
    """The target's tokens as text again, so that a test can be read."""
    encoded = encode(tokenizer, text, target, where="test")
    return tokenizer.decode([encoded.ids[position] for position in encoded.target]).strip()


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


def test_targets_ids_and_groups_are_read(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "1 2"}]
    path = write(
        tmp_path / "pairs.jsonl",
        {
            "positive": chat,
            "negative": "x y",
            "positive_target": "1",
            "negative_target": "y",
            "id": 7,
            "group": 3,
        },
        {"positive": "p", "negative": "n", "positive_target": None, "id": None, "group": None},
    )
    first, second = load_pairs(path)
    assert first == ContrastPair(chat, "x y", "1", "y", id="7", group="3", where=f"{path}:1")
    assert second == ContrastPair("p", "n", where=f"{path}:2")
    steermoe = {"messages_0": chat, "messages_1": "x y", "messages_0_target": "1", "messages_1_target": "y"}
    (same,) = load_pairs([steermoe])
    assert (same.positive, same.negative, same.positive_target, same.negative_target) == (
        chat,
        "x y",
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
    "a list": ('[{"positive": "a", "negative": "b"}]', "a list where a pair is expected"),
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
    pairs = load_pairs(rows)
    assert pairs.sha256 == load_pairs([{**row, "id": str(n)} for n, row in enumerate(rows)]).sha256
    changed = [
        [rows[0]],
        rows[::-1],
        [rows[0], {**rows[1], "group": "h"}],
        [rows[0], {**rows[1], "positive_target": "c"}],
        [rows[0], {**rows[1], "negative": "e"}],
        [rows[0], {**rows[1], "positive": [{"role": "user", "content": "c"}]}],
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


# -------------------------------------------------------------------------------------- rendering and targets


def test_a_chat_is_rendered_once_with_its_own_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "count to ten"}, {"role": "assistant", "content": "one two"}]
    text, add_special = render(tokenizer, chat)
    assert (text, add_special) == ("<s><|user|>\ncount to ten</s>\n<|assistant|>\none two</s>\n", False)
    encoded = encode(tokenizer, chat, None, where="test")
    assert encoded.text == text
    assert encoded.ids.count(tokenizer.bos_token_id) == 1
    assert encoded.ids == tuple(tokenizer.apply_chat_template(chat)["input_ids"])
    assert tokenizer.decode([encoded.ids[n] for n in encoded.target]).strip() == "one two"


def test_a_chat_that_ends_with_the_user_gets_the_generation_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    chat = [{"role": "system", "content": "how are you"}, {"role": "user", "content": "count to ten"}]
    encoded = encode(tokenizer, chat, None, where="test")
    assert encoded.text.endswith("<|user|>\ncount to ten</s>\n<|assistant|>\n")
    assert tokenizer.decode([encoded.ids[n] for n in encoded.target]).strip() == "count to ten"


def test_a_text_gets_the_tokenizers_own_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(tokenizer, "count to ten", None, where="test")
    assert encoded.ids == tuple(tokenizer("count to ten")["input_ids"])
    own = sum(id_ not in tokenizer.all_special_ids for id_ in encoded.ids)
    assert len(encoded.target) == own > 0


def test_the_target_is_the_last_occurrence(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "one two three one two three"
    encoded = encode(tokenizer, text, "two", where="test")
    assert words_of(tokenizer, text, "two") == "two"
    earlier = encode(tokenizer, "one two three", "two", where="test")
    assert min(encoded.target) > max(earlier.target)


@pytest.mark.parametrize("answer", ["a", "assistant", "user", "s", "  one two  ", "<|assistant|> one", "|"])
def test_a_short_answer_is_not_taken_for_part_of_the_template(answer: str) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    for role, before in (
        ("assistant", "<s><|user|>\nwhy a user ?</s>\n<|assistant|>\n"),
        ("user", "<s><|user|>\n"),
    ):
        chat = [{"role": role, "content": answer}]
        if role == "assistant":
            chat.insert(0, {"role": "user", "content": "why a user ?"})
        encoded = encode(tokenizer, chat, None, where="test")
        spans = tokenizer(encoded.text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        found = [spans[position] for position in encoded.target]
        start, end = len(before), len(before) + len(answer.strip())
        assert all(first < end and last > start for first, last in found)
        assert found[-1][1] >= end


def test_a_template_that_changes_the_message_asks_for_a_target() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    chat = [{"role": "user", "content": "count"}]
    with pytest.raises(PairsError, match=r"file:3: the chat template changes the message .*; name a target"):
        encode(tokenizer, chat, None, where="file:3")
    assert encode(tokenizer, chat, "COUNT", where="file:3").target


def test_messages_without_user_or_assistant_are_compared_whole() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    encoded = encode(tokenizer, [{"role": "system", "content": "be kind"}], None, where="test")
    assert tokenizer.decode([encoded.ids[n] for n in encoded.target]) == "\nbe kind\n"


def test_a_character_split_over_tokens_is_in_with_all_of_them() -> None:
    for name in ("byte-level", "byte-level, trimmed", "byte-fallback"):
        tokenizer = TOKENIZERS[name]
        encoded = encode(tokenizer, "fine 🦜 day", "🦜", where="test")
        positions = encoded.target
        assert len(positions) == 4 if name == "byte-fallback" else len(positions) >= 2
        assert positions == tuple(range(positions[0], positions[0] + len(positions)))


def test_special_and_unknown_tokens_are_never_in() -> None:
    tokenizer = TOKENIZERS["word-level"]
    encoded = encode(tokenizer, "one zebra </s> two", "one zebra </s> two", where="test")
    assert [tokenizer.convert_ids_to_tokens(encoded.ids[n]) for n in encoded.target] == ["one", "two"]
    with pytest.raises(PairsError, match='no token covers the target "zebra"'):
        encode(tokenizer, "one zebra", "zebra", where="test")


def test_errors_of_encoding_name_pair_and_side(tokenizer: PreTrainedTokenizerFast) -> None:
    where = "pairs.jsonl:4 (positive)"
    with pytest.raises(
        PairsError, match=r"^pairs\.jsonl:4 \(positive\): the target \"five\" is not in the text"
    ):
        encode(tokenizer, "one two three", "five", where=where)
    with pytest.raises(PairsError, match="without the whitespace at its ends it is"):
        encode(tokenizer, "one two three", "three ", where=where)
    length = len(encode(tokenizer, "one two three", None, where=where).ids)
    assert encode(tokenizer, "one two three", None, where=where, max_length=length)
    with pytest.raises(TruncatedTarget) as error:
        encode(tokenizer, "one two three", None, where=where, max_length=length - 1)
    assert str(error.value) == f"{where}: {length} tokens, but the model reads at most {length - 1}"


def test_what_a_tokenizer_lacks_is_said() -> None:
    plain = byte_level()
    plain.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        encode(plain, [{"role": "user", "content": "hi"}], None, where="test")

    class Slow:
        is_fast = False
        name_or_path = "slow-one"

    with pytest.raises(ModelError, match="slow-one gives no character offsets"):
        encode(Slow(), "hi", None, where="test")  # type: ignore[arg-type]


def test_what_the_template_refuses_is_said() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        PairsError, match=r"^test: the chat template refuses the messages \(roles must alternate\)"
    ):
        encode(tokenizer, [{"role": "user", "content": "hi"}], None, where="test")


def test_truncation_and_padding_of_the_tokenizer_file_do_not_act() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    untouched = encode(TOKENIZERS["byte-level"], "one two three", None, where="test")
    assert encode(tokenizer, "one two three", None, where="test") == untouched


# ------------------------------------------------------------------------- against a slow and obvious version

TEXTS = st.text(alphabet=st.sampled_from("abc one\n ,.é日😀🦜ñ́"), min_size=1, max_size=30).filter(str.strip)


def _bytes_of(token: str) -> bytes:
    """The bytes that a byte-level token stands for: printable ones for themselves, the rest from 256 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(moved)}
    return bytes(table[character] for character in token)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, data=st.data())
def test_byte_level_targets_are_the_tokens_that_hold_their_bytes(text: str, data: st.DataObject) -> None:
    """Without offsets: count bytes along the tokens, and see which characters they belong to."""
    start = data.draw(st.integers(0, len(text) - 1))
    target = text[start : data.draw(st.integers(start + 1, len(text)))]
    if not target.strip():
        return
    tokenizer = TOKENIZERS["byte-level"]
    encoded = encode(tokenizer, text, target, where="test")
    start = text.rindex(target)
    character_of_byte = [n for n, character in enumerate(text) for _ in character.encode()]
    expected, read = [], 0
    for position, token in enumerate(tokenizer.convert_ids_to_tokens(encoded.ids)):
        length = len(_bytes_of(token))
        if any(start <= character_of_byte[byte] < start + len(target) for byte in range(read, read + length)):
            expected.append(position)
        read += length
    assert list(encoded.target) == expected


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), text=TEXTS, data=st.data())
def test_every_overlapping_token_is_in_and_no_other(name: str, text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    target = text[start : data.draw(st.integers(start + 1, len(text)))]
    tokenizer = TOKENIZERS[name]
    batch = tokenizer(text, return_offsets_mapping=True)
    wanted = set(range(text.rindex(target), text.rindex(target) + len(target)))
    expected = [
        position
        for position, (first, last) in enumerate(batch["offset_mapping"])
        if wanted & set(range(first, last)) and batch["input_ids"][position] not in tokenizer.all_special_ids
    ]
    if not expected:
        with pytest.raises(PairsError, match="no token covers the target"):
            encode(tokenizer, text, target, where="test")
        return
    encoded = encode(tokenizer, text, target, where="test")
    assert list(encoded.target) == expected
    assert list(encoded.ids) == batch["input_ids"]


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
