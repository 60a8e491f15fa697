"""What has been counted so far: texts' counts added up to clusters, and clusters to exact sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from steersman.experts.bootstrap import Replicates
from steersman.experts.moments import Integers
from steersman.experts.risk_difference import ClusterSums
from steersman.experts.strata import StratumSums

Weighting = Literal["token", "pair"]
Counted = Literal["target", "prompt", "answer", "generated"]
"""Which tokens are counted: those of the target, the prompt or the answer; or those that the model writes."""

PAIR_UNIT = 1 << 40
"""With `weighting="pair"` a rate is counted in this fraction, so that sums stay exact integers."""


@dataclass
class Tally:
    """Counts, sums over clusters, and the cluster that may not be complete yet.

    Everything is an integer, so that the order of adding, and stops in between, change nothing.
    """

    activations: Integers
    """int64 [2, layers, experts]"""
    tokens: Integers
    """int64 [2]"""
    sums: ClusterSums
    strata: StratumSums | None
    replicates: Replicates | None
    weighting: Weighting = "token"
    done: int = 0
    """Pairs that were looked at."""
    counted: int = 0
    """Pairs that were counted: all but those with a side without tokens."""
    cluster_ids: list[int] = field(default_factory=list)
    open_id: int = 0
    open_counts: tuple[Integers, Integers] | None = None
    """Activations [2, strata, layers, experts] and tokens [2, strata] of the cluster counted last, in the
    weighting."""

    @classmethod
    def empty(
        cls, layers: int, experts: int, weighting: Weighting, starts: tuple[int, ...] | None, replicates: int
    ) -> Tally:
        """Nothing counted yet; `starts` are the first positions of strata, None without."""
        columns = 2 * len(starts or (0,))
        return cls(
            activations=np.zeros((2, layers, experts), np.int64),
            tokens=np.zeros(2, np.int64),
            sums=ClusterSums.zeros(layers, experts, object if weighting == "pair" else np.int64),
            strata=None if starts is None else StratumSums.zeros(layers, experts, starts),
            replicates=Replicates.zeros(replicates, columns, layers, experts) if replicates else None,
            weighting=weighting,
        )

    def add(self, clusters: Integers, counts: Any, tokens: Integers) -> None:
        """Add pairs, those of a cluster one after another.

        Args:
            clusters: int64 [pairs], each pair's cluster id.
            counts: integers [pairs, 2, strata, layers, experts].
            tokens: int64 [pairs, 2, strata]. Pairs with a side without any are left out.
        """
        self.done += len(clusters)
        used = (tokens.sum(axis=2) > 0).all(axis=1)
        if not used.all():
            clusters, counts, tokens = clusters[used], counts[used], tokens[used]
        if not len(clusters):
            return
        self.counted += len(clusters)
        self.activations += counts.sum(axis=(0, 2), dtype=np.int64)
        self.tokens += tokens.sum(axis=(0, 2))
        starts = np.flatnonzero(np.append(True, clusters[1:] != clusters[:-1]))
        if self.weighting == "pair":
            counts, tokens = _as_rates(counts.astype(np.int64), tokens)
        a = np.add.reduceat(counts, starts, axis=0, dtype=np.int64)
        n = np.add.reduceat(tokens, starts, axis=0)
        ids = clusters[starts]
        if self.open_counts is not None:
            if self.open_id == ids[0]:
                a[0] += self.open_counts[0]
                n[0] += self.open_counts[1]
            else:
                self.close()
        self._enter(ids[:-1], a[:-1], n[:-1])
        self.open_id, self.open_counts = int(ids[-1]), (a[-1].copy(), n[-1].copy())

    def close(self) -> None:
        """Enter the cluster counted last, if any, into the sums: no more of it will come."""
        if self.open_counts is not None:
            a, n = self.open_counts
            self._enter(np.array([self.open_id], np.int64), a[None], n[None])
            self.open_counts = None

    def _enter(self, ids: Integers, a: Integers, n: Integers) -> None:
        """Add complete clusters: ids, activations [clusters, 2, strata, layers, experts], tokens."""
        if not len(ids):
            return
        self.sums.add_clusters(a.sum(axis=2), n.sum(axis=2))
        columns = a.reshape(len(ids), -1, *a.shape[3:]), n.reshape(len(ids), -1)
        if self.strata is not None:
            self.strata.add(*columns)
        if self.replicates is not None:
            self.replicates.add(ids, *columns)
        self.cluster_ids += ids.tolist()

    def to_tensors(self) -> tuple[dict[str, Integers], dict[str, Any]]:
        """All of it as int64 tensors and JSON: what `from_tensors` takes."""
        tensors = {
            "activations": self.activations,
            "tokens": self.tokens,
            "cluster_ids": np.array(self.cluster_ids, np.int64),
        }
        facts: dict[str, Any] = {"done": self.done, "counted": self.counted, "open": None}
        for name, part in (("sums", self.sums), ("strata", self.strata), ("replicates", self.replicates)):
            if part is not None:
                more, facts[name] = part.to_tensors()
                tensors |= {f"{name}.{key}": value for key, value in more.items()}
        if self.open_counts is not None:
            facts["open"] = self.open_id
            tensors["open.a"], tensors["open.n"] = self.open_counts
        return tensors, facts

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Integers], facts: Mapping[str, Any], weighting: Weighting
    ) -> Tally:
        """A tally as it was when its tensors were taken."""

        def of(name: str) -> dict[str, Integers]:
            return {
                key.removeprefix(f"{name}."): value
                for key, value in tensors.items()
                if key.startswith(f"{name}.")
            }

        is_open = facts["open"] is not None
        return cls(
            activations=tensors["activations"].copy(),
            tokens=tensors["tokens"].copy(),
            sums=ClusterSums.from_tensors(of("sums"), facts["sums"]),
            strata=StratumSums.from_tensors(of("strata"), facts["strata"]) if "strata" in facts else None,
            replicates=Replicates.from_tensors(of("replicates")) if "replicates" in facts else None,
            weighting=weighting,
            done=facts["done"],
            counted=facts["counted"],
            cluster_ids=tensors["cluster_ids"].tolist(),
            open_id=facts["open"] if is_open else 0,
            open_counts=(tensors["open.a"], tensors["open.n"]) if is_open else None,
        )


def _as_rates(counts: Integers, tokens: Integers) -> tuple[Integers, Integers]:
    """Pairs' counts as rates in `PAIR_UNIT`s, rounded to the nearest, and the weight of a pair."""
    # 2^41 times a count of at most 2^21 tokens: within 64 bits.
    length = tokens[:, :, :, None, None]
    return (2 * counts * PAIR_UNIT + length) // (2 * length), np.full_like(tokens, PAIR_UNIT)
