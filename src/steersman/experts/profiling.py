"""Describing experts from text: each text is read once by the model, and what its routers choose is counted
by token.

Memory is bounded whatever the text: counts by token are kept for as many of the most frequent tokens as fit
`COUNT_CELLS` (rarer ones still count for base rates and can show in contexts), contexts for the few largest
weights of each expert. Long texts are read in pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from steersman.chats.format import NotedChats
from steersman.errors import ModelError, PairsError, whole_number
from steersman.experts.estimate import Floats
from steersman.experts.mixture import recording_mixture
from steersman.experts.moments import Integers
from steersman.experts.profile import ExpertProfile, wilson_low
from steersman.experts.recording import countable_routers
from steersman.models.architecture import (
    RouterSite,
    check_ids,
    decoder_config,
    find_decoder,
    read_architecture,
)
from steersman.models.identity import model_name, weights_id
from steersman.models.loading import Named, open_named
from steersman.models.reading import evaluating
from steersman.rendering import render, special_ids
from steersman.texts import Text, Texts, load_texts
from steersman.ties import ranks

TOKENS, CONTEXTS = 8, 3
"""How many tokens and contexts are kept of each expert."""
LEAST_SEEN = 3
"""Tokens that occur less often are not ranked: their interval says next to nothing."""
WEIGHT_TIE = 1e-4
"""Two mixture weights that differ by no more are equal: their last digits depend on the batch."""
COUNT_CELLS = 1 << 26
"""Counts by layer, expert and token: 256 MiB of them."""
LONGEST_PIECE = 2048
SIGNS = 48
"""Characters of a snippet on either side of its token."""
WINDOW_BATCHES = 16


def describe_experts(
    model: Named,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Texts | str | Path | Iterable[str | Mapping[str, Any] | list[dict[str, str]]],
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> ExpertProfile:
    """What each expert of a model is used for in some text: its base rate, the tokens that use it most
    against that rate, and the contexts where its mixture weight is largest.

    Args:
        model: A transformers Mixture-of-Experts model, or its name.
        tokenizer: Its (fast) tokenizer; None takes that of a model named.
        texts: Texts or chats, or what `load_texts` takes. Special tokens are read and not counted.
        batch_size: Texts in one forward.
        progress: Show a progress bar on stderr where it takes more than a second.

    Raises:
        ModelError: the model has no routers that can be read, or the tokenizer gives no character offsets.
        PairsError: a text cannot be rendered, or there is none with a token to count.

    Example:
        >>> texts = ["please give me the badge", "no , i can not"]
        >>> steersman.describe_experts("lab:moe", None, texts)
        <ExpertProfile: 7 tokens of 2 texts; layers 0–3; of lab:moe>
    """
    model, tokenizer = open_named(model, tokenizer)
    batch_size = whole_number("batch_size", batch_size, 1, PairsError)
    texts = texts if isinstance(texts, Texts) else load_texts(texts)
    sites = countable_routers(model)
    identity = weights_id(model)  # before the work: it may have none
    noted = NotedChats(tokenizer)
    reader = _Reader(tokenizer, texts, getattr(decoder_config(model), "max_position_embeddings", None))
    seen = _seen(model, reader)
    chat = noted.record
    counter = _UseCounter(sites, seen)
    with (
        evaluating(model),
        tqdm(total=sum(seen.values()), desc="describe", unit="token", delay=1, disable=not progress) as bar,
    ):
        for batch in _batches(reader, batch_size):
            counter.read(model, batch)
            bar.update(sum(len(piece.counted) for piece in batch))
    name, revision = model_name(model)
    return ExpertProfile(
        **counter.best(reader),
        texts=len(texts),
        architecture=read_architecture(model),
        weights_id=identity,
        model=name,
        revision=revision,
        chat=chat,
        made_from=({"kind": "texts", "name": texts.name, "sha256": texts.sha256},),
    )


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Piece:
    """Token ids of a text or part of one, and the positions that count."""

    text: int
    start: int
    ids: Integers
    counted: Integers

    @cached_property
    def read(self) -> Integers:
        """Of each position a hash of the ids up to it: all that a decoder has read there."""
        return np.array(
            list(accumulate(self.ids.tolist(), lambda before, id_: hash((before, id_)), initial=0))
        )[1:]


class _Reader:
    """Texts as pieces of tokens, and places in them as snippets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Texts, context: int | None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError("the tokenizer gives no character offsets, which snippets need; load a fast one")
        self.tokenizer = tokenizer
        self.texts = texts
        self._special = special_ids(tokenizer)
        self._longest = min(LONGEST_PIECE, context or LONGEST_PIECE)

    def encoded(self, text: Text) -> tuple[str, list[int], list[tuple[int, int]]]:
        """A text as the model reads it: rendered, its token ids, and the characters of each token."""
        try:
            rendered, add_special = render(self.tokenizer, text.content)
        except PairsError as error:
            raise PairsError(f"{text.where}: {error}") from error.__cause__
        encoding = self.tokenizer(
            rendered, add_special_tokens=add_special, return_offsets_mapping=True, verbose=False
        )
        return rendered, encoding["input_ids"], encoding["offset_mapping"]

    def pieces(self) -> Iterator[_Piece]:
        """All pieces that have a token to count."""
        for number, text in enumerate(self.texts):
            _, ids, spans = self.encoded(text)
            for start in range(0, len(ids), self._longest):
                part = range(start, min(start + self._longest, len(ids)))
                counted = [
                    place - start
                    for place in part
                    if ids[place] not in self._special and spans[place][0] < spans[place][1]
                ]
                if counted:
                    yield _Piece(number, start, np.array([ids[place] for place in part]), np.array(counted))

    def snippet(self, text: int, place: int) -> tuple[str, str, str]:
        """What stands before a token of a text, the token, and what stands after it."""
        rendered, _, spans = self._last(text)
        first, last = spans[place]
        return rendered[max(0, first - SIGNS) : first], rendered[first:last], rendered[last : last + SIGNS]

    def _last(self, text: int) -> tuple[str, list[int], list[tuple[int, int]]]:
        if getattr(self, "_kept", (None,))[0] != text:
            self._kept: tuple[Any, ...] = (text, self.encoded(self.texts[text]))
        kept: tuple[str, list[int], list[tuple[int, int]]] = self._kept[1]
        return kept

    def word(self, token: int) -> str:
        """A token as text; as its vocabulary has it, where it is only a part of a letter."""
        text = str(self.tokenizer.decode([token]))
        return text if text and "\ufffd" not in text else str(self.tokenizer.convert_ids_to_tokens(token))


