"""A place in an evaluation: a value with the JSON pointer to it, so that numbers can be traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MISSING = "–"
"""What stands where there is no number."""


@dataclass(frozen=True)
class Number:
    """A number as it is read, with its value and the JSON pointer (RFC 6901) to it."""

    pointer: str
    value: float
    text: str


Piece = str | Number
"""A stretch of a sentence or of a table's cell."""


@dataclass(frozen=True)
class Place:
    """A value of the evaluation and the pointer to it; `place["tasks"][0]` leads on."""

    value: Any
    pointer: str = ""

    def __getitem__(self, key: str | int) -> Place:
        token = str(key).replace("~", "~0").replace("/", "~1")
        return Place(self.value[key], f"{self.pointer}/{token}")

    def __iter__(self) -> Iterator[Place]:
        """The entries of a list, or the values of an object."""
        keys = self.value if isinstance(self.value, dict) else range(len(self.value))
        return (self[key] for key in keys)

    def __bool__(self) -> bool:
        """Whether there is anything: false for null and for what is empty."""
        return self.value is not None and self.value not in ({}, [], "")

    def get(self, key: str) -> Place:
        """What an object holds under a key; a place of nothing where it does not have it."""
        return self[key] if self and key in self.value else Place(None)

    def number(self, form: Callable[[float], str]) -> Piece:
        """The number at this place, written by `form`; a dash where there is none."""
        if self.value is None:
            return MISSING
        return Number(self.pointer, self.value, form(self.value))


def plain(pieces: tuple[Piece, ...]) -> str:
    """Pieces as text."""
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)
