"""Passes over the texts: which pairs of layers have their moments in memory at the same time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from steersman.concepts.joint_moments import Sides
from steersman.errors import ModelError
from steersman.showing import count_of

SHARE = 0.5
"""Of the memory that is free, what moments may take: they are solved and saved beside it."""
UNLIMITED = 1 << 62

Pairs = tuple[tuple[int, int], ...]


def memory_to_spare() -> int:
    """Bytes that moments may take on this machine, or in this container."""
    free = [_meminfo().get("MemAvailable", _physical())]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        free.append(_number(limit, UNLIMITED) - _number(used, 0))
    return int(SHARE * max(0, min(free)))


def _meminfo() -> Mapping[str, int]:
    """Of /proc/meminfo, in bytes; empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.replace(":", "").split() for line in lines)
    return {field[0]: int(field[1]) << 10 for field in fields if len(field) > 1 and field[1].isdigit()}


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _number(path: str, otherwise: int) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # "max"
        return otherwise


def passes_of(sides: Sides, *, most: int | None = None) -> tuple[Pairs, ...]:
    """The pairs of layers whose moments are summed up in each pass over the texts: all in one, where memory
    allows. A target layer's pairs are in one pass. More than one is warned of, before any work.

    Args:
        sides: The pairs.
        most: Bytes; what the machine has to spare, where nothing is given.

    Raises:
        ModelError: not even one target layer fits.
    """
    most = memory_to_spare() if most is None else most
    found: list[Pairs] = [()]
    for target in sides.target_layers:
        more = tuple(pair for pair in sides.pairs if pair[1] == target)
        if found[-1] and sides.of(found[-1] + more).bytes > most:
            found.append(())
        found[-1] += more
        if (needed := sides.of(found[-1]).bytes) > most:
            raise ModelError(
                f"the moments of target layer {target} and {count_of(len(more), 'source layer')} need "
                f"{needed / 2**30:.1f} GiB of memory, and this machine has {most / 2**30:.1f} to spare: name "
                "fewer source layers with --source-layers, or give --concept, which chooses one (in Python "
                "source_layers=, concept=)"
            )
    if len(found) > 1:
        warnings.warn(
            f"the moments of {count_of(len(sides.target_layers), 'target layer')} need "
            f"{sides.bytes / 2**30:.0f} GiB of memory, and this machine has {most / 2**30:.1f} to spare: "
            f"both models read the texts {len(found)} times; fewer target layers (--target-layers, in Python "
            "target_layers=) are fewer passes",
            stacklevel=4,
        )
    return tuple(found)
