"""Tokens that a model is given to read, and what is made of their log probabilities."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Tokens to read, and what is made of them: Σ weight · log p(token | those up to place), in nats.

    `item` is the number of the item that the sum belongs to.
    """

    item: int
    ids: tuple[int, ...]
    prompt_length: int
    scored: tuple[tuple[int, int, float], ...]
    """(place, token, weight)"""

    @property
    def read(self) -> int:
        """How many of its last places are read."""
        return len(self.ids) - self.scored[0][0]
