"""Random routing contrasts for tests that need counts but no model."""

from __future__ import annotations

import functools
from dataclasses import fields

import numpy as np

from steersman.experts.contrast import RoutingContrast
from steersman.experts.risk_difference import ClusterSums
from steersman.experts.tally import Weighting
from steersman.limits import Router
from steersman.steering import Architecture

PAIR_UNIT = 1 << 40

ROUTERS = (
    None,
    Router(1, 8, 2, "softmax-topk"),
    Router(2, 8, 2, "softmax-topk", groups=(4, 2), shared_experts=1),
    None,
    Router(4, 6, 3, "sigmoid-topk+bias"),
)
"""Dense layers, groups, and layers that differ in their experts."""


def architecture(*layers: Router | None) -> Architecture:
    return Architecture("made_up", 32, layers or ROUTERS)


@functools.cache
def pair_counts(routers: tuple[Router, ...], seed: int, pair: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Counts of a pair [2, layers, experts] and tokens of its sides: k of each layer's experts for each
    token, some of them more often than others.
    """
    random = np.random.default_rng([seed, pair])
    lengths = (int(random.integers(3, 12)), int(random.integers(3, 12)))
    counts = np.zeros((2, len(routers), max(router.experts for router in routers)), np.int64)
    for side, tokens in enumerate(lengths):
        for row, router in enumerate(routers):
            liking = random.normal(size=router.experts)
            scores = liking + random.gumbel(size=(tokens, router.experts))
            chosen = np.argsort(scores, axis=1)[:, : router.top_k]
            counts[side, row] = np.bincount(chosen.ravel(), minlength=counts.shape[2])
    return counts, lengths


def made(
    pairs: int = 24,
    *,
    seed: int = 0,
    weighting: Weighting = "token",
    scale: int = 1,
    first: int = 0,
    layers: tuple[Router | None, ...] = ROUTERS,
    weights_id: str = "0" * 64,
) -> RoutingContrast:
    """A contrast of pairs that are a cluster each, with ids from `first`; `scale` multiplies all counts."""
    made_for = architecture(*layers)
    routers = tuple(router for router in made_for.routers if router.steerable)
    shape = (len(routers), max(router.experts for router in routers))
    activations, tokens = np.zeros((2, *shape), np.int64), np.zeros(2, np.int64)
    sums = ClusterSums.zeros(*shape, object if weighting == "pair" else np.int64)
    for pair in range(first, first + pairs):
        counted, lengths = pair_counts(routers, seed, pair)
        a, n = counted * scale, [length * scale for length in lengths]
        activations, tokens = activations + a, tokens + np.array(n)
        if weighting == "pair":
            a = np.stack([(2 * a[s].astype(object) * PAIR_UNIT + n[s]) // (2 * n[s]) for s in (0, 1)])
            n = [PAIR_UNIT, PAIR_UNIT]
        sums.add(a[0], n[0], a[1], n[1])
    for row, router in enumerate(routers):
        activations[:, row, router.experts :] = -1
    return RoutingContrast(
        activations=activations,
        tokens=tokens,
        sums=sums,
        architecture=made_for,
        weights_id=weights_id,
        cluster_ids=np.arange(first, first + pairs) - 5,
        pairs=pairs,
        skipped=1,
        weighting=weighting,
        model="somebody/model",
        revision="main",
        made_from=({"kind": "pairs", "name": f"{first}.jsonl", "sha256": "ab" * 32},),
    )


def assert_same(one: RoutingContrast, other: RoutingContrast, *, made_from: bool = True) -> None:
    """Every field equal, to the bit and the dtype."""
    for name in ("activations", "tokens", "cluster_ids"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype == np.int64
        np.testing.assert_array_equal(left, right)
    assert one.sums == other.sums
    for field in fields(ClusterSums):
        left, right = getattr(one.sums, field.name), getattr(other.sums, field.name)
        assert type(left) is type(right)
        assert getattr(left, "dtype", None) == getattr(right, "dtype", None)
    for name in (
        "architecture",
        "weights_id",
        "pairs",
        "skipped",
        "weighting",
        "model",
        "revision",
        "sha256",
    ):
        assert getattr(one, name) == getattr(other, name)
    for name in ("rates", "risk_difference", "standard_error", "p_values", "q_values"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    if made_from:
        assert one.made_from == other.made_from
