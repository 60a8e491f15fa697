"""Contrast pairs as token ids, read and checked once, kept on disk in the order in which they are used."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from tqdm import tqdm

from steersman.errors import PairsError
from steersman.models.architecture import check_ids, decoder_config
from steersman.pairs import Content, ContrastPair, ContrastPairs
from steersman.rendering import TruncatedTarget
from steersman.shards import Shard

Tokens = npt.NDArray[np.int32]

EncodeSide = Callable[[Content, str | None, str], tuple[Sequence[int], Sequence[int]]]
"""(a side's content, its target, its name for messages) → its token ids, and the positions that matter."""

_IN_MEMORY = 1 << 16
"""Bytes of encoded pairs that are kept in memory; beyond, on disk."""


@dataclass(frozen=True)
class EncodedPair:
    """Both sides of a pair as token ids and positions of the tokens that matter (none where the model writes
    them), int32, and its cluster's id.
    """

    ids: tuple[Tokens, Tokens]
    target: tuple[Tokens, Tokens]
    cluster: int


class EncodedPairs(Sequence[EncodedPair]):
    """Pairs as a model reads them, those of a cluster one after another, clusters as they first appear.

    Every pair is encoded once, before any is read, so that a bad one is found before any work is done.
    Memory holds three numbers a pair, whatever their length.

    Args:
        model: What will read them: its vocabulary is a limit.
        pairs: The pairs.
        encode_side: Gives a side's token ids and the positions that matter; raises `TruncatedTarget` for one
            that is too long.
        truncate: Leave out pairs with a side that is too long, instead of an error.
        shard: Take this part of the clusters alone.
        progress: Show a bar on stderr where reading them takes more than a second.

    Raises:
        PairsError: a pair cannot be encoded, or none is left.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: ContrastPairs,
        encode_side: EncodeSide,
        *,
        truncate: bool = False,
        shard: Shard | None = None,
        progress: bool = False,
    ) -> None:
        self.skipped = 0
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        self._starts, self._clusters, firsts = array("q"), array("q"), array("q")
        appeared: dict[int, int] = {}  # cluster → how many came before it
        for pair in tqdm(pairs, desc="reading", unit="pair", delay=1, leave=False, disable=not progress):
            cluster = hash_of_cluster(pair.cluster)
            number = appeared.setdefault(cluster, len(appeared))
            if shard is not None and not shard.holds(number):
                continue
            try:
                encoded = _encode(model, pair, encode_side)
            except TruncatedTarget:
                if not truncate:
                    raise
                self.skipped += 1
                continue
            self._starts.append(self._file.tell())
            self._clusters.append(cluster)
            firsts.append(number)
            self._file.write(encoded)
        if not self._starts:
            of = "" if shard is None else f" in shard {shard} ({len(appeared)} clusters)"
            raise PairsError(f"{pairs.name}: no pair is left to count{of}")
        self._order = np.argsort(np.frombuffer(firsts, np.int64), kind="stable")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read(place) for place in self._order[index]]
        return self._read(self._order[index])

    def __iter__(self) -> Iterator[EncodedPair]:
        return (self._read(place) for place in self._order)

    def _read(self, place: np.int64) -> EncodedPair:
        self._file.seek(self._starts[place])
        lengths = np.frombuffer(self._file.read(16), np.int32)
        content = np.frombuffer(self._file.read(4 * int(lengths.sum())), np.int32)
        ids_1, target_1, ids_2, target_2 = np.split(content, np.cumsum(lengths)[:-1])
        return EncodedPair((ids_1, ids_2), (target_1, target_2), self._clusters[place])

    @property
    def clusters(self) -> npt.NDArray[np.int64]:
        """Each pair's cluster id, int64 [pairs]."""
        return np.frombuffer(self._clusters, np.int64)[self._order]

    @property
    def sha256(self) -> str:
        """Hex sha256 over what is read, in its order: ids, positions and clusters."""
        digest = hashlib.sha256()
        for pair in self:
            for side in (0, 1):
                for array_ in (pair.ids[side], pair.target[side]):
                    digest.update(len(array_).to_bytes(8, "little") + array_.tobytes())
            digest.update(pair.cluster.to_bytes(8, "little", signed=True))
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _encode(model: nn.Module, pair: ContrastPair, encode_side: EncodeSide) -> bytes:
    """A pair as bytes: four lengths, then ids and positions of either side, int32."""
    sides = [
        encode_side(content, target, f"{pair.where}, {side} side")
        for side, content, target in (
            ("positive", pair.positive, pair.positive_target),
            ("negative", pair.negative, pair.negative_target),
        )
    ]
    check_ids(model, max(max(ids) for ids, _ in sides), pair.where)
    parts = [np.array(part, np.int32) for side in sides for part in side]
    return b"".join(
        [np.array([len(part) for part in parts], np.int32).tobytes()] + [part.tobytes() for part in parts]
    )


def longest_text(model: nn.Module) -> int | None:
    """How many tokens a model can read; None where its configuration does not say."""
    return getattr(decoder_config(model), "max_position_embeddings", None)


def hash_of_cluster(cluster: str) -> int:
    """A signed 64-bit hash of a cluster's name."""
    return int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:8], "little", signed=True)
