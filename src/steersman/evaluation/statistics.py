"""Rates, paired differences, clustered means and the random control, with their intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95
"""Confidence level of every interval that does not say otherwise."""

Groups = Sequence[Hashable]
"""What each observation belongs to: those of one group (a topic, a document) are not independent."""

REPLICATES = 1_999
"""Draws of the cluster bootstrap."""

FLIPS = 9_999
"""Random sign flips of whole groups, where exact enumeration is out of reach."""


class _Figures:
    """A figure that can be written as JSON: plain numbers, None where a number does not exist."""

    def to_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {name: _json_value(value) for name, value in fields.items()}


@dataclass(frozen=True)
class Rate(_Figures):
    """A share of `count` observations, with its Wilson score interval.

    `effective_count` is the size that the interval was computed at: `count`, or less where groups make
    observations alike.
    """

    successes: int
    count: int
    rate: float
    low: float
    high: float
    level: float
    effective_count: float
    method: str


@dataclass(frozen=True)
class PairedDifference(_Figures):
    """Rate of the second condition minus rate of the first, both measured on the same items.

    `only_first` and `only_second` count the items on which just one of the two was a success: all that the
    difference rests on. `p` tests a difference of zero; `test` says how.
    """

    difference: float
    low: float
    high: float
    level: float
    count: int
    groups: int
    only_first: int
    only_second: int
    effective_count: float
    method: str
    p: float
    test: str


@dataclass(frozen=True)
class Mean(_Figures):
    """A mean with its cluster-robust t interval; NaN limits where there are fewer than two groups."""

    mean: float
    low: float
    high: float
    level: float
    standard_error: float
    count: int
    groups: int


@dataclass(frozen=True)
class MeanDifference(_Figures):
    """Mean of a number under the second condition minus its mean under the first, over the same items.

    Interval and p-value are those of a cluster-robust t test of the items' differences; NaN where there are
    fewer than two groups.
    """

    difference: float
    low: float
    high: float
    level: float
    standard_error: float
    count: int
    groups: int
    p: float
    test: str


@dataclass(frozen=True)
class RandomControl(_Figures):
    """An observed effect among the effects of random plans of the same shape; `p` is one-sided but where
    `random_control` was asked for two sides."""

    observed: float
    draws: tuple[float, ...]
    at_least: int
    p: float
    mean: float
    standard_deviation: float


def wilson(successes: int, count: int, *, level: float = LEVEL) -> Rate:
    """Share of successes among `count` independent observations with Wilson's score interval (Wilson 1927).

    Raises ValueError where the numbers cannot be counts.
    """
    return _wilson(successes, count, float(count), level, "Wilson score")


def rate(outcomes: ArrayLike, groups: Groups | None = None, *, level: float = LEVEL) -> Rate:
    """Share of true outcomes [n] with a Wilson interval, at the effective count where there are groups.

    The effective number is n over the design effect (variance between groups over the variance of independent
    observations, never below 1), times (z/t)² for the few degrees of freedom, as Korn and Graubard (1998) do
    for the exact interval. Where every outcome is the same the design effect cannot be estimated and is taken
    as 1.
    """
    values = _outcomes(outcomes)
    codes, clusters = _codes(groups, values.size)
    effective = _effective_count(values, codes, clusters, level)
    method = "Wilson score" if clusters == values.size else "Wilson score at the effective count of clusters"
    return _wilson(int(values.sum()), values.size, effective, level, method)


def paired_difference(
    first: ArrayLike, second: ArrayLike, groups: Groups | None = None, *, level: float = LEVEL
) -> PairedDifference:
    """Rate of `second` minus rate of `first` over the same items, bool [n] each.

    The interval is Tango's score interval for paired proportions (Statistics in Medicine 17, 891-908, 1998);
    it keeps its coverage where a rate is 0 or 1, which a Wald interval does not. With groups it is computed
    at the effective number of items (see `rate`). The p-value is the exact McNemar test; with groups, its
    counterpart that flips the sign of whole groups.
    """
    a, b = _outcomes(first), _outcomes(second)
    if a.size != b.size:
        raise ValueError(f"paired outcomes differ in length: {a.size} and {b.size}")
    codes, clusters = _codes(groups, a.size)
    change = b - a
    only_first, only_second = int((change < 0).sum()), int((change > 0).sum())
    effective = _effective_count(change, codes, clusters, level)
    shrink = effective / a.size
    low, high = _tango(only_second * shrink, only_first * shrink, effective, level)
    clustered = clusters < a.size
    return PairedDifference(
        difference=float(change.mean()),
        low=low,
        high=high,
        level=level,
        count=a.size,
        groups=clusters,
        only_first=only_first,
        only_second=only_second,
        effective_count=effective,
        method="Tango score" + (" at the effective count of clusters" if clustered else ""),
        p=_sign_flip_p(change, codes, clusters) if clustered else mcnemar_p(only_first, only_second),
        test="sign flips of whole groups" if clustered else "exact McNemar",
    )


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p-value: is the split of the discordant items compatible with a fair coin?"""
    return float(mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue)


