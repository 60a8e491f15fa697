"""Random routing contrasts for tests that need counts but no model."""

from __future__ import annotations

import functools
from dataclasses import fields

import numpy as np

from steersman.experts.bootstrap import Replicates
from steersman.experts.contrast import RoutingContrast
from steersman.experts.risk_difference import ClusterSums
from steersman.experts.strata import StratumSums, stratum_of
from steersman.experts.tally import Weighting
from steersman.limits import Router
from steersman.steering import Architecture

PAIR_UNIT = 1 << 40

STARTS = (0, 2)
"""First positions of the strata."""
REPLICATES = 3

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
    """Counts of a pair [2, STARTS, layers, experts] and tokens of its sides: k of each layer's experts for
    each token, some of them more often than others.
    """
    random = np.random.default_rng([seed, pair])
    lengths = (int(random.integers(3, 12)), int(random.integers(3, 12)))
    experts = max(router.experts for router in routers)
    counts = np.zeros((2, len(STARTS), len(routers), experts), np.int64)
    for side, tokens in enumerate(lengths):
        strata = stratum_of(np.arange(tokens), STARTS)
        for row, router in enumerate(routers):
            liking = random.normal(size=router.experts)
            scores = liking + random.gumbel(size=(tokens, router.experts))
            chosen = np.argsort(scores, axis=1)[:, : router.top_k]
            np.add.at(counts[side, :, row], (strata[:, None], chosen), 1)
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
    everything: bool = False,
) -> RoutingContrast:
    """A contrast of pairs that are a cluster each, with ids from `first`; `scale` multiplies all counts.

    With `everything` also by strata, with replicates and a nuisance, of generated tokens.
    """
    contrast = _made(pairs, seed, weighting, scale, first, layers, weights_id, everything)
    if everything:
        nuisance = _made(pairs + 3, seed + 1, weighting, scale, first * 2, layers, weights_id, everything)
        contrast = contrast.adjusted_by(nuisance)
    return contrast


def _made(
    pairs: int,
    seed: int,
    weighting: Weighting,
    scale: int,
    first: int,
    layers: tuple[Router | None, ...],
    weights_id: str,
    everything: bool,
) -> RoutingContrast:
    made_for = architecture(*layers)
    routers = tuple(router for router in made_for.routers if router.steerable)
    shape = (len(routers), max(router.experts for router in routers))
    activations, tokens = np.zeros((2, *shape), np.int64), np.zeros(2, np.int64)
    sums = ClusterSums.zeros(*shape, object if weighting == "pair" else np.int64)
    strata, replicates = StratumSums.zeros(*shape, STARTS), Replicates.zeros(REPLICATES, 4, *shape)
    for pair in range(first, first + pairs):
        by_stratum, lengths = pair_counts(routers, seed, pair)
        if everything:
            in_strata = [
                np.bincount(stratum_of(np.arange(length), STARTS), minlength=2) for length in lengths
            ]
            columns = by_stratum.reshape(1, 4, *shape) * scale, np.concatenate(in_strata)[None] * scale
            strata.add(*columns)
            replicates.add(np.array([pair - 5]), *columns)
        counted = by_stratum.sum(axis=1)
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
        counted="generated" if everything else "target",
        new_tokens=16 if everything else 0,
        strata=strata if everything else None,
        replicates=replicates if everything else None,
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
        "alike",
        "weighting",
        "model",
        "revision",
        "sha256",
        "counted",
        "new_tokens",
        "strata",
    ):
        assert getattr(one, name) == getattr(other, name)
    for name in ("rates", "risk_difference", "standard_error", "p_values", "q_values"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    if made_from:
        assert one.made_from == other.made_from
    for part in ("replicates", "nuisance"):
        assert (getattr(one, part) is None) == (getattr(other, part) is None)
    if one.replicates is not None and other.replicates is not None:
        np.testing.assert_array_equal(one.replicates.activations, other.replicates.activations)
        np.testing.assert_array_equal(one.replicates.tokens, other.replicates.tokens)
    if one.nuisance is not None and other.nuisance is not None:
        assert_same(one.nuisance, other.nuisance, made_from=made_from)
        np.testing.assert_array_equal(one.adjusted, other.adjusted)
