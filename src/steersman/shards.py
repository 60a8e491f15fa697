"""Parts of a job that is done by many runs: which of them a thing belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from steersman.errors import PairsError


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count` parts: every `count`-th cluster of pairs (or text), in order of appearance."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise _no_shard(str(self))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `I/N`. Raises PairsError where it is something else."""
        number, slash, count = str(text).partition("/")
        if not (slash and number.isascii() and number.isdecimal() and count.isascii() and count.isdecimal()):
            raise _no_shard(text)
        return cls(int(number), int(count))

    def holds(self, cluster: int) -> bool:
        """Whether the cluster that appeared as number `cluster` (from 0) is in this part."""
        return cluster % self.count == self.number - 1


def _no_shard(text: str) -> PairsError:
    return PairsError(f"--shard {text}: right is I/N with 1 ≤ I ≤ N, such as 2/8 (in Python shard=)")
