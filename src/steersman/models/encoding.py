"""Contrast pairs as token ids, read and checked once, kept on disk in the order in which they are used."""

from __future__ import annotations

import hashlib
import json
import tempfile
import unicodedata
import warnings
import weakref
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
from steersman.pairs import Content, ContrastPair, ContrastPairs, shared_length
from steersman.rendering import TruncatedTarget, prompt_of
from steersman.shards import Shard
from steersman.showing import count_of

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

    A pair whose sides are the same tokens, at the same positions, up to the last that is compared says
    nothing, whatever the texts: no later token acts on an earlier one. It is left out, and counted in
    `alike`; a warning names it.

    Args:
        model: What will read them: its vocabulary is a limit.
        pairs: The pairs.
        encode_side: Gives a side's token ids and the positions that matter; raises `TruncatedTarget` for one
            that is too long.
        last_alone: Only the last of the positions is compared, so the others make no difference.
        template: Whether the model's chats go through a template; a warning then says which pairs do not.
        truncate: Leave out pairs with a side that is too long, instead of an error.
        shard: Take this part of the clusters alone.
        progress: Show a bar on stderr where reading them takes more than a second.

    Raises:
        PairsError: a pair cannot be encoded, none is left, or the sides of all are alike.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: ContrastPairs,
        encode_side: EncodeSide,
        *,
        last_alone: bool = False,
        template: bool = False,
        truncate: bool = False,
        shard: Shard | None = None,
        progress: bool = False,
    ) -> None:
        self.skipped = self.alike = plain = 0
        named: dict[str, list[str]] = {}  # how they are alike → pairs
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # also where an error comes before `close`
        self._starts, self._clusters, firsts = array("q"), array("q"), array("q")
        appeared: dict[int, int] = {}  # cluster → how many came before it
        for pair in tqdm(pairs, desc="reading", unit="pair", delay=1, leave=False, disable=not progress):
            cluster = hash_of_cluster(pair.cluster)
            number = appeared.setdefault(cluster, len(appeared))
            if shard is not None and not shard.holds(number):
                continue
            plain += pair.plain
            try:
                sides = _encode(model, pair, encode_side)
            except TruncatedTarget:
                if not truncate:
                    raise
                self.skipped += 1
                continue
            if _alike(*sides, last_alone=last_alone):
                self.alike += 1
                if self.alike <= _NAMED:
                    named.setdefault(_how_alike(pair, *sides), []).append(pair.where)
                continue
            self._starts.append(self._file.tell())
            self._clusters.append(cluster)
            firsts.append(number)
            self._file.write(_packed(sides))
        same = f"both sides are the same tokens: {_listed(named, self.alike)}"
        if not self._starts:
            of = "" if shard is None else f" in shard {shard} ({count_of(len(appeared), 'cluster')})"
            if self.alike:
                raise PairsError(
                    f"{pairs.name}: no pair is a contrast{of}, as {same}; right are sides, or targets, whose "
                    "tokens differ"
                )
            raise PairsError(f"{pairs.name}: no pair is left to count{of}")
        if self.alike:
            warnings.warn(f"{pairs.name}: {count_of(self.alike, 'pair')} left out, as {same}", stacklevel=2)
        if plain and template:
            warnings.warn(
                f"{pairs.name}: {count_of(plain, 'preference')} in plain text, read as it is, without the "
                'chat template; if the model is asked in chats, right are messages: "prompt": [{"role": '
                '"user", "content": …}] (without a prompt, chosen and rejected as chats)',
                stacklevel=2,
            )
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


Side = tuple[Sequence[int], Sequence[int]]


def _encode(model: nn.Module, pair: ContrastPair, encode_side: EncodeSide) -> tuple[Side, Side]:
    """Token ids and positions of either side. Raises as `encode_side`, and for ids that the model lacks."""
    positive = encode_side(pair.positive, pair.positive_target, f"{pair.where}, positive side")
    negative = encode_side(pair.negative, pair.negative_target, f"{pair.where}, negative side")
    check_ids(model, max(max(positive[0]), max(negative[0])), pair.where)
    return positive, negative


