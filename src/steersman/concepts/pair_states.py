"""States of contrast pairs at the token that is read: read once in batches, kept on disk, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from steersman.chats.format import template_of
from steersman.concepts.norms import NormHistogram
from steersman.concepts.positions import Position, states_at, tokens_read
from steersman.concepts.state_file import StateFile
from steersman.models.architecture import decoder_config
from steersman.models.encoding import EncodedPair, EncodedPairs
from steersman.models.reading import evaluating
from steersman.pairs import ContrastPairs
from steersman.progress import Arrays, Progress

Floats = npt.NDArray[np.float32]

WINDOW_BATCHES = 16
"""Texts are sorted by length within windows of this many batches: little padding, bounded memory."""
CHUNK_BYTES = 1 << 24
"""States of a layer that are in memory at once."""


class PairStates:
    """The states of both sides of pairs at some layers, in a file, for use in a `with` block.

    Attributes:
        layers: Decoder layers, from 0.
        width: Of a state.
        clusters: Each pair's cluster id, int64 [pairs]; a cluster's pairs are one after another, clusters in
            the order of their first appearance.
        norms: Norms of the states of tokens in scope, by layer.
        skipped: Pairs left out because they are too long.
        alike: Pairs left out because both sides are the same tokens.

    The file is a temporary one, or beside saved progress, as for `StateFile`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        clusters: npt.NDArray[np.int64],
        skipped: int,
        alike: int = 0,
        folder: str | Path | None = None,
    ) -> None:
        self.layers, self.width, self.clusters = tuple(layers), width, clusters
        self.skipped, self.alike = skipped, alike
        self.norms = {layer: NormHistogram() for layer in self.layers}
        self._folder = folder
        self._file: StateFile | None = None
        self._windows: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.clusters)

    def __enter__(self) -> PairStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def done(self) -> int:
        """Pairs whose states are there: the first ones."""
        return sum(count for count, _ in self._windows)

    def append(self, states: Mapping[int, Floats]) -> None:
        """Keep states [pairs, 2, width] by layer, of the pairs that come next. Raises ModelError for a full
        disk.
        """
        if self._file is None:
            self._file = StateFile(self._folder)
        block = np.stack([states[layer] for layer in self.layers]).astype(np.float32, copy=False)
        self._windows.append((block.shape[1], self._file.append(block.tobytes())))

    def chunks(self, layer: int) -> Iterator[tuple[slice, Floats]]:
        """(which pairs, their states [pairs, 2, width]; 0 positive, 1 negative), through all pairs."""
        of_pair, start = 8 * self.width, 0
        size = max(1, CHUNK_BYTES // of_pair)
        for count, place in self._windows:
            assert self._file is not None
            place += self.layers.index(layer) * count * of_pair
            for first in range(0, count, size):
                pairs = slice(start + first, start + min(first + size, count))
                content = self._file.read(place + first * of_pair, (pairs.stop - pairs.start) * of_pair)
                yield pairs, np.frombuffer(content, np.float32).reshape(-1, 2, self.width)
            start += count

    def to_tensors(self) -> tuple[Arrays, dict[str, Any]]:
        """What `restore` takes; the states themselves stay in the file."""
        arrays = {f"norms.{layer}": norms.to_tensor().numpy() for layer, norms in self.norms.items()}
        file = None if self._file is None else self._file.facts()
        return arrays, {"done": self.done, "windows": self._windows, "file": file}

    def restore(self, arrays: Arrays, saved: Mapping[str, Any]) -> PairStates:
        """Go on from what was saved. Raises ArtifactError where the file is not as it was."""
        for layer in self.layers:
            self.norms[layer] = NormHistogram.from_tensor(torch.from_numpy(arrays[f"norms.{layer}"].copy()))
        self._windows = [(int(count), int(place)) for count, place in saved["windows"]]
        if saved["file"] is not None:
            self._file = StateFile(self._folder, saved["file"])
        return self


@dataclass(frozen=True)
class Checkpoint:
    """Where the reading of pairs is saved: a folder, what is being run, and whether to go on from it."""

    folder: str | Path
    run: Mapping[str, Any]
    resume: bool


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
    checkpoint: Checkpoint | None = None,
) -> PairStates:
    """Read both sides of all pairs, one pass for all layers.

    Raises:
        ArtifactError: saved progress is damaged, not wanted, or of another run.
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
    width, folder = decoder_config(model).hidden_size, None if checkpoint is None else checkpoint.folder
    states = PairStates(layers, width, encoded.clusters, encoded.skipped, encoded.alike, folder)
    size = max(1, WINDOW_BATCHES * batch_size // 2)
    try:
        saved = None
        if checkpoint is not None:
            run = {**checkpoint.run, "tokens": encoded.sha256}
            saved = Progress(checkpoint.folder, run, states.restore, resume=checkpoint.resume)
        with (
            evaluating(model),
            tqdm(total=len(encoded), desc="states", unit="pair", delay=1, disable=not progress) as bar,
        ):
            bar.update(states.done)
            for start in range(states.done, len(encoded), size):
                window = encoded[start : start + size]
                _read_window(model, window, states, position, batch_size)
                bar.update(len(window))
                if saved is not None:
                    saved.save({"refine": states}, at_once=start + size >= len(encoded))
    except BaseException:
        states.__exit__(None, None, None)
        raise
    finally:
        encoded.close()
    return states


def _read_window(
    model: nn.Module,
    window: list[EncodedPair],
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
    states.append(found)