def _seen(model: nn.Module, reader: _Reader) -> Counter[int]:
    """How often each token occurs; every text is read once before any work, so that a bad one is found."""
    seen: Counter[int] = Counter()
    for piece in reader.pieces():
        check_ids(model, int(piece.ids.max()), reader.texts[piece.text].where)
        seen.update(piece.ids[piece.counted].tolist())
    if not seen:
        raise PairsError(f"{reader.texts.name}: no token to count; special tokens do not count")
    return seen


def _batches(reader: _Reader, batch_size: int) -> Iterator[list[_Piece]]:
    """Pieces of like length together, sorted within windows: little padding, bounded memory."""
    window: list[_Piece] = []
    for piece in reader.pieces():
        window.append(piece)
        if len(window) == WINDOW_BATCHES * batch_size:
            yield from _in_batches(window, batch_size)
            window = []
    yield from _in_batches(window, batch_size)


def _in_batches(window: list[_Piece], batch_size: int) -> Iterator[list[_Piece]]:
    ordered = sorted(window, key=lambda piece: len(piece.ids))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


# ---------------------------------------------------------------- counting


class _UseCounter:
    """Counts of each layer and expert by token, and its largest mixture weights."""

    def __init__(self, sites: Sequence[RouterSite], seen: Counter[int]) -> None:
        self._sites = sites
        self._experts = max(site.facts.experts for site in sites)
        self._seen = seen
        most = max(1, COUNT_CELLS // (len(sites) * self._experts))
        ranked = sorted(seen, key=lambda token: (-seen[token], token))
        self._ranked = [token for token in ranked if seen[token] >= LEAST_SEEN][:most]
        self._slot = np.full(max(seen) + 1, len(self._ranked), np.int64)  # the last one: not ranked
        self._slot[self._ranked] = np.arange(len(self._ranked))
        self._counts = torch.zeros((len(sites), self._experts * (len(self._ranked) + 1)), dtype=torch.int32)
        shape = (len(sites), self._experts, CONTEXTS)
        self._weights = np.full(shape, -np.inf)
        self._places = np.full((*shape, 3), -1, np.int64)  # text, token, hash of what was read up to there

    def read(self, model: nn.Module, batch: list[_Piece]) -> None:
        """Run a batch through the decoder and count it."""
        decoder = find_decoder(model)
        device = next(decoder.parameters()).device
        if device.type == "meta":  # offloaded: accelerate brings inputs to where each layer runs
            device = torch.device("cpu")
        ids = pad_sequence([torch.from_numpy(piece.ids) for piece in batch], batch_first=True)
        lengths = torch.tensor([len(piece.ids) for piece in batch])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        rows, columns = ids.shape
        places = torch.from_numpy(
            np.concatenate([row * columns + piece.counted for row, piece in enumerate(batch)])
        )
        slots = torch.from_numpy(self._slot[ids.flatten()[places].numpy()])

        def collect(site: int, chosen: Tensor, weights: Tensor) -> None:
            if chosen.shape[0] != rows * columns:
                raise ModelError(
                    f"layer {self._sites[site].facts.layer}: {chosen.shape[0]} tokens reached the experts, "
                    f"{rows * columns} were given"
                )
            chosen, weights = chosen.cpu()[places], weights.cpu()[places]
            self._count(site, chosen, slots)
            self._keep_largest(site, chosen, weights, places, (rows, columns), batch)

        with recording_mixture(self._sites, collect), torch.no_grad():
            decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)

    def _count(self, site: int, chosen: Tensor, slots: Tensor) -> None:
        keys = (chosen * (len(self._ranked) + 1) + slots[:, None]).flatten()
        self._counts[site].scatter_add_(0, keys, torch.ones_like(keys, dtype=torch.int32))

    def _keep_largest(
        self,
        site: int,
        chosen: Tensor,
        weights: Tensor,
        places: Tensor,
        shape: tuple[int, int],
        batch: list[_Piece],
    ) -> None:
        """Of each piece the token with the largest weight for each expert, of equals the first; the largest
        of all are kept.
        """
        rows, columns = shape
        dense = torch.full((rows * columns, self._experts), -torch.inf)
        dense[places[:, None], chosen] = weights
        dense = dense.view(rows, columns, self._experts)
        first = (dense >= dense.amax(dim=1, keepdim=True) - WEIGHT_TIE).int().argmax(dim=1, keepdim=True)
        best = dense.gather(1, first)[:, 0].numpy()
        token = first[:, 0].numpy()
        found = np.stack(
            [
                np.broadcast_to(np.array([piece.text for piece in batch])[:, None], token.shape),
                token + np.array([piece.start for piece in batch])[:, None],
                np.array([piece.read[of] for piece, of in zip(batch, token, strict=True)]),
            ],
            axis=-1,
        )  # [rows, experts, 3]
        all_places = np.concatenate([self._places[site], found.transpose(1, 0, 2)], axis=1)
        all_weights = np.concatenate([self._weights[site], best.T], axis=1, dtype=np.float64)
        _drop_repeats(all_weights, all_places)
        text, token, _ = np.moveaxis(all_places, -1, 0)
        order = np.lexsort((token, text, ranks(all_weights, absolute=WEIGHT_TIE)), axis=1)[:, :CONTEXTS]
        self._weights[site] = np.take_along_axis(all_weights, order, axis=1)
        self._places[site] = np.take_along_axis(all_places, order[..., None], axis=1)

    # ------------------------------------------------------------ the result

    def best(self, reader: _Reader) -> dict[str, Any]:
        """The fields of a profile that come from counting."""
        layers = len(self._sites)
        counts = self._counts.view(layers, self._experts, -1).numpy()
        total = sum(self._seen.values())
        uses = counts.sum(axis=-1, dtype=np.int64)
        for row, site in enumerate(self._sites):
            uses[row, site.facts.experts :] = -1
        tokens, token_uses = self._best_tokens(counts, uses, total)
        named = np.unique(tokens[tokens >= 0])
        place_of = np.full(len(self._ranked) + 1, -1, np.int64)
        place_of[named] = np.arange(len(named))
        contexts, snippets = self._snippets(reader)
        return {
            "uses": uses,
            "tokens": total,
            "token_places": np.where(tokens >= 0, place_of[tokens], -1),
            "token_uses": token_uses,
            "words": tuple(reader.word(self._ranked[slot]) for slot in named),
            "word_seen": np.array([self._seen[self._ranked[slot]] for slot in named], dtype=np.int64),
            "context_places": contexts,
            "context_weights": np.where(contexts >= 0, self._weights, 0.0),
            "snippets": snippets,
        }

    def _best_tokens(
        self, counts: np.ndarray[Any, Any], uses: Integers, total: int
    ) -> tuple[Integers, Integers]:
        """Slots of the tokens with the highest lower bound above the base rate, and their uses; -1 and 0."""
        ranked = len(self._ranked)
        seen = np.array([self._seen[token] for token in self._ranked])
        shape = (*uses.shape, TOKENS)
        slots, found = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        for row in range(len(counts)):  # a layer at a time: floats take more room than counts
            used = counts[row, :, :ranked]
            low = wilson_low(used, seen)
            low[low <= uses[row][:, None] / total] = 0.0
            order = np.argsort(-low, axis=1, kind="stable")[:, :TOKENS]
            kept = np.take_along_axis(low, order, axis=1) > 0
            width = order.shape[1]
            slots[row, :, :width] = np.where(kept, order, -1)
            found[row, :, :width] = np.where(kept, np.take_along_axis(used, order, axis=1), 0)
        return slots, found

    def _snippets(self, reader: _Reader) -> tuple[Integers, tuple[tuple[str, str, str], ...]]:
        """Places of the contexts in a list of snippets, each of which is there once."""
        there = np.isfinite(self._weights)
        wanted = sorted({(int(text), int(place)) for text, place, _ in self._places[there]})
        number = {place: index for index, place in enumerate(wanted)}
        contexts = np.full(there.shape, -1, np.int64)
        contexts[there] = [number[int(text), int(place)] for text, place, _ in self._places[there]]
        return contexts, tuple(reader.snippet(text, place) for text, place in wanted)


def _drop_repeats(weights: Floats, places: Integers) -> None:
    """Set to -inf, in place, the weights [experts, n] of all but the first of the places [experts, n, 3]
    where the same has been read: it is the same context again, with the same weight but for rounding.
    """
    text, token, read = np.moveaxis(places, -1, 0)
    order = np.lexsort((token, text, np.isinf(weights), read), axis=1)
    ordered = np.take_along_axis(weights, order, axis=1)
    ordered[:, 1:][np.diff(np.take_along_axis(read, order, axis=1)) == 0] = -np.inf
    np.put_along_axis(weights, order, ordered, axis=1)
