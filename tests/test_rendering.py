"""Chats and texts as a model reads them: what is rendered, and target tokens against slow loops."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from steersman.errors import ModelError, PairsError
from steersman.rendering import TruncatedTarget, encode, message_span, render

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


EACH = "{{% for m in messages %}}<|{{{{ m.role }}}}|> {} <|end|>{{% endfor %}} the key"
SURE = "{% if 'key' in m.content %}sure {% endif %}"
PLACED = {
    "more before it": (SURE + "{{ m.content }}", "<|assistant|> sure "),
    "more behind it": ("{{ m.content }} " + SURE, "<|assistant|> "),
    "another length before it": ("{{ m.content | length }} {{ m.content }}", "<|assistant|> 7 "),
    "twice": ("{{ m.content }} {{ m.content }}", "<|assistant|> "),
}


@pytest.mark.parametrize("name", PLACED)
def test_an_answer_is_found_where_the_words_around_it_depend_on_it(name: str) -> None:
    shown, before = PLACED[name]
    tokenizer = byte_level()
    tokenizer.chat_template = EACH.format(shown)
    chat = [{"role": "user", "content": "the tower"}, {"role": "assistant", "content": "the key"}]
    text = render(tokenizer, chat)[0]
    start = text.index(before) + len(before)
    assert message_span(tokenizer, chat, 1, text, "here") == (start, start + len("the key"))
    assert message_span(tokenizer, chat, 0, text, "here")[1] == text.index("the tower") + len("the tower")


def test_an_answer_that_nothing_places_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = EACH.format(SURE + "{{ m.content }} " + SURE)
    chat = [{"role": "user", "content": "the tower"}, {"role": "assistant", "content": "the key"}]
    with pytest.raises(PairsError, match=r"^here: nothing shows where .* \"the key\"; name a target$"):
        encode(tokenizer, chat, None, where="here")
    assert encode(tokenizer, chat, "the key", where="here").target


def test_a_template_that_changes_the_message_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    chat = [{"role": "user", "content": "count"}]
    with pytest.raises(PairsError, match=r"file:3: message 1 .* of the role user, .* changes it"):
        encode(tokenizer, chat, None, where="file:3")
    assert render(tokenizer, [{"role": "user", "content": "COUNT"}]) == ("COUNT", False)


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
        PairsError, match=r"^test: the chat template of .* refuses the messages \(roles must alternate\)"
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
