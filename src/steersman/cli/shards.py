"""Which parts of its pairs a contrast holds, and which of them are missing, for JSON and in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from steersman.showing import on_one_line

if TYPE_CHECKING:
    from steersman import RoutingContrast

_SHARD = re.compile(r"(\d{1,9})/(\d{1,9})")
_LISTED, _NAMED = 1000, 6
"""At most so many missing parts in JSON, and in words: a file may claim a billion."""


@dataclass
class _Parts:
    """Some of the `count` parts of pairs called `name`."""

    name: str
    count: int
    numbers: set[int] = field(default_factory=set)

    def present(self) -> list[str]:
        return [f"{number}/{self.count}" for number in sorted(self.numbers)]

    def missing(self) -> list[str]:
        others = (number for number in range(1, self.count + 1) if number not in self.numbers)
        return [f"{number}/{self.count}" for number in islice(others, _LISTED)]


def shards_for_json(contrast: RoutingContrast) -> dict[str, Any]:
    """`shards` and `missing`: parts `I/N` of pairs, each list empty where the pairs are whole."""
    parts = _parts(contrast)
    return {
        "shards": [shard for part in parts for shard in part.present()],
        "missing": [shard for part in parts for shard in part.missing()],
    }


def shards_in_words(contrast: RoutingContrast) -> list[str]:
    """One line for each source of which only parts are there."""
    return [_in_words(part) for part in _parts(contrast)]


def _in_words(part: _Parts) -> str:
    present, missing = part.present(), part.missing()
    there = (
        f"shard{'s' if len(present) > 1 else ''} {_named(present, len(present))} of {on_one_line(part.name)}"
    )
    if not missing:
        return there
    lacking = part.count - len(present)
    return f"{there}: {_named(missing, lacking)} {'is' if lacking == 1 else 'are'} missing"


def _named(shards: list[str], number: int) -> str:
    more = f" and {number - _NAMED} more" if number > _NAMED else ""
    return ", ".join(shards[:_NAMED]) + more


def _parts(contrast: RoutingContrast) -> list[_Parts]:
    """The sources that are not whole, in the order in which they were given."""
    found: dict[tuple[str, int], _Parts] = {}
    for source in contrast.made_from:
        number, count = _shard(source)
        if number:
            name = str(source.get("name", "pairs"))
            parts = found.setdefault((str(source.get("sha256", name)), count), _Parts(name, count))
            parts.numbers.add(number)
    return [parts for parts in found.values() if parts.count > 1]


def _shard(source: Mapping[str, Any]) -> tuple[int, int]:
    """A source's part as (number, count); (0, 0) where it is whole, or says something else."""
    shard = _SHARD.fullmatch(str(source.get("shard", "")))
    if shard is None:
        return 0, 0
    number, count = int(shard[1]), int(shard[2])
    return (number, count) if 1 <= number <= count else (0, 0)
