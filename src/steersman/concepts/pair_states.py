"""States of contrast pairs at the token that is read: read once in batches, kept on disk, layer by layer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from steersman.chats.format import template_of
from steersman.concepts.norms import NormHistogram
from steersman.concepts.positions import Position, states_at, tokens_read
from steersman.errors import ModelError
from steersman.models.architecture import decoder_config
from steersman.models.encoding import EncodedPair, EncodedPairs
from steersman.models.reading import evaluating
from steersman.pairs import ContrastPairs

Floats = npt.NDArray[np.float32]

WINDOW_BATCHES = 16
"""Texts are sorted by length within windows of this many batches: little padding, bounded memory."""
CHUNK_BYTES = 1 << 24
"""States of a layer that are in memory at once."""


class PairStates:
    """The states of both sides of pairs at some layers, in a temporary file, for use in a `with` block.

    Attributes:
        layers: Decoder layers, from 0.
        width: Of a state.
        clusters: Each pair's cluster id, int64 [pairs]; a cluster's pairs are one after another, clusters in
            the order of their first appearance.
        norms: Norms of the states of tokens in scope, by layer.
        skipped: Pairs left out because they are too long.
        alike: Pairs left out because both sides are the same tokens.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        clusters: npt.NDArray[np.int64],
        skipped: int,
        alike: int = 0,
    ) -> None:
        self.layers, self.width, self.clusters = tuple(layers), width, clusters
        self.skipped, self.alike = skipped, alike
        self.norms = {layer: NormHistogram() for layer in self.layers}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def __len__(self) -> int:
        return len(self.clusters)

    def __enter__(self) -> PairStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, layer: int, start: int, states: Floats) -> None:
        """Keep states [pairs, 2, width] of the pairs from `start` on. Raises ModelError for a full disk."""
        try:
            self._file.seek(self._place(layer, start))
            self._file.write(np.ascontiguousarray(states, np.float32).tobytes())
        except OSError as error:
            raise ModelError(
                f"{tempfile.gettempdir()}: states cannot be kept there ({error.strerror}); "
                "set TMPDIR to a folder with more room"
            ) from None

    def chunks(self, layer: int) -> Iterator[tuple[slice, Floats]]:
        """(which pairs, their states [pairs, 2, width]; 0 positive, 1 negative), through all pairs."""
        size = max(1, CHUNK_BYTES // (8 * self.width))
        for start in range(0, len(self), size):
            pairs = slice(start, min(start + size, len(self)))
            self._file.seek(self._place(layer, start))
            content = self._file.read(8 * self.width * (pairs.stop - start))
            yield pairs, np.frombuffer(content, np.float32).reshape(-1, 2, self.width)

    def _place(self, layer: int, pair: int) -> int:
        return 8 * self.width * (self.layers.index(layer) * len(self) + pair)


def read_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: ContrastPairs,
    layers: Sequence[int],
    position: Position,
    *,
    batch_size: int = 16,
    truncate: bool = False,
    progress: bool = False,
) -> PairStates:
    """Read both sides of all pairs, one pass for all layers.

    Raises:
        ModelError: a layer does not exist, or gives states that are not finite.
        PairsError: a pair cannot be encoded; TruncatedTarget where a side is too long and not `truncate`.
    """
    side = tokens_read(model, tokenizer, position)
    encoded = EncodedPairs(
        model,
        pairs,
        side,
        last_alone=position == "last",
        template=template_of(tokenizer) is not None,
        truncate=truncate,
        progress=progress,
    )
    width = decoder_config(model).hidden_size
    states = PairStates(layers, width, encoded.clusters, encoded.skipped, encoded.alike)
    size = max(1, WINDOW_BATCHES * batch_size // 2)
    try:
        with (
            evaluating(model),
            tqdm(total=len(encoded), desc="states", unit="pair", delay=1, disable=not progress) as bar,
        ):
            for start in range(0, len(encoded), size):
                window = encoded[start : start + size]
                _read_window(model, window, start, states, position, batch_size)
                bar.update(len(window))
    except BaseException:
        states.__exit__(None, None, None)
        raise
    finally:
        encoded.close()
    return states


def _read_window(
    model: nn.Module,
    window: list[EncodedPair],
    start: int,
    states: PairStates,
    position: Position,
    batch_size: int,
) -> None:
    texts = [(place, side) for place in range(len(window)) for side in (0, 1)]
    texts.sort(key=lambda text: len(window[text[0]].ids[text[1]]))
    found = {layer: np.empty((len(window), 2, states.width), np.float32) for layer in states.layers}
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        ids = [window[place].ids[side] for place, side in batch]
        positions = [window[place].target[side] for place, side in batch]
        places, sides = (np.array(values) for values in zip(*batch, strict=True))
        for layer, read in states_at(model, states.layers, ids, positions, position).items():
            found[layer][places, sides] = read.states.numpy()
            states.norms[layer].add(read.norms)
    for layer, of_layer in found.items():
        states.write(layer, start, of_layer)
