"""Prompts as a model reads them: token ids, where the two sides part, left-padded batches by length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steersman.chat_record import ChatRecord
from steersman.chats.format import NotedChats
from steersman.errors import PairsError
from steersman.evaluation.tasks import Item
from steersman.pairs import Content, shared_length
from steersman.rendering import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Fork:
    """Where the answers of an item's two sides part.

    `ids` is the prompt followed by what the two answers have in common (mostly nothing), `prompt_length` how
    many of them are prompt; `positive` and `negative` are the tokens with which either side goes on.
    """

    ids: tuple[int, ...]
    prompt_length: int
    positive: int
    negative: int


@dataclass(frozen=True)
class Batch:
    """Rows of one forward, padded on the left, int64 [rows, columns]; `indices`: places in the input."""

    indices: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor

    @property
    def position_ids(self) -> Tensor:
        """Positions counted from each row's first real token."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def chats_of(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Content]) -> ChatRecord | None:
    """How a run's prompts are rendered; None where all of them are texts. Raises as `render`, and ModelError
    where a date was given and none asks for it.
    """
    noted = NotedChats(tokenizer)
    for content in prompts:
        render(tokenizer, content)
    return noted.record


def encode_prompt(tokenizer: PreTrainedTokenizerBase, content: Content) -> tuple[int, ...]:
    """Token ids of a prompt, the generation prompt included. Raises as `steersman.rendering.render`."""
    text, add_special = render(tokenizer, content)
    return _ids(tokenizer, text, add_special)


def encode_fork(tokenizer: PreTrainedTokenizerBase, item: Item) -> Fork:
    """Token ids up to where the item's two answers part. Raises PairsError where they never do."""
    prompt, positive, negative = _with_answers(tokenizer, item)
    shared = shared_length(positive, negative)
    if shared >= min(len(positive), len(negative)):
        raise PairsError(f"{item.id}: the answers of the two sides begin the same and one of them ends there")
    return Fork(positive[:shared], min(len(prompt), shared), positive[shared], negative[shared])


def same_answers(tokenizer: PreTrainedTokenizerBase, item: Item) -> bool:
    """Whether an item's two answers are the same tokens, whatever their texts."""
    _, positive, negative = _with_answers(tokenizer, item)
    return positive == negative


def _with_answers(tokenizer: PreTrainedTokenizerBase, item: Item) -> list[tuple[int, ...]]:
    """Token ids of an item's prompt, and of the prompt with either answer."""
    try:
        text, add_special = render(tokenizer, item.content)
    except PairsError as error:
        raise PairsError(f"{item.id}: {error}") from error.__cause__
    glue = _glue(text, item.content)
    ends = ("", glue + item.positive, glue + (item.negative or ""))
    return [_ids(tokenizer, text + end, add_special) for end in ends]


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, content: Content, answer: str
) -> tuple[tuple[int, ...], int]:
    """Token ids of a prompt with an answer after it, and how many of them are prompt.

    Raises PairsError where the answer adds no token.
    """
    text, add_special = render(tokenizer, content)
    prompt = _ids(tokenizer, text, add_special)
    whole = _ids(tokenizer, text + _glue(text, content) + answer, add_special)
    if whole == prompt[: len(whole)]:
        raise PairsError(f"the answer {answer!r} adds no token to its prompt")
    return whole, max(shared_length(prompt, whole), 1)


def batches(
    rows: Sequence[Sequence[int]], batch_size: int, pad: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of rows of like length, padded on the left."""
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index]), index))
    for start in range(0, len(order), batch_size):
        indices = tuple(order[start : start + batch_size])
        width = len(rows[indices[-1]])
        ids = torch.full((len(indices), width), pad, dtype=torch.long)
        mask = torch.zeros((len(indices), width), dtype=torch.long)
        for place, index in enumerate(indices):
            ids[place, width - len(rows[index]) :] = torch.tensor(rows[index])
            mask[place, width - len(rows[index]) :] = 1
        yield Batch(indices, ids.to(device), mask.to(device))


def _glue(text: str, content: Content) -> str:
    """What stands between a prompt and its answer: nothing after a chat's generation prompt."""
    return "" if not text or text[-1].isspace() or not isinstance(content, str) else " "


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special: bool) -> tuple[int, ...]:
    encoded = tokenizer(text, add_special_tokens=add_special, return_attention_mask=False, verbose=False)
    return tuple(encoded["input_ids"])