def clustered_mean(values: ArrayLike, groups: Groups | None = None, *, level: float = LEVEL) -> Mean:
    """Mean of `values` [n] with a t interval of G−1 degrees of freedom over G groups.

    se² = G/(G−1) Σ_g (Σ_{i∈g} (x_i − x̄))² / n².
    """
    x = np.asarray(values, dtype=np.float64)
    _require(x.ndim == 1 and x.size > 0, "a mean needs at least one value")
    codes, clusters = _codes(groups, x.size)
    error = math.sqrt(_clustered_variance(x, codes, clusters))
    half = float(stats.t.ppf((1 + level) / 2, clusters - 1)) * error if clusters > 1 else math.nan
    mean = float(x.mean())
    return Mean(mean, mean - half, mean + half, level, error, x.size, clusters)


def mean_difference(
    first: ArrayLike, second: ArrayLike, groups: Groups | None = None, *, level: float = LEVEL
) -> MeanDifference:
    """Mean of `second` − `first`, numbers [n] of the same items (see `clustered_mean` for the error)."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    _require(a.shape == b.shape, f"paired values differ in length: {a.size} and {b.size}")
    found = clustered_mean(b - a, groups, level=level)
    return MeanDifference(
        difference=found.mean,
        low=found.low,
        high=found.high,
        level=level,
        standard_error=found.standard_error,
        count=found.count,
        groups=found.groups,
        p=_t_test(found),
        test="t test over groups" if found.groups < found.count else "paired t test",
    )


def bootstrap_interval(
    values: ArrayLike, groups: Groups | None = None, *, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [n] when whole groups are drawn again (cluster bootstrap).

    NaN where there are fewer than two groups. The draws are the same every time.
    """
    x = np.asarray(values, dtype=np.float64)
    _require(x.ndim == 1 and x.size > 0, "an interval needs at least one value")
    codes, clusters = _codes(groups, x.size)
    if clusters < 2:
        return math.nan, math.nan
    found = stats.bootstrap(
        (np.bincount(codes, weights=x), np.bincount(codes).astype(np.float64)),
        lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=REPLICATES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for how many there are (Holm 1979); those that do not exist stay None.

    Written out: statsmodels' multipletests collects garbage at every call, which takes longer than all else.
    """
    known = [place for place, value in enumerate(values) if value is not None and not math.isnan(value)]
    adjusted: list[float | None] = [None] * len(values)
    if known:
        given = np.array([values[place] for place in known], dtype=np.float64)
        order = np.argsort(given, kind="stable")
        steps = given[order] * np.arange(len(known), 0, -1)
        for place, value in zip(order, np.minimum(np.maximum.accumulate(steps), 1.0), strict=True):
            adjusted[known[place]] = float(value)
    return adjusted


def detectable_difference(
    count: float, discordant: float = 0.0, *, level: float = LEVEL, power: float = 0.8
) -> float:
    """The smallest difference of paired rates that a two-sided test on `count` items finds with some power.

    By the sample size of McNemar's test (Connor, Biometrics 43, 1987): δ√n = z_α√ψ + z_β√(ψ − δ²), where ψ,
    the share of items on which the conditions differ, is `discordant` or, where that is less, δ itself (all
    items that change change the same way). 1 where even that is too little.
    """
    _require(count > 0 and 0 <= discordant <= 1, "a detectable difference needs items and a share of them")
    alpha, beta = stats.norm.ppf((1 + level) / 2), stats.norm.ppf(power)

    def excess(delta: float) -> float:
        share = max(discordant, delta)
        needed = alpha * math.sqrt(share) + beta * math.sqrt(max(share - delta**2, 0.0))
        return float(delta * math.sqrt(count) - needed)

    return 1.0 if excess(1.0) <= 0 else float(optimize.brentq(excess, 1e-9, 1.0, xtol=1e-9))


def random_control(observed: float, draws: ArrayLike, *, two_sided: bool = False) -> RandomControl:
    """p = (1 + #{D_random ≥ D}) / (B + 1): the share of plans, this one counted, that do at least as much.

    `two_sided` compares sizes, |D_random| ≥ |D|: a direction that is chosen after D was seen, and compared by
    itself, would find something twice as often as p says.

    Never 0: with B draws the smallest possible value is 1/(B + 1) (Phipson and Smyth 2010).
    """
    values = np.asarray(draws, dtype=np.float64)
    _require(values.ndim == 1 and values.size > 0, "a random control needs at least one draw")
    _require(
        math.isfinite(observed) and bool(np.isfinite(values).all()), "a random control needs finite effects"
    )
    as_much = np.abs(values) >= abs(observed) if two_sided else values >= observed
    at_least = int(as_much.sum())
    spread = float(values.std(ddof=1)) if values.size > 1 else math.nan
    p = (1 + at_least) / (values.size + 1)
    return RandomControl(float(observed), tuple(values.tolist()), at_least, p, float(values.mean()), spread)


def _t_test(found: Mean) -> float:
    """Two-sided p of a mean of 0."""
    if found.groups < 2:
        return math.nan
    if found.standard_error == 0:
        return 1.0 if found.mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(found.mean) / found.standard_error, found.groups - 1))


def _wilson(successes: int, count: int, effective: float, level: float, method: str) -> Rate:
    _require(count > 0 and 0 <= successes <= count, f"{successes} successes of {count} is not a rate")
    share = successes / count
    low, high = proportion_confint(share * effective, effective, alpha=1 - level, method="wilson")
    low = 0.0 if successes == 0 else float(low)  # not 1e-17
    high = 1.0 if successes == count else float(high)
    return Rate(successes, count, share, low, high, level, effective, method)


def _tango(gained: float, lost: float, count: float, level: float) -> tuple[float, float]:
    """The differences δ that the score test (gained − lost − nδ) / sqrt(n(2q + δ(1 − δ))) = ±z just keeps.

    q is the restricted estimate of the probability of a loss. The counts may be fractions of items.
    """
    z = float(stats.norm.ppf((1 + level) / 2))
    estimate = (gained - lost) / count

    def score(delta: float) -> float:
        linear = -gained - lost + (2 * count - gained + lost) * delta
        root = math.sqrt(max(linear**2 + 8 * count * lost * delta * (1 - delta), 0.0))
        variance = count * (2 * (root - linear) / (4 * count) + delta * (1 - delta))
        return (gained - lost - count * delta) / math.sqrt(max(variance, 1e-300))

    def limit(target: float, low: float, high: float) -> float:
        crossing: Callable[[float], float] = lambda delta: score(delta) - target  # noqa: E731
        return float(optimize.brentq(crossing, low, high, xtol=1e-12))

    edge = 1 - 1e-12
    lower = -1.0 if estimate <= -edge else limit(z, -edge, estimate)
    upper = 1.0 if estimate >= edge else limit(-z, estimate, edge)
    return lower, upper


def _effective_count(x: NDArray[np.float64], codes: NDArray[np.intp], clusters: int, level: float) -> float:
    """n / design effect · (z/t)², and n itself where each observation is its own group."""
    if clusters == x.size:
        return float(x.size)
    _require(clusters > 1, "an interval over groups needs at least two groups")
    independent = float(x.var()) / (x.size - 1)
    effect = _clustered_variance(x, codes, clusters) / independent if independent > 0 else 1.0
    few = stats.norm.ppf((1 + level) / 2) / stats.t.ppf((1 + level) / 2, clusters - 1)
    return float(x.size / max(effect, 1.0) * few**2)


def _clustered_variance(x: NDArray[np.float64], codes: NDArray[np.intp], clusters: int) -> float:
    if clusters < 2:
        return math.nan
    sums = np.bincount(codes, weights=x - x.mean(), minlength=clusters)
    return float(clusters / (clusters - 1) * (sums**2).sum() / x.size**2)


def _sign_flip_p(change: NDArray[np.float64], codes: NDArray[np.intp], clusters: int) -> float:
    """Two-sided: how often is the difference as large when conditions swap in random groups?

    All swaps where they are few, FLIPS random ones otherwise. Written out: scipy's permutation test draws one
    by one, which takes longer than all other figures of a task.
    """
    sums = np.bincount(codes, weights=change, minlength=clusters)
    sums = sums[sums != 0]
    if sums.size < 2:
        return 1.0
    observed = abs(sums.sum()) - 1e-9  # sums of whole numbers
    if 2**sums.size <= FLIPS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=sums.size)))
        return float((np.abs(signs @ sums) >= observed).mean())
    drawn = np.random.default_rng(0).integers(0, 2, size=(FLIPS, sums.size))
    at_least = int((np.abs((2.0 * drawn - 1.0) @ sums) >= observed).sum())
    return (1 + at_least) / (FLIPS + 1)


def _codes(groups: Groups | None, count: int) -> tuple[NDArray[np.intp], int]:
    """Consecutive numbers of the groups and how many there are; without groups each observation is one."""
    if groups is None:
        return np.arange(count), count
    _require(len(groups) == count, f"{len(groups)} groups for {count} observations")
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.intp)
    return codes, len(numbers)


def _outcomes(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    _require(array.ndim == 1 and array.size > 0, "outcomes must be one row of at least one value")
    _require(bool(np.isin(array, (0.0, 1.0)).all()), "outcomes must be true or false")
    return array


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json_value(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
