"""How experts are counted: which tokens, weighted how, in how many parts; checked before any work."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass

import numpy as np

from steersman.errors import PairsError, whole_number
from steersman.experts.moments import Integers
from steersman.experts.strata import POSITION_STRATA, stratum_of
from steersman.experts.tally import Counted, Weighting
from steersman.rendering import Part
from steersman.shards import Shard

MOST_REPLICATES = 10_000
"""Each keeps counts of its own: more would fill memory before they told more."""


@dataclass(frozen=True)
class Options:
    """How to count."""

    weighting: Weighting
    counted: Counted
    new_tokens: int
    starts: tuple[int, ...] | None
    bootstrap: int
    shard: Shard | None
    batch_size: int
    truncate: bool

    @property
    def parts(self) -> tuple[int, ...]:
        """First positions of the strata that tokens are counted in; one where they are not told apart."""
        return self.starts or (0,)

    def strata_of(self, targets: Sequence[Sized]) -> list[Integers]:
        """The stratum of each target token of each text."""
        return [stratum_of(np.arange(len(target)), self.parts) for target in targets]

    def lengths(self, targets: Sequence[Sized]) -> Integers:
        """Target tokens of texts by stratum, int64 [texts, strata]."""
        return np.stack([np.bincount(one, minlength=len(self.parts)) for one in self.strata_of(targets)])


def options_of(
    weighting: Weighting,
    tokens: Part,
    generate: int,
    stratify: str | None,
    bootstrap: int,
    shard: str | None,
    *,
    batch_size: int,
    truncate: bool,
) -> Options:
    """Check how to count. Raises PairsError for what is unknown or does not go together."""
    for name, value, known in (
        ("weighting", weighting, ("token", "pair")),
        ("tokens", tokens, ("target", "prompt", "answer")),
        ("stratify", stratify, (None, "position")),
    ):
        if value not in known:
            words = " or ".join(repr(word) for word in known if word is not None)
            raise PairsError(f"{name}={value!r} is unknown: use {words}")
    batch_size = whole_number("batch_size", batch_size, 1, PairsError)
    generate = whole_number("generate", generate, 0, PairsError)
    bootstrap = whole_number("bootstrap", bootstrap, 0, PairsError)
    if bootstrap > MOST_REPLICATES:
        raise PairsError(
            f"bootstrap is {bootstrap}: give at most {MOST_REPLICATES}; 1000 tell a share to within 0.03"
        )
    if generate and tokens != "target":
        raise PairsError(f"generate counts what the model writes: leave out tokens={tokens!r}")
    if stratify and weighting == "pair":
        raise PairsError("strata weigh tokens by position: leave out weighting='pair', or stratify")
    return Options(
        weighting=weighting,
        counted="generated" if generate else tokens,
        new_tokens=generate,
        starts=POSITION_STRATA if stratify else None,
        bootstrap=bootstrap,
        shard=None if shard is None else Shard.parse(shard),
        batch_size=batch_size,
        truncate=truncate,
    )
