"""What screening reads of a model: log probabilities of given tokens after given ones, added up by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from steersman.edits import SCOPES, Scope
from steersman.errors import ModelError, PairsError
from steersman.evaluation.prompts import encode_answer, encode_fork
from steersman.models.reading import pad_id
from steersman.models.scored_text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steersman.evaluation.screening.room import Room
    from steersman.evaluation.tasks import Item, Task

Side = Literal["positive", "negative"]


@dataclass(frozen=True)
class Reading:
    """One number an item: the sum over its texts; `groups` are the items' clusters."""

    name: str
    texts: tuple[Text, ...]
    groups: tuple[str, ...]

    @property
    def items(self) -> int:
        """How many numbers it gives."""
        return len(self.groups)


def preferences(task: Task, tokenizer: PreTrainedTokenizerBase, *, whole: bool = False) -> Reading:
    """d = log p(positive answer) − log p(negative answer) of each item: at the first token where they differ,
    or of the whole answers.

    Raises:
        PairsError: an item has no negative answer, or its answers never differ.
    """
    texts: list[Text] = []
    for number, item in enumerate(task):
        if item.negative is None:
            raise PairsError(
                f"{item.id}: has no negative answer, so there is no d = log p(positive) − log p(negative) to "
                "screen; give items with both answers"
            )
        if whole:
            texts += [
                _answer(tokenizer, number, item, item.positive, 1.0),
                _answer(tokenizer, number, item, item.negative, -1.0),
            ]
        else:
            fork = encode_fork(tokenizer, item)
            last = len(fork.ids) - 1
            scored = ((last, fork.positive, 1.0), (last, fork.negative, -1.0))
            texts.append(Text(number, fork.ids, fork.prompt_length, scored))
    return Reading(task.name, tuple(texts), tuple(task.groups))


def answers(task: Task, tokenizer: PreTrainedTokenizerBase, side: Side = "positive") -> Reading:
    """log p(answer) of each item, teacher-forced: that of one side, in nats."""
    texts = [
        _answer(tokenizer, number, item, item.positive if side == "positive" else item.negative or "", 1.0)
        for number, item in enumerate(task)
    ]
    return Reading(task.name, tuple(texts), tuple(task.groups))


def require_room(reading: Reading, model: nn.Module) -> None:
    """Raise PairsError where a text is longer than the model's context."""
    config = cast(Any, model).config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 1 << 30
    longest = max(len(text.ids) for text in reading.texts)
    if longest > context:
        raise PairsError(
            f"{reading.name}: a prompt of {longest} tokens, but the model's context holds {context}; "
            "shorten it"
        )


def _answer(tokenizer: PreTrainedTokenizerBase, number: int, item: Item, answer: str, weight: float) -> Text:
    try:
        ids, shared = encode_answer(tokenizer, item.content, answer)
    except PairsError as error:
        raise PairsError(f"{item.id}: {error}") from None
    # The last token is read off, not fed.
    scored = tuple((place - 1, ids[place], weight) for place in range(shared, len(ids)))
    return Text(number, ids[:-1], shared, scored)


class Batch:
    """Texts of like length in one forward, padded on the left.

    Attributes:
        texts: Their numbers.
        ids, mask: int64 [rows, columns].
        in_scope: bool [rows, columns], the tokens that are steered.
        keep: How many of the last columns are read.
        places, tokens, weights: [rows, scored]: the column among those kept, the token, its weight.
    """

    def __init__(
        self, texts: Sequence[Text], numbers: Sequence[int], pad: int, scope: Scope, device: torch.device
    ) -> None:
        chosen = [texts[number] for number in numbers]
        rows, columns = len(chosen), max(len(text.ids) for text in chosen)
        self.texts = np.array(numbers)
        ids, mask = np.full((rows, columns), pad), np.zeros((rows, columns), np.int64)
        in_scope = np.zeros((rows, columns), bool)
        self.keep = max(text.read for text in chosen)
        scored = max(len(text.scored) for text in chosen)
        places, tokens = np.zeros((2, rows, scored), np.int64)
        weights = np.zeros((rows, scored))
        for row, text in enumerate(chosen):
            start = columns - len(text.ids)
            ids[row, start:], mask[row, start:] = text.ids, 1
            first, end = _span(scope, text)
            in_scope[row, start + first : start + end] = True
            for number, (place, token, weight) in enumerate(text.scored):
                places[row, number] = start + place - (columns - self.keep)
                tokens[row, number], weights[row, number] = token, weight
        self.ids, self.mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        self.in_scope = torch.from_numpy(in_scope).to(device)
        self.places, self.tokens = torch.from_numpy(places).to(device), torch.from_numpy(tokens).to(device)
        self.weights = torch.from_numpy(weights).to(device)
        self.normalised = bool((np.abs(weights.sum(axis=1)) > 0).any())
        """Whether the softmax's normaliser matters: two answers' tokens at one place cancel it."""

    @property
    def name(self) -> str:
        """Says which texts of a reading it holds, whatever the others are."""
        return f"{self.texts[0]}+{self.rows - 1}"

    @property
    def rows(self) -> int:
        """Texts."""
        return len(self.texts)

    @property
    def columns(self) -> int:
        """Tokens of the longest."""
        return self.ids.shape[1]

    def values(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Σ weight · log p of some of its rows, float64 [n], from logits [n, keep, vocabulary].

        Raises ModelError where one is nan or infinite.
        """
        places, tokens, weights = self.places[rows], self.tokens[rows], self.weights[rows]
        at = torch.arange(len(rows), device=logits.device)[:, None]
        found = logits[at, places, tokens].double()
        if self.normalised:
            found = found - logits.float().logsumexp(dim=-1)[at, places].double()
        found = (found * weights).sum(dim=1)
        if not bool(found.isfinite().all()):
            raise ModelError(
                f"the model gives no finite log probability for an item (nan or infinity, in "
                f"{str(logits.dtype).removeprefix('torch.')}): is a number format too narrow, or a weight "
                "damaged?"
            )
        return found


def _span(scope: Scope, text: Text) -> tuple[int, int]:
    """The tokens that a scope holds: from, to."""
    roles, prompt = SCOPES[scope], text.prompt_length
    first = 0 if "prompt" in roles else prompt - 1 if "last" in roles else prompt
    end = len(text.ids) if "generated" in roles else prompt if "last" in roles else prompt - 1
    return first, end


def batches_of(
    reading: Reading,
    size: int,
    tokenizer: PreTrainedTokenizerBase,
    scope: Scope,
    device: torch.device,
    room: Room | None = None,
) -> list[Batch]:
    """The texts of a reading, those of like length together: at most `size` at a time, and no more than
    there is room for.
    """
    texts = reading.texts
    order = sorted(range(len(texts)), key=lambda number: (len(texts[number].ids), number))
    pad = pad_id(tokenizer)
    found: list[Batch] = []
    start = 0
    while start < len(order):
        end = start + 1
        read = texts[order[start]].read
        while end < min(len(order), start + size):
            columns, read = len(texts[order[end]].ids), max(read, texts[order[end]].read)
            if room is not None and end + 1 - start > room.together(columns, read):
                break
            end += 1
        found.append(Batch(texts, order[start:end], pad, scope, device))
        start = end
    return found


def by_item(reading: Reading, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Texts' values [..., texts] added up by item, [..., items]."""
    found = np.zeros((*values.shape[:-1], reading.items))
    for number, text in enumerate(reading.texts):
        found[..., text.item] += values[..., number]
    return found
