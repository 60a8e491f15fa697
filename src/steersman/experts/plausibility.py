"""Whether stored counts and sums can be what they claim to be: what a reader of contrasts checks.

That such numbers were really counted only a hash can tell; these are the relations that hold between counts,
sums over clusters and sums of products, whatever was counted.
"""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import numpy as np

from steersman.errors import ArtifactError
from steersman.experts.bootstrap import Replicates, poisson_weights
from steersman.experts.moments import Integers
from steersman.experts.profile import ExpertProfile
from steersman.experts.risk_difference import ClusterSums
from steersman.experts.strata import StratumSums, halves
from steersman.limits import Router


def check_counts(activations: Integers, tokens: Integers, routers: list[Router]) -> None:
    """Raise ArtifactError where counts [2, layers, experts] cannot be those of so many tokens."""
    for row, router in enumerate(routers):
        counts, padding = activations[:, row, : router.experts], activations[:, row, router.experts :]
        if (padding != -1).any() or (counts < 0).any() or (counts > tokens[:, None]).any():
            raise ArtifactError(f"layer {router.layer}: impossible activation counts")
        # As Python integers: a sum that leaves 64 bits could come round to the right number.
        if (counts.astype(object).sum(axis=1) != tokens.astype(object) * router.top_k).any():
            raise ArtifactError(
                f"layer {router.layer}: counts do not add up to {router.top_k} experts a token"
            )


def check_sums(
    sums: ClusterSums, activations: Integers, tokens: Integers, weighting: str, pairs: int
) -> None:
    """Raise ArtifactError where the sums cannot be of these counts: in the weighting by tokens the same, by
    pairs of as many pairs.
    """
    for side, (uses, total) in enumerate(((sums.a1, sums.n1), (sums.a2, sums.n2))):
        used = np.maximum(activations[side], 0)
        if weighting == "token":
            fits = total == tokens[side] and np.array_equal(uses, used)
        else:
            fits = (
                total > 0
                and total % pairs == 0
                and bool(((uses <= total) & ((uses > 0) <= (used > 0))).all())
            )
        if not fits or total < 1:
            raise ArtifactError("the sums over clusters are not those of the activations")
    exact = {field.name: _exact(getattr(sums, field.name)) for field in fields(sums)}
    if not sums.clusters:  # an imported ranking: counts, and nothing of how they spread
        if any(np.any(value) for name, value in exact.items() if name not in ("a1", "a2", "n1", "n2")):
            raise ArtifactError("an imported ranking has no sums of products over clusters")
        return
    for one, other in itertools.combinations_with_replacement(("a1", "a2", "n1", "n2"), 2):
        possible = _possible(
            exact[one + other],
            (exact[one], exact[other]),
            (exact[one + one], exact[other + other]),
            sums.clusters,
            same=one == other,
        )
        if one == other:
            possible &= exact[one + other] <= exact[f"n{one[1]}" * 2]  # a ≤ n in each
        if (one, other) == ("n1", "n2"):  # no cluster without a token on either side
            possible &= exact[one + other] >= max(sums.n1, sums.n2)
        if not np.all(possible):
            raise ArtifactError(f"sums.{one}{other} cannot be a sum of products over clusters")


def check_strata(strata: StratumSums, sums: ClusterSums) -> None:
    """Raise ArtifactError where the sums by strata do not add up to the plain ones, or cannot be sums."""
    number, columns = len(strata.starts), strata.columns
    a, an = _exact(strata.a), _exact(strata.an)
    aa = {pair: _exact(strata.aa[place]) for place, pair in enumerate(halves(columns))}
    nn = dict(zip(halves(columns), strata.nn, strict=True))
    sides = (range(number), range(number, columns))
    whole = {
        "n": [sum(strata.n[j] for j in side) for side in sides] == [sums.n1, sums.n2],
        "a": all(
            _equal(sum(a[j] for j in side), of) for side, of in zip(sides, (sums.a1, sums.a2), strict=True)
        ),
        "an": all(
            _equal(sum(an[j, k] for j in sides[s] for k in sides[t]), getattr(sums, f"a{s + 1}n{t + 1}"))
            for s in (0, 1)
            for t in (0, 1)
        ),
    }
    for s, t in ((0, 0), (0, 1), (1, 1)):
        for name, products in (("aa", aa), ("nn", nn)):
            total = sum(products[min(j, k), max(j, k)] for j in sides[s] for k in sides[t])
            plain = getattr(sums, f"{name[0]}{s + 1}{name[1]}{t + 1}")
            whole[name] = whole.get(name, True) and _equal(total, plain)
    for name, fits in whole.items():
        if not fits or strata.clusters != sums.clusters:
            raise ArtifactError(f"strata.{name} does not add up to the sums without strata")
    for j, k in halves(columns):
        possible = _possible(aa[j, k], (a[j], a[k]), (aa[j, j], aa[k, k]), strata.clusters, same=j == k)
        of_n = (strata.n[j], strata.n[k])
        possible &= _possible(nn[j, k], of_n, (nn[j, j], nn[k, k]), strata.clusters, same=j == k)
        possible &= aa[j, k] <= nn[j, k]
        if not np.all(possible):
            raise ArtifactError(f"the products of columns {j} and {k} of strata cannot be sums over clusters")
    for j, k in itertools.product(range(columns), repeat=2):
        squares = (aa[j, j], nn[k, k])
        possible = _possible(an[j, k], (a[j], strata.n[k]), squares, strata.clusters, same=False)
        if not np.all(possible & (an[j, k] <= nn[min(j, k), max(j, k)])):
            raise ArtifactError(f"strata.an of columns {j} and {k} cannot be a sum over clusters")


