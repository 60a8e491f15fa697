"""Rows of two models: against tokens spelled out by hand, for tokenizers of every kind and chat templates."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from steersman import ModelError, PairsError
from steersman.concepts.alignment import Aligned, Reader, align
from steersman.pairs import Content
from steersman.rendering import TruncatedTarget

CORPUS = [
    "The town is old, and the river beside it is long.",
    "a teacher wrote the book; who knows it? grün äöü 東京 🙂",
    "Where does Alma live ? in the north .",
]
ROUND = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SQUARE = (
    "<s>{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def wrapped(backend: Tokenizer, template: str, **options: Any) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **options)
    fast.add_special_tokens({"additional_special_tokens": [s for s in SPECIAL if s != "<unk>"]})
    fast.chat_template = template
    return fast


@functools.cache
def byte_level(size: int = 300) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=alphabet, special_tokens=SPECIAL
    )
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend, ROUND)


@functools.cache
def sentencepiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, show_progress=False, special_tokens=SPECIAL, unk_token="<unk>"
    )
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend, SQUARE)


@functools.cache
def words(template: str = ROUND) -> PreTrainedTokenizerFast:
    known = sorted({word for text in CORPUS for word in re.findall(r"\w+|[^\w\s]+", text.lower())})
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate([*SPECIAL, *known])}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrapped(backend, template)


def aligned(
    one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, content: Content, rows: Any = "boundaries"
) -> Aligned:
    return align(Reader(one)(content, "here"), Reader(other)(content, "here"), rows)


def pieces(tokenizer: PreTrainedTokenizerFast, ids: Any, rows: Any) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(int(ids[row]))) for row in rows]


CHAT = [
    {"role": "system", "content": "in the north"},
    {"role": "user", "content": "who wrote the book"},
    {"role": "assistant", "content": "a teacher"},
]


def test_a_chat_of_two_templates() -> None:
    round_, square = words(ROUND), words(SQUARE)
    found = aligned(round_, square, CHAT)
    # <|system|> in the north <|end|> <|user|> who wrote the book <|end|> <|assistant|> a teacher <|end|>
    assert found.source_rows.tolist() == list(range(1, 15))
    # <s> [ system ] in the north </s> [ user ] …: the last token before a content is "]", unknown here.
    source, target = (
        pieces(round_, found.source, found.source_rows),
        pieces(square, found.target, found.target_rows),
    )
    assert list(zip(source, target, strict=True)) == [
        ("in", "in"), ("the", "the"), ("north", "north"), ("<|end|>", "</s>"),
        ("<|user|>", "<unk>"), ("who", "who"), ("wrote", "wrote"), ("the", "the"), ("book", "book"),
        ("<|end|>", "</s>"), ("<|assistant|>", "<unk>"), ("a", "a"), ("teacher", "teacher"),
        ("<|end|>", "</s>"),
    ]  # fmt: skip
    # Answers begin to be written at the last token before the answer.
    assert found.scope == found.target_rows[source.index("<|assistant|>")]


def test_a_prompt_ends_with_the_generation_prompt() -> None:
    found = aligned(words(ROUND), words(SQUARE), CHAT[:2])
    assert found.source_rows[-1] == len(found.source) - 1
    assert found.target_rows[-1] == len(found.target) - 1
    assert found.scope == 0


def test_several_tokens_of_one_character_are_its_last() -> None:
    """A byte-level tokenizer without merges needs four tokens for the smile, which all end there."""
    plain, merged = byte_level(263), byte_level(330)
    text = "it 🙂 is"
    found = aligned(plain, merged, text)
    read = Reader(plain)(text, "here")
    assert read.places[("text", 0, 4)] == 6  # i t Ġ and four bytes
    assert found.source_rows.tolist()[-1] == len(read.ids) - 1
    assert 6 in found.source_rows


def test_first_and_special_and_unknown_tokens_are_left_out() -> None:
    found = aligned(words(), words(), "the river <|user|> is nowhere long")
    assert found.source_rows.tolist() == [1, 3, 5]  # not: the (first), <|user|> (special), nowhere (unknown)


def test_the_papers_rows_are_last_tokens() -> None:
    for content in ("the river is long", CHAT, CHAT[:2]):
        found = aligned(byte_level(), sentencepiece(), content, "last")
        assert found.source_rows.tolist() == [len(found.source) - 1]
        assert found.target_rows.tolist() == [len(found.target) - 1]


TEXTS = (
    st.lists(
        st.sampled_from(["the", "town", " ", "  ", "river", "ä", "東京", "🙂", ".", "\n", "x", "teacher"]),
        min_size=2,
        max_size=12,
    )
    .map("".join)
    .filter(str.strip)
)


@settings(max_examples=60)
@given(TEXTS, st.sampled_from(["bs", "bw", "sw", "bb"]))
def test_rows_have_read_the_same_part_of_the_text(text: str, kinds: str) -> None:
    """What a row's token and all before it stand for ends at one character in both, by the offsets."""
    makers = {"b": byte_level, "s": sentencepiece, "w": words}
    one, other = (makers[kind]() for kind in kinds)
    if kinds == "bb":
        other = byte_level(330)
    found = aligned(one, other, text)
    spans = [tokenizer(text, return_offsets_mapping=True)["offset_mapping"] for tokenizer in (one, other)]
    ends = [
        [side[row][1] for row in rows]
        for side, rows in zip(spans, (found.source_rows, found.target_rows), strict=True)
    ]
    assert ends[0] == ends[1] == sorted(set(ends[0]))
    for side, rows in zip(spans, (found.source_rows, found.target_rows), strict=True):
        for row, end in zip(rows.tolist(), ends[0], strict=True):
            assert row > 0
            assert side[row][0] < side[row][1]
            assert all(later[1] != end for later in side[row + 1 :] if later[0] < later[1])
    both = {end for _, end in spans[0][1:]} & {end for _, end in spans[1][1:]}
    if kinds == "bb":  # no unknown words there
        assert len(found.source_rows) >= len(both) - 1


@settings(max_examples=25)
@given(TEXTS.map(str.strip).filter(str.isascii), TEXTS.map(str.strip).filter(str.isascii))
def test_chats_are_aligned_within_each_message(question: str, answer: str) -> None:
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    one, other = byte_level(), sentencepiece()
    found = aligned(one, other, chat)
    pairs = list(zip(found.source_rows.tolist(), found.target_rows.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert len(pairs) >= 3  # the answer's beginning and both ends of turns
    # A model beside itself shares every token but the first.
    same = aligned(one, one, chat)
    assert same.source_rows.tolist() == same.target_rows.tolist() == list(range(1, len(same.source)))


def test_what_cannot_be_read_is_said() -> None:
    with pytest.raises(ModelError, match="gives no character offsets"):
        Reader(ByT5Tokenizer())
    with pytest.raises(TruncatedTarget, match="here: 4 tokens, but the model reads at most 3"):
        Reader(words(), 3)("the river is long", "here")
    with pytest.raises(ModelError, match=r"token id \d+ is beyond the model's 5 embeddings"):
        Reader(words(), None, 5)("the river is long", "here")
    with pytest.raises(PairsError, match="here: no tokens in it"):
        Reader(words())("\n", "here")
    bare = words()
    template, bare.chat_template = bare.chat_template, None
    try:
        with pytest.raises(ModelError, match="no chat template"):
            Reader(bare)(CHAT, "here")
    finally:
        bare.chat_template = template
