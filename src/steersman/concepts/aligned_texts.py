"""Texts as two models read them, with their rows: encoded and checked once, kept on disk, in units of work.

A unit is a few texts of like length. It does not depend on how the work is shared or batched, so that the
control's pairings, which stay within a unit, do not either.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from steersman.concepts.alignment import Aligned, ReadText, Rows, align
from steersman.errors import PairsError
from steersman.pairs import Content
from steersman.rendering import TruncatedTarget
from steersman.showing import count_of
from steersman.steering import sha256_of
from steersman.texts import Texts

WINDOW = 512
"""Texts are sorted by length within windows of so many."""
UNIT_TEXTS, UNIT_ROWS, FEWEST_TEXTS = 32, 1024, 4
"""A unit ends at so many texts, or at so many rows if it has the fewest texts by then."""
SAMPLE_TEXTS = 32
"""A sample has at least so many."""
HELD_OUT_IN = 5
"""One text in so many is held out, by its content."""

_IN_MEMORY = 1 << 16
Read = Callable[[Content, str], ReadText]


@dataclass(frozen=True)
class AlignedText(Aligned):
    """An aligned text, its number among all, whether it is held out, and whether it is a concept's prompt."""

    number: int
    held_out: bool
    prompt: bool = False


class AlignedTexts:
    """The texts that share rows, encoded by both models.

    Args:
        texts: What both read.
        source, target: Read a text as either model does; PairsError and TruncatedTarget pass through.
        rows: Which rows.
        truncate: Leave out what is too long for either model, instead of an error.
        progress: Show a bar on stderr where encoding takes more than a second.

    Raises:
        PairsError: a text cannot be read, none shares a row, or none is held out (or none is left to fit).
    """

    def __init__(
        self,
        texts: Texts,
        source: Read,
        target: Read,
        rows: Rows,
        *,
        truncate: bool = False,
        progress: bool = False,
    ) -> None:
        self.name, self.skipped, self.without_rows = texts.name, 0, 0
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # also where an error comes before `close`
        self._starts, self._numbers = array("q"), array("q")
        self.source_lengths = array("q")  # of all texts, 0 where one is too long
        lengths, counts, self._held_out, self._prompts = array("q"), array("q"), array("b"), array("b")
        for number, text in enumerate(
            tqdm(texts, desc="reading", unit="text", delay=1, leave=False, disable=not progress)
        ):
            self.source_lengths.append(0)
            try:
                of_source = source(text.content, text.where)
                self.source_lengths[number] = len(of_source.ids)
                aligned = align(of_source, target(text.content, text.where), rows)
            except TruncatedTarget:
                if not truncate:
                    raise
                self.skipped += 1
                continue
            if not len(aligned.source_rows):
                self.without_rows += 1
                continue
            self._numbers.append(number)
            self._held_out.append(is_held_out(text.content if text.group is None else text.group))
            self._prompts.append(text.group is not None)
            lengths.append(len(aligned.source) + len(aligned.target))
            counts.append(len(aligned.source_rows))
            self._write(aligned)
        self._check(len(texts))
        self.units = _units(np.array(lengths), np.array(counts))
        self._rows = [sum(counts[place] for place in unit) for unit in self.units]

    def __len__(self) -> int:
        return len(self._starts)

    def unit(self, number: int) -> list[AlignedText]:
        """The texts of a unit, shorter ones first."""
        return [self._read(place) for place in self.units[number]]

    def spread(self, rows: int) -> list[int]:
        """Units drawn at random, the first among them, which have about so many rows; all of them, where
        these are not twice as many, or where one part would have no texts.
        """
        if sum(self._rows) < 2 * rows:
            return list(range(len(self.units)))
        drawn, found = np.random.default_rng(0).permutation(len(self.units)), [0]
        for unit in drawn[drawn != 0].tolist():
            texts = sum(len(self.units[chosen]) for chosen in found)
            if texts >= SAMPLE_TEXTS and sum(self._rows[chosen] for chosen in found) >= rows:
                break
            found.append(unit)
        parts = {bool(self._held_out[place]) for unit in found for place in self.units[unit]}
        return sorted(found) if len(parts) == 2 else list(range(len(self.units)))

    @property
    def sha256(self) -> str:
        """Hex sha256 over ids, rows and parts, in the order of the texts."""
        digest = hashlib.sha256(bytes(self._held_out))
        self._file.seek(0)
        while content := self._file.read(1 << 20):
            digest.update(content)
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _write(self, aligned: Aligned) -> None:
        self._file.seek(0, 2)
        self._starts.append(self._file.tell())
        parts = (aligned.source, aligned.target, aligned.source_rows, aligned.target_rows)
        head = np.array([*map(len, parts), aligned.scope], np.int32)
        self._file.write(b"".join(part.astype(np.int32).tobytes() for part in (head, *parts)))

    def _read(self, place: int) -> AlignedText:
        self._file.seek(self._starts[place])
        *sizes, scope = np.frombuffer(self._file.read(20), np.int32).tolist()
        content = np.frombuffer(self._file.read(4 * sum(sizes)), np.int32)
        source, target, source_rows, target_rows = np.split(content, np.cumsum(sizes)[:-1])
        facts = self._numbers[place], bool(self._held_out[place]), bool(self._prompts[place])
        return AlignedText(source, target, source_rows, target_rows, scope, *facts)

    def _check(self, given: int) -> None:
        if not self._starts:
            why = (
                f"{self.skipped} of {given} are longer than a model reads"
                if self.skipped == given
                else "no text has a place, after its first token, at which both tokenizers end one"
            )
            raise PairsError(f"{self.name}: {why}; right are texts that both models read in full")
        held_out = sum(self._held_out)
        if held_out in (0, len(self)):
            what = "is held out" if not held_out else "is left to fit"
            raise PairsError(
                f"{self.name}: of {count_of(len(self), 'text')} none {what} (about one in {HELD_OUT_IN} is "
                "held out, by its content): give more texts"
            )


def is_held_out(content: Content) -> bool:
    """Whether a text judges the map instead of making it: alike in every run, and for texts given twice. Of a
    concept's prompts the group says so.
    """
    return int(sha256_of(content)[:8], 16) % HELD_OUT_IN == 0


def _units(lengths: Any, counts: Any) -> Sequence[Sequence[int]]:
    units: list[list[int]] = []
    for start in range(0, len(lengths), WINDOW):
        window = start + np.argsort(lengths[start : start + WINDOW], kind="stable")
        rows = UNIT_ROWS
        for place in window.tolist():
            full = rows >= UNIT_ROWS and (not units or len(units[-1]) >= FEWEST_TEXTS)
            if place == window[0] or full or len(units[-1]) >= UNIT_TEXTS:
                units.append([])
                rows = 0
            units[-1].append(place)
            rows += counts[place]
    if len(units) > 1 and len(units[-1]) < FEWEST_TEXTS:
        units[-2:] = [[*units[-2], *units[-1]]]
    return units