def check_replicates(
    replicates: Replicates, cluster_ids: Integers, sums: ClusterSums, routers: list[Router], weighting: str
) -> None:
    """Raise ArtifactError where replicates cannot be weighted sums of these clusters."""
    a, n = replicates.activations, replicates.tokens
    if (n < 0).any() or (a < 0).any() or (a > n[:, :, None, None]).any():
        raise ArtifactError("replicates: impossible activation counts")
    if weighting == "token":
        for row, router in enumerate(routers):
            if (a[:, :, row].astype(object).sum(axis=2) != n.astype(object) * router.top_k).any():
                raise ArtifactError(
                    f"replicates: layer {router.layer} does not add up to {router.top_k} experts a token"
                )
    for row, router in enumerate(routers):
        if a[:, :, row, router.experts :].any():
            raise ArtifactError(f"replicates: layer {router.layer} has fewer experts")
    # The weights are known from the clusters: sums lie between the least and the largest weight times all.
    sides = n.astype(object).reshape(len(n), 2, -1).sum(axis=2)
    for start in range(0, len(n), 16):
        weights = poisson_weights(cluster_ids, np.arange(start, min(start + 16, len(n))))
        for weight, found in zip(weights, sides[start : start + 16], strict=True):
            for total, side in zip((sums.n1, sums.n2), found, strict=True):
                if not int(weight.min()) * total <= side <= int(weight.max()) * total:
                    raise ArtifactError("replicates: not the weighted sums of these clusters")


def check_profile(profile: ExpertProfile) -> None:
    """Raise ArtifactError where a profile's arrays do not go together."""
    routers = profile.routers
    shape = (len(routers), max((router.experts for router in routers), default=0))
    tokens, contexts = profile.token_places, profile.context_places
    if (
        profile.uses.shape != shape
        or tokens.shape[:2] != shape
        or contexts.shape[:2] != shape
        or profile.token_uses.shape != tokens.shape
        or profile.context_weights.shape != contexts.shape
    ):
        raise ArtifactError(f"its tensors do not fit the model's routers {shape}")
    if profile.tokens < 1 or profile.texts < 1 or len(profile.word_seen) != len(profile.words):
        raise ArtifactError("its tokens, texts and words do not go together")
    check_counts(
        np.stack([profile.uses, profile.uses]), np.array([profile.tokens, profile.tokens]), list(routers)
    )
    for places, there in ((tokens, len(profile.words)), (contexts, len(profile.snippets))):
        if ((places < -1) | (places >= there)).any():
            raise ArtifactError("a token or a context that it names is not there")
    seen = np.append(profile.word_seen, 0)[tokens]  # -1 takes the 0
    most = np.minimum(seen, np.maximum(profile.uses, 0)[..., None])
    fits = np.where(tokens < 0, profile.token_uses == 0, profile.token_uses >= 1)
    if not (fits & (profile.token_uses <= most)).all() or (profile.word_seen > profile.tokens).any():
        raise ArtifactError("its counts by token cannot be of its counts by expert")


def _possible(
    product: Any, totals: tuple[Any, Any], squares: tuple[Any, Any], clusters: int, *, same: bool
) -> Any:
    """Whether a sum of products over clusters can go with the sums and the sums of squares of its factors."""
    if same:  # between all clusters alike and all in one
        return np.asarray((product * clusters >= totals[0] ** 2) & (product <= totals[0] ** 2))
    return np.asarray((product**2 <= squares[0] * squares[1]) & (product <= totals[0] * totals[1]))


def _exact(value: Any) -> Any:
    return value.astype(object) if isinstance(value, np.ndarray) else value


def _equal(one: Any, other: Any) -> bool:
    return bool(np.all(np.asarray(one == _exact(other))))
