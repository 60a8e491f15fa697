"""What detection found: how often each expert was used on either side of a behaviour, and what follows
from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from steersman.errors import PlanError
from steersman.experts import risk_difference as rd
from steersman.experts.estimate import LEAST_CLUSTERS, Floats, q_values
from steersman.experts.moments import Integers
from steersman.experts.presets import preset_for
from steersman.experts.risk_difference import ClusterSums
from steersman.experts.selection import Choice, choose, ranked
from steersman.limits import Router
from steersman.steering import Architecture, ExpertEdit, Scope, Steering, canonical_json

if TYPE_CHECKING:
    import pandas

Weighting = Literal["token", "pair"]
By = Literal["risk_difference", "lower_bound"]


@dataclass(frozen=True, eq=False)
class RoutingContrast:
    """Activations of every expert over the target tokens of contrast pairs; index 0 is the positive side, 1
    the negative.

    Arrays over experts are [layers, experts], their rows the layers that have a router (`layers`, true
    indices), their columns up to the largest router's experts; `activations` is -1, everything else NaN,
    where a layer has fewer.
    """

    activations: Integers
    """int64 [2, layers, experts]: target tokens for which the expert was in the top-k."""
    tokens: Integers
    """int64 [2]: target tokens of either side."""
    sums: ClusterSums
    """Sums over clusters, in the weighting: what the errors are computed from."""
    architecture: Architecture
    weights_id: str
    cluster_ids: Integers
    """int64 [clusters], ascending: a hash of each cluster, so that no cluster enters twice."""
    pairs: int
    skipped: int = 0
    weighting: Weighting = "token"
    model: str = ""
    revision: str | None = None
    made_from: tuple[Mapping[str, Any], ...] = field(default=())
    order: Integers | None = None
    """Only of an imported ranking: its own order, best first, as places in [layers, experts] counted row by
    row (int64). It has counts but no clusters: every error is NaN."""

    @property
    def imported(self) -> bool:
        """Whether this is a ranking from elsewhere, which keeps its order and has no errors."""
        return self.order is not None

    @property
    def routers(self) -> tuple[Router, ...]:
        """The routers that were counted, by layer."""
        return tuple(router for router in self.architecture.routers if router.steerable)

    @property
    def layers(self) -> list[int]:
        """True layer index of each row."""
        return [router.layer for router in self.routers]

    @property
    def top_k(self) -> list[int]:
        """How many experts each row's router chooses."""
        return [router.top_k for router in self.routers]

    @property
    def clusters(self) -> int:
        """Number of independent units: pairs, or groups of pairs."""
        return self.sums.clusters

    @cached_property
    def valid(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Where a layer has an expert, bool [layers, experts]."""
        return np.asarray(self.activations[0] >= 0)

    @cached_property
    def rates(self) -> Floats:
        """Activation rates, float64 [2, layers, experts]."""
        return np.where(self.valid, rd.rates(self.sums), np.nan)

    @cached_property
    def risk_difference(self) -> Floats:
        """Δ = rate on the positive side minus rate on the negative, float64 [layers, experts]."""
        return np.where(self.valid, rd.risk_difference(self.sums), np.nan)

    @cached_property
    def standard_error(self) -> Floats:
        """Cluster-robust standard error of Δ; NaN below 20 clusters."""
        return np.where(self.valid, rd.standard_error(self.sums), np.nan)

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """t interval of Δ at a confidence level: (low, high); NaN below 20 clusters."""
        low, high = rd.interval(self.sums, level)
        return np.where(self.valid, low, np.nan), np.where(self.valid, high, np.nan)

    @cached_property
    def p_values(self) -> Floats:
        """Two-sided p-values of Δ = 0; NaN below 20 clusters."""
        return np.where(self.valid, rd.p_values(self.sums), np.nan)

    @cached_property
    def q_values(self) -> Floats:
        """Benjamini-Hochberg q over all layers and experts; NaN below 20 clusters."""
        return q_values(self.p_values, self.valid)

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 over the counts and what they are counts of."""
        digest = hashlib.sha256(
            canonical_json([self.architecture.id, self.weights_id, self.weighting, self.pairs]).encode()
        )
        arrays = [self.activations, self.tokens, self.cluster_ids]
        for array in arrays if self.order is None else [*arrays, self.order]:
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()

    def ranking(self, by: By = "risk_difference", *, reverse: bool = False) -> list[tuple[int, int, float]]:
        """(layer, expert, Δ), best first.

        By |Δ|, or with `lower_bound` by |Δ| less the reach of its 95% interval (below 0 where that holds 0).
        With `reverse` the sides are swapped, so that Δ changes its sign.
        """
        delta = -self.risk_difference if reverse else self.risk_difference
        if by == "risk_difference":
            return ranked(delta, self.layers, merit=self._merit_of_order())
        if by != "lower_bound":
            raise PlanError(f"by={by!r} is unknown: use 'risk_difference' or 'lower_bound'")
        if self.imported:
            raise PlanError('by="lower_bound" needs intervals, and an imported ranking has none')
        if self.clusters < LEAST_CLUSTERS:
            raise PlanError(
                f'by="lower_bound" needs at least {LEAST_CLUSTERS} clusters, there are {self.clusters}'
            )
        low, high = self.interval()
        nearest = np.where(
            self.risk_difference > 0, low, -high
        )  # the end on the side of 0, which is never cut
        return ranked(delta, self.layers, merit=nearest)

    def _merit_of_order(self) -> Floats | None:
        """[layers, experts], the larger the earlier in an imported ranking; None where |Δ| ranks."""
        if self.order is None:
            return None
        merit = np.full(self.valid.size, -np.inf)
        merit[self.order] = -np.arange(len(self.order), dtype=np.float64)
        return merit.reshape(self.valid.shape)

    def choose(
        self,
        *,
        activate: int | None = None,
        deactivate: int | None = None,
        top: int | None = None,
        reverse: bool = False,
        by: By = "risk_difference",
        strength: float = 1.0,
    ) -> Choice:
        """The experts that `select` would take, and those it would have to skip."""
        routers = {router.layer: router for router in self.routers}
        ranking = self.ranking(by, reverse=reverse)
        # At strength 0 the signs still keep the limits: they are what a plan scaled up again would have.
        return choose(
            ranking, routers, activate=activate, deactivate=deactivate, top=top, strength=strength or 1.0
        )

    def select(
        self,
        *,
        activate: int | None = None,
        deactivate: int | None = None,
        top: int | None = None,
        reverse: bool = False,
        preset: str | None = None,
        by: By = "risk_difference",
        scope: Scope = "all",
        strength: float = 1.0,
    ) -> Steering:
        """A steering toward the positive side: experts with Δ > 0 activated, with Δ < 0 deactivated, largest
        |Δ| first.

        Args:
            activate: How many experts to activate.
            deactivate: How many experts to deactivate.
            top: How many of the largest |Δ| whatever their sign, instead of the other two.
            reverse: Swap the sides first: steer toward the negative side.
            preset: A published size by name (`steersman.experts.presets`), instead of the three numbers.
            by: Rank by |Δ|, or by |Δ| less the reach of its interval.
            scope: Which tokens to steer.
            strength: 0 to 1, the size of every λ.

        Raises:
            PlanError: fewer experts than asked for, or a preset for another architecture. What breaks a
                router's limit is skipped, in rank order, and listed in the steering's
                `provenance["skipped"]`.
        """
        if not 0 <= strength <= 1:
            raise PlanError(
                f"strength {strength:g} must lie between 0 and 1; use reverse for the other direction"
            )
        if preset is not None:
            if (activate, deactivate, top) != (None, None, None):
                raise PlanError("a preset says how many experts: give it alone, or numbers alone")
            published = preset_for(preset, self.architecture)
            activate, deactivate = published.activate, published.deactivate
        choice = self.choose(
            activate=activate, deactivate=deactivate, top=top, reverse=reverse, by=by, strength=strength
        )
        strengths = {
            layer: {expert: sign * strength for expert, sign in experts.items()}
            for layer, experts in choice.signs.items()
        }
        asked = {"activate": activate, "deactivate": deactivate, "top": top, "preset": preset}
        return Steering(
            edits=(ExpertEdit(strengths, scope),),
            architecture=self.architecture,
            weights_id=self.weights_id,
            model=self.model,
            revision=self.revision,
            provenance={
                "made": "selection",
                "by": by,
                "reverse": reverse,
                **{name: value for name, value in asked.items() if value is not None},
                "skipped": list(choice.skipped),
                "from": [{"kind": "routing_contrast", "sha256": self.sha256}, *map(dict, self.made_from)],
            },
        )

    def table(self) -> pandas.DataFrame:
        """One row an expert, largest |Δ| first; an imported ranking in its own order."""
        import pandas

        rows, columns = np.nonzero(self.valid)
        low, high = self.interval()
        frame = pandas.DataFrame(
            {
                "layer": np.array(self.layers)[rows],
                "expert": columns,
                "activations_positive": self.activations[0][rows, columns],
                "activations_negative": self.activations[1][rows, columns],
                "rate_positive": self.rates[0][rows, columns],
                "rate_negative": self.rates[1][rows, columns],
                "risk_difference": self.risk_difference[rows, columns],
                "standard_error": self.standard_error[rows, columns],
                "low": low[rows, columns],
                "high": high[rows, columns],
                "p": self.p_values[rows, columns],
                "q": self.q_values[rows, columns],
            }
        )
        merit = self._merit_of_order()
        best = frame["risk_difference"].abs() if merit is None else merit[rows, columns]
        order = np.lexsort((frame["expert"], frame["layer"], -best))
        return frame.iloc[order].reset_index(drop=True)

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the contrast as a folder (manifest.json, tensors.safetensors), atomically."""
        from steersman.artifacts import save_contrast

        save_contrast(self, folder, force=force)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> RoutingContrast:
        """Read a contrast from a folder or the Hub.

        Raises `ArtifactError` for anything damaged, foreign or newer.
        """
        from steersman.artifacts import load_contrast

        return load_contrast(source, revision=revision)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the contrast to the Hugging Face Hub; returns the commit's address."""
        from steersman.artifacts import push_folder

        return push_folder(self.save_pretrained, repo_id, **options)


def merge_contrasts(contrasts: Iterable[RoutingContrast]) -> RoutingContrast:
    """Add the counts of shards: the very result of one run over all their pairs.

    Raises:
        PlanError: the shards are of different models or weightings, or a cluster (a pair, a group) is in two
            of them.
    """
    shards = list(contrasts)
    if not shards:
        raise PlanError("there is nothing to merge: give at least one contrast")
    total = shards[0]
    for shard in shards[1:]:
        total = _merge_two(total, shard)
    return total


def _merge_two(one: RoutingContrast, other: RoutingContrast) -> RoutingContrast:
    for what in ("weights_id", "weighting"):
        if getattr(one, what) != getattr(other, what):
            raise PlanError(f"these contrasts differ in their {what.replace('_', ' ')} and cannot be merged")
    if one.imported or other.imported:
        raise PlanError("an imported ranking cannot be merged: nobody knows which pairs are in it")
    if one.architecture.id != other.architecture.id:
        raise PlanError("these contrasts are of different architectures and cannot be merged")
    shared = np.intersect1d(one.cluster_ids, other.cluster_ids)
    if len(shared):
        raise PlanError(
            f"{len(shared)} clusters (pairs or groups) are in two shards: "
            "a shard was given twice, or it splits a group"
        )
    return replace(
        one,
        activations=np.where(one.activations < 0, -1, one.activations + other.activations),
        tokens=one.tokens + other.tokens,
        sums=one.sums + other.sums,
        cluster_ids=np.sort(np.concatenate([one.cluster_ids, other.cluster_ids])),
        pairs=one.pairs + other.pairs,
        skipped=one.skipped + other.skipped,
        made_from=(*one.made_from, *other.made_from),
    )
