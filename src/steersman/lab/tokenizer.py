"""The lab's tokenizers: one token a word, or two, with character offsets, special tokens and a template."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders
from tokenizers.models import Model, WordLevel, WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from steersman.lab.world import vocabulary

PAD, UNKNOWN, END = "<|pad|>", "<|unk|>", "<|end|>"
_CONTINUED = "##"
ROLE_MARKERS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('system', 'user', 'assistant') -%}"
    "{{ raise_exception('the lab knows the roles system, user and assistant, not ' ~ message['role']) }}"
    "{%- endif -%}"
    "{%- if not loop.first %}{{ ' ' }}{% endif -%}"
    "{{ '<|' ~ message['role'] ~ '|> ' ~ message['content'] ~ ' <|end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ ' <|assistant|>' }}{% endif -%}"
)


def build_tokenizer(tokens: str = "words", words: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer over a world's words, or over their `"pieces"`: the first letter, then the rest.

    It adds no token by itself: decoding gives the text back. The words are the town's if none are given.
    """
    words = vocabulary() if words is None else words
    backend = Tokenizer(_words(words) if tokens == "words" else _pieces(words))
    if tokens == "pieces":
        backend.decoder = decoders.WordPiece(_CONTINUED, cleanup=False)
    # Lower case and split punctuation, so that a user may type "Where does Alma live?".
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(ROLE_MARKERS.values()),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def _words(words: Sequence[str]) -> Model:
    return WordLevel(_numbered(words), unk_token=UNKNOWN)


def _pieces(words: Sequence[str]) -> Model:
    # A first piece is always one letter: so the longest match, by which pieces are cut, is never another.
    pieces = {word[0] for word in words} | {_CONTINUED + word[1:] for word in words if word[1:]}
    return WordPiece(_numbered(sorted(pieces)), unk_token=UNKNOWN, continuing_subword_prefix=_CONTINUED)


def _numbered(entries: Sequence[str]) -> dict[str, int]:
    special = [PAD, UNKNOWN, END, *ROLE_MARKERS.values()]
    return {entry: index for index, entry in enumerate([*special, *entries])}
