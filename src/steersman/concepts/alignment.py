"""Rows: the tokens of two models that have read the same part of a text, whatever their tokenizers.

A character position at which both tokenizers end a token is a row; so are the turns of a chat, each in its
own model's template: the last token before a message's content, and the first special token after it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from steersman.chats.format import name_of
from steersman.errors import ModelError, PairsError
from steersman.pairs import Content
from steersman.rendering import TruncatedTarget, message_span, render, special_ids

Rows = Literal["boundaries", "last"]
Ints = np.ndarray[Any, Any]

Place = tuple[str, int, int]
"""What a token ends: ("text", message, characters of its content), ("before", message, 0), ("after", message,
0) or ("last", 0, 0)."""


@dataclass(frozen=True)
class ReadText:
    """A text as one model reads it: its token ids, the token that ends each place, and the token from which
    on it answers (None where it does not).
    """

    ids: tuple[int, ...]
    places: dict[Place, int]
    answer: int | None


@dataclass(frozen=True)
class Aligned:
    """A text as two models read it: token ids, and the positions of its rows in either, int32.

    `scope` is the target's position from which on its norms count: where the final answer begins to be
    written, or 0.
    """

    source: Ints
    target: Ints
    source_rows: Ints
    target_rows: Ints
    scope: int


class Reader:
    """Reads texts as one model does.

    Args:
        tokenizer: Its fast tokenizer.
        max_length: Tokens that it can read; None without a limit.
        embeddings: Tokens that its model knows.

    Raises:
        ModelError: the tokenizer gives no character offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        embeddings: int | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"the tokenizer {name_of(tokenizer)} gives no character "
                "offsets, which rows need; load a fast tokenizer (one with a tokenizer.json)"
            )
        self._tokenizer, self._longest, self._embeddings = tokenizer, max_length, embeddings
        self._special: Collection[int] = frozenset(special_ids(tokenizer))

    def ids(self, content: Content, where: str) -> Ints:
        """Token ids of a text or chat. Raises as reading it does."""
        return np.array(self._encode(content, where)[1], np.int32)

    def _encode(self, content: Content, where: str) -> tuple[str, tuple[int, ...], Sequence[tuple[int, int]]]:
        """What is tokenized, its token ids and their spans."""
        try:
            text, add_special = render(self._tokenizer, content)
        except PairsError as error:
            raise PairsError(f"{where}: {error}") from error.__cause__
        encoding = self._tokenizer(
            text,
            add_special_tokens=add_special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids = tuple(encoding["input_ids"])
        if not ids:
            raise PairsError(f"{where}: no tokens in it")
        if self._embeddings is not None and max(ids) >= self._embeddings:
            raise ModelError(
                f"{where}: token id {max(ids)} is beyond the model's {self._embeddings} embeddings: "
                "the tokenizer is not this model's"
            )
        if self._longest is not None and len(ids) > self._longest:
            raise TruncatedTarget(f"{where}: {len(ids)} tokens, but the model reads at most {self._longest}")
        return text, ids, encoding["offset_mapping"]

    def __call__(self, content: Content, where: str) -> ReadText:
        """Read a text or chat. Raises PairsError where it cannot be rendered or is empty, TruncatedTarget
        where it is too long.
        """
        text, ids, spans = self._encode(content, where)
        tokens = [
            (number, first, last, id_ in self._special)
            for number, (id_, (first, last)) in enumerate(zip(ids, spans, strict=True))
            if first < last
        ]
        places: dict[Place, int] = {("last", 0, 0): len(ids) - 1}
        if isinstance(content, str):
            _end_characters(places, tokens, 0, 0, len(text))
            return ReadText(ids, places, None)
        for message in range(len(content)):
            _end_turn(places, tokens, message, *self._content(content, message, text, where))
        last = len(content) - 1
        if content[last]["role"] == "assistant":
            return ReadText(ids, places, places.get(("before", last, 0), 0))
        if content[last]["role"] in ("user", "tool"):  # the generation prompt, before an answer to come
            places[("before", last + 1, 0)] = len(ids) - 1
        return ReadText(ids, places, None)

    def _content(
        self, messages: list[dict[str, str]], message: int, text: str, where: str
    ) -> tuple[int, int]:
        """Where a message's content stands, without whitespace at its ends: templates differ in it."""
        start, end = message_span(self._tokenizer, messages, message, text, where)
        found = text[start:end]
        return start + len(found) - len(found.lstrip()), start + len(found.rstrip())


Token = tuple[int, int, int, bool]
"""Number, first character, the one after its last, whether it is special."""


def _end_turn(places: dict[Place, int], tokens: list[Token], message: int, start: int, end: int) -> None:
    before = [number for number, _, last, _ in tokens if last <= start]
    if before:
        places[("before", message, 0)] = before[-1]
    _end_characters(places, tokens, message, start, end)
    after = [number for number, first, _, special in tokens if special and first >= end]
    if after:
        places[("after", message, 0)] = after[0]


def _end_characters(
    places: dict[Place, int], tokens: list[Token], message: int, start: int, end: int
) -> None:
    """Of several tokens that end at one character the last, which has read all of it, stays."""
    for number, _, last, special in tokens:
        if start < last <= end and not special:
            places[("text", message, last - start)] = number


def align(source: ReadText, target: ReadText, rows: Rows = "boundaries") -> Aligned:
    """The rows of a text that both models have read; none where they share no place.

    The first token of either model is left out: what is there is the same in all texts.
    """
    shared = source.places.keys() & target.places.keys()
    wanted = [place for place in shared if (place[0] == "last") == (rows == "last")]
    pairs = sorted({(source.places[place], target.places[place]) for place in wanted})
    kept = np.array([pair for pair in pairs if min(pair) > 0], np.int32).reshape(-1, 2)
    return Aligned(
        source=np.array(source.ids, np.int32),
        target=np.array(target.ids, np.int32),
        source_rows=kept[:, 0],
        target_rows=kept[:, 1],
        scope=target.answer or 0,
    )