def _packed(sides: tuple[Side, Side]) -> bytes:
    """A pair as bytes: four lengths, then ids and positions of either side, int32."""
    parts = [np.array(part, np.int32) for side in sides for part in side]
    return b"".join(
        [np.array([len(part) for part in parts], np.int32).tobytes()] + [part.tobytes() for part in parts]
    )


def _alike(positive: Side, negative: Side, *, last_alone: bool) -> bool:
    """Whether a causal model does the same on both sides, at every position that is compared."""
    ids, places = zip(positive, negative, strict=True)
    one, other = (tuple(of[-1:] if last_alone else of) for of in places)
    end = one[-1] + 1 if one else None  # without positions the model goes on from the whole text
    return one == other and tuple(ids[0][:end]) == tuple(ids[1][:end])


_NAMED = 5
"""Pairs that a message names at most."""

_READ_ALIKE: dict[str, Callable[[str], str]] = {
    "Unicode form": lambda text: unicodedata.normalize("NFC", text),
    "compatibility characters": lambda text: unicodedata.normalize("NFKC", text),
    "upper and lower case": str.casefold,
    "whitespace": lambda text: "".join(text.split()),
}
"""What tokenizers and templates do away with, by what they then no longer see."""


def _how_alike(pair: ContrastPair, positive: Side, negative: Side) -> str:
    """How texts can differ whose tokens do not."""
    sides = pair.positive, pair.negative
    if not positive[1]:  # the model goes on from the prompts
        sides = prompt_of(pair.positive), prompt_of(pair.negative)
        if sides[0] == sides[1]:
            return "the prompts are the same, and answers and targets are not read"
    if pair.positive == pair.negative:
        return "the targets are the same tokens"
    if tuple(positive[0]) != tuple(negative[0]):
        return "they differ only after the last token that is compared"
    first, second = map(_words, sides)
    if first == second:
        return "they differ only in roles, which the template does not show"
    lost = (what for what, read in _READ_ALIKE.items() if read(first) == read(second))
    what = next(lost, "what is not kept")
    return f"they differ only in {what}: {_first_difference(first, second, what == 'whitespace')}"


def _words(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)


def _first_difference(first: str, second: str, in_whitespace: bool) -> str:
    """The first characters in which two texts differ: all whitespace that stands there, or one sign."""
    place = shared_length(first, second)
    if in_whitespace:
        place = len(first[:place].rstrip())
    return " and ".join(_named(_sign_at(text, place, in_whitespace)) for text in (first, second))


def _sign_at(text: str, place: int, in_whitespace: bool) -> str:
    """The whitespace that begins at a place, or the character with the marks that combine with it."""
    if in_whitespace:
        return text[place : len(text) - len(text[place:].lstrip())]
    marks = next((n for n, sign in enumerate(text[place + 1 :]) if not unicodedata.combining(sign)), None)
    return text[place : None if marks is None else place + 1 + marks]


def _named(sign: str) -> str:
    if not sign:
        return "nothing"
    return f"{json.dumps(sign, ensure_ascii=False)} ({' '.join(f'U+{ord(one):04X}' for one in sign)})"


def _listed(named: dict[str, list[str]], count: int) -> str:
    listed = [f"{', '.join(pairs)} ({how})" for how, pairs in named.items()]
    return "; ".join([*listed, *([f"and {count - _NAMED} more"] if count > _NAMED else [])])


def longest_text(model: nn.Module) -> int | None:
    """How many tokens a model can read; None where its configuration does not say."""
    return getattr(decoder_config(model), "max_position_embeddings", None)


def hash_of_cluster(cluster: str) -> int:
    """A signed 64-bit hash of a cluster's name."""
    return int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:8], "little", signed=True)
