"""What detection found: how often each expert was used on either side of a behaviour, and what follows
from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from steersman.chat_record import ChatRecord, common, in_provenance, rendered_otherwise, to_json
from steersman.edits import ExpertEdit, Scope, finite_number
from steersman.errors import PlanError, each_of
from steersman.experts import risk_difference as rd
from steersman.experts import strata as st
from steersman.experts.adjustment import Adjustment, adjust, adjusted_replicates
from steersman.experts.bootstrap import Replicates
from steersman.experts.estimate import LEAST_CLUSTERS, Estimate, Floats, q_values
from steersman.experts.moments import Integers
from steersman.experts.presets import preset_for
from steersman.experts.risk_difference import ClusterSums
from steersman.experts.selection import Choice, asked_sizes, choose, ranked, stability
from steersman.experts.strata import StratumSums
from steersman.experts.tally import Counted, Weighting
from steersman.limits import Router
from steersman.models.same_weights import same_weights, with_stronger_id
from steersman.progress import differences
from steersman.showing import Shown, Table, count_of, cut, first_rows, ranges
from steersman.steering import Architecture, Steering, canonical_json
from steersman.ties import COMPUTED, ranks

if TYPE_CHECKING:
    import pandas

Kind = Literal["risk_difference", "stratified", "adjusted"]
"""A difference: plain, over positions, or with a nuisance regressed out."""
By = Literal[
    "risk_difference",
    "lower_bound",
    "stratified",
    "stratified_lower_bound",
    "adjusted",
    "adjusted_lower_bound",
]
BY: dict[str, tuple[Kind, bool]] = {
    "risk_difference": ("risk_difference", False),
    "lower_bound": ("risk_difference", True),
    "stratified": ("stratified", False),
    "stratified_lower_bound": ("stratified", True),
    "adjusted": ("adjusted", False),
    "adjusted_lower_bound": ("adjusted", True),
}
"""What ranks experts: which difference, and whether less the reach of its interval."""


@dataclass(frozen=True, eq=False, repr=False)
class RoutingContrast(Shown):
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
    """Pairs left out because they are too long, or because the model ends a side at once."""
    weighting: Weighting = "token"
    model: str = ""
    revision: str | None = None
    made_from: tuple[Mapping[str, Any], ...] = field(default=())
    chat: ChatRecord | None = None
    """How its chats were rendered; None where there were none."""
    order: Integers | None = None
    """Only of an imported ranking: its own order, best first, as places in [layers, experts] counted row by
    row (int64). It has counts but no clusters: every error is NaN."""

    counted: Counted = "target"
    """Which tokens the counts are of."""
    new_tokens: int = 0
    """Of `generated` tokens: how many each text had at most."""
    strata: StratumSums | None = None
    """The sums by position within the target."""
    replicates: Replicates | None = None
    """Of a bootstrap over clusters."""
    nuisance: RoutingContrast | None = None
    """Another contrast of the same model, which `adjusted` has regressed out."""
    alike: int = 0
    """Pairs left out because both sides are the same tokens up to the last that is counted."""

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
    def stratified(self) -> Floats:
        """Δ over strata of positions within the target (Mantel-Haenszel), float64 [layers, experts].

        Raises `PlanError` where positions were not counted.
        """
        return self.estimate("stratified").difference

    @cached_property
    def adjusted(self) -> Floats:
        """Δ less the nuisance's share, float64 [layers, experts]; of the stratified Δ where positions were
        counted.

        Raises `PlanError` where there is no nuisance.
        """
        return self.estimate("adjusted").difference

    @cached_property
    def adjustment(self) -> Adjustment:
        """The nuisance's slope b, how much of ΣΔ² it takes away, and what is left with its error (see
        `steersman.experts.adjustment.adjust`).

        Raises `PlanError` where there is no nuisance.
        """
        if self.nuisance is None:
            raise PlanError("no nuisance was counted: detect with --adjust PAIRS (in Python adjust=)")
        shared = np.intersect1d(self.cluster_ids, self.nuisance.cluster_ids)
        return adjust(
            self.estimate(self._base), self.nuisance.estimate(self._base), dependent=bool(len(shared))
        )

    @property
    def _base(self) -> Kind:
        """What a nuisance is regressed out of."""
        return "risk_difference" if self.strata is None else "stratified"

    def estimate(self, kind: Kind = "risk_difference") -> Estimate:
        """A difference with its standard error, from which intervals and p-values follow.

        Raises:
            PlanError: what it needs was not counted.
        """
        if kind == "adjusted":
            return self.adjustment.estimate
        if kind == "risk_difference":
            return Estimate(self.risk_difference, self.standard_error, self.clusters)
        if kind != "stratified":
            raise PlanError(f"estimate {kind!r} is unknown: use risk_difference, stratified or adjusted")
        return self._stratified

    @cached_property
    def _stratified(self) -> Estimate:
        if self.strata is None:
            raise PlanError(
                "positions were not counted: detect with --stratify position (in Python stratify=)"
            )
        return st.estimate(self.strata).where(self.valid)

    def _replicated(self, kind: Kind) -> Floats:
        """The difference in each replicate, [replicates, layers, experts]."""
        if self.replicates is None:
            raise PlanError("there are no replicates: detect with --bootstrap 200 (in Python bootstrap=)")
        a, n = self.replicates.activations, self.replicates.tokens
        if kind == "adjusted":
            if self.nuisance is None:
                raise PlanError("no nuisance was counted: detect with --adjust PAIRS (in Python adjust=)")
            return adjusted_replicates(self._replicated(self._base), self.nuisance._replicated(self._base))
        if kind == "risk_difference":  # the columns of a side are its strata
            a = a.reshape(len(a), 2, -1, *a.shape[2:]).sum(axis=2)
            n = n.reshape(len(n), 2, -1).sum(axis=2)
        return np.where(self.valid, st.differences(a, n), np.nan)

    def adjusted_by(self, nuisance: RoutingContrast | None) -> RoutingContrast:
        """The same contrast with a nuisance to regress out (None: without one).

        Raises:
            PlanError: the two are of different models, or were not counted alike.
        """
        if nuisance is not None:
            _require_alike(self, nuisance, "adjusted")
            if nuisance.nuisance is not None:
                raise PlanError("the nuisance has a nuisance of its own: give one without")
        return replace(self, nuisance=nuisance)

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 over the counts and what they are counts of."""
        digest = hashlib.sha256(
            canonical_json([self.architecture.id, self.weights_id, self.weighting, self.pairs]).encode()
        )
        arrays = [self.activations, self.tokens, self.cluster_ids]
        for array in arrays if self.order is None else [*arrays, self.order]:
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        more = {
            "counted": None if self.counted == "target" else [self.counted, self.new_tokens],
            "strata": None if self.strata is None else [list(self.strata.starts), self.strata.n],
            "replicates": None if self.replicates is None else self.replicates.number,
            "nuisance": None if self.nuisance is None else self.nuisance.sha256,
        }
        if any(more.values()):  # without, the hash is what it was before there were such
            digest.update(canonical_json(more).encode())
        return digest.hexdigest()

    def ranking(self, by: By = "risk_difference", *, reverse: bool = False) -> list[tuple[int, int, float]]:
        """(layer, expert, Δ), best first.

        By |Δ|, or with a `lower_bound` by |Δ| less the reach of its 95% interval (below 0 where that holds
        0); Δ is the one that `by` names. With `reverse` the sides are swapped, so that it changes its sign.
        """
        kind, bounded = self._by(by)
        delta = self.estimate(kind).difference
        return ranked(-delta if reverse else delta, self.layers, merit=self._merit(kind, delta, bounded))

    def _by(self, by: str) -> tuple[Kind, bool]:
        if by not in BY:
            raise PlanError(f"by={by!r} is unknown: use {', '.join(BY)}")
        kind, bounded = BY[by]
        if bounded and self.imported:
            raise PlanError(f'by="{by}" needs intervals, and an imported ranking has none')
        clusters = self.estimate(kind).clusters
        if bounded and clusters < LEAST_CLUSTERS:
            raise PlanError(f'by="{by}" needs at least {LEAST_CLUSTERS} clusters, there are {clusters}')
        return kind, bounded

    def _merit(self, kind: Kind, delta: Floats, bounded: bool) -> Floats | None:
        """What is best first, [layers, experts]; None where |Δ| ranks."""
        if bounded:
            return np.abs(delta) - self.estimate(kind).margin()
        return self._merit_of_order() if kind == "risk_difference" else None

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

    def stability(
        self,
        *,
        activate: int | None = None,
        deactivate: int | None = None,
        top: int | None = None,
        reverse: bool = False,
        by: By = "risk_difference",
        strength: float = 1.0,
    ) -> dict[int, dict[int, float]]:
        """For each expert that `choose` takes, the share of bootstrap replicates in which the same choice
        takes it with the same sign: {layer: {expert: share}}.

        Each replicate ranks and limits anew; a nuisance's slope is its own. With a `lower_bound` the reach of
        the intervals is that of all pairs.

        Raises:
            PlanError: there are no replicates, or what `choose` raises.
        """
        asked: dict[str, Any] = {
            "activate": activate,
            "deactivate": deactivate,
            "top": top,
            "strength": strength or 1.0,
        }
        choice = self.choose(reverse=reverse, by=by, **asked)
        kind, bounded = self._by(by)
        deltas = self._replicated(kind)
        return stability(
            choice,
            -deltas if reverse else deltas,
            [self._merit(kind, delta, bounded) for delta in deltas],
            {router.layer: router for router in self.routers},
            **asked,
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
            by: Rank by |Δ|, or with a `lower_bound` by |Δ| less the reach of its interval; Δ is the plain
                one, `stratified` or `adjusted`.
            scope: Which tokens to steer.
            strength: 0 to 1, the size of every λ.

        Raises:
            PlanError: fewer experts than asked for, or a preset for another architecture. What breaks a
                router's limit is skipped, in rank order, and listed in the steering's
                `provenance["skipped"]`.

        Example:
            >>> pairs = steersman.load_pairs("lab:refusal/train")[:24]
            >>> contrast = steersman.detect_experts("lab:moe", None, pairs)
            >>> contrast.select(activate=2, deactivate=2, scope="answer")
            <Steering: 2 experts activated, 2 experts deactivated; scope answer; for lab:moe, ...>
        """
        if not 0 <= finite_number(strength) <= 1:
            raise PlanError(
                f"strength {strength:g} must lie between 0 and 1; use reverse for the other direction"
            )
        if preset is not None:
            if (activate, deactivate, top) != (None, None, None):
                raise PlanError("a preset says how many experts: give it alone, or numbers alone")
            published = preset_for(preset, self.architecture)
            activate, deactivate = published.activate, published.deactivate
        numbers = asked_sizes(activate=activate, deactivate=deactivate, top=top)
        choice = self.choose(**numbers, reverse=reverse, by=by, strength=strength)
        strengths = {
            layer: {expert: sign * strength for expert, sign in experts.items()}
            for layer, experts in choice.signs.items()
        }
        asked = {**numbers, "preset": preset}
        return Steering(
            edits=(ExpertEdit(strengths, scope),),
            architecture=self.architecture,
            weights_id=self.weights_id,
            model=self.model,
            revision=self.revision,
            provenance={
                "made": "selection",
                "by": by,
                "reverse": bool(reverse),
                **{name: value for name, value in asked.items() if value is not None},
                "skipped": list(choice.skipped),
                **in_provenance(self.chat),
                **self._confidence(by, {**numbers, "reverse": reverse, "by": by, "strength": strength}),
                "from": [{"kind": "routing_contrast", "sha256": self.sha256}, *self._sources()],
            },
        )

    def _confidence(self, by: By, asked: dict[str, Any]) -> dict[str, Any]:
        """What a selection's provenance says of how sure it is."""
        found: dict[str, Any] = {}
        if BY[by][0] == "adjusted":
            found["adjustment"] = {"slope": self.adjustment.slope, "share": self.adjustment.share}
        if self.replicates is not None:
            shares = self.stability(**asked)
            found["stability"] = {
                "replicates": self.replicates.number,
                "experts": [
                    {"layer": layer, "expert": expert, "share": share}
                    for layer, experts in sorted(shares.items())
                    for expert, share in sorted(experts.items())
                ],
            }
        return found

    def _sources(self) -> list[dict[str, Any]]:
        """What it was counted on, its nuisance too."""
        nuisance = () if self.nuisance is None else self.nuisance.made_from
        return [*map(dict, self.made_from), *({**source, "role": "nuisance"} for source in nuisance)]

    def _columns(self, kind: Kind, there: bool) -> dict[str, Floats]:
        """A table's columns of another difference than the plain one."""
        if not there:
            return {}
        estimate = self.estimate(kind)
        low, high = estimate.interval()
        p = estimate.p_values()
        columns = {
            kind: estimate.difference,
            f"{kind}_standard_error": estimate.standard_error,
            f"{kind}_low": low,
            f"{kind}_high": high,
            f"{kind}_p": p,
            f"{kind}_q": q_values(p, self.valid),
        }
        return {name: values[self.valid] for name, values in columns.items()}

    def table(self) -> pandas.DataFrame:
        """One row an expert, largest |Δ| first; an imported ranking in its own order.

        Where they were counted, `stratified` and `adjusted` differences have columns of their own, with their
        errors, intervals, p- and q-values; `nuisance` is not among them.
        """
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
                **self._columns("stratified", self.strata is not None),
                **self._columns("adjusted", self.nuisance is not None),
            }
        )
        merit = self._merit_of_order()
        best = frame["risk_difference"].abs() if merit is None else merit[rows, columns]
        order = np.lexsort((frame["expert"], frame["layer"], ranks(best, COMPUTED)))
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

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **options: Any) -> str:
        """Upload the contrast to the Hugging Face Hub with a model card; returns the commit's address.

        `license` is asked for, as the Hub names it ("apache-2.0"); options are `base_model`, `private`,
        `revision`, `token`, and those of `HfApi.upload_folder`. Raises `ArtifactError` where it fails.
        """
        from steersman.artifacts import push_folder

        return push_folder(self.save_pretrained, repo_id, license=license, **options)

    def in_words(self) -> str:
        """What was counted, in which layers, of which model."""
        counted = (
            "imported ranking"
            if self.imported
            else f"{count_of(self.pairs, 'pair')} in {count_of(self.clusters, 'cluster')}"
        )
        tokens = f"{int(self.tokens[0])} / {count_of(int(self.tokens[1]), 'token')}"
        where = f"{int(self.valid.sum())} experts in layers {ranges(self.layers)}"
        return f"{counted}, {tokens}; {where}; of {cut(self.model or 'a model', 100)}"

    def as_tables(self) -> list[Table]:
        """The strongest experts."""
        table = self.table()
        others = [name for name in ("stratified", "adjusted") if name in table]
        return [first_rows(table[["layer", "expert", "risk_difference", "low", "high", "q", *others]])]


def merge_contrasts(contrasts: Iterable[RoutingContrast]) -> RoutingContrast:
    """Add the counts of shards: the very result of one run over all their pairs.

    Raises:
        PlanError: the shards are of different models or weightings, or a cluster (a pair, a group) is in two
            of them.

    Example:
        >>> pairs = steersman.load_pairs("lab:refusal/train")[:24]
        >>> shards = [steersman.detect_experts("lab:moe", None, pairs, shard=f"{n}/2") for n in (1, 2)]
        >>> steersman.merge_contrasts(shards)
        <RoutingContrast: 24 pairs in 21 clusters, ...>
    """
    shards = each_of(contrasts, RoutingContrast, PlanError)
    if not shards:
        raise PlanError("there is nothing to merge: give at least one contrast")
    total = shards[0]
    for shard in shards[1:]:
        total = _merge_two(total, shard)
    return total


def _merge_two(one: RoutingContrast, other: RoutingContrast) -> RoutingContrast:
    if one.imported or other.imported:
        raise PlanError("an imported ranking cannot be merged: nobody knows which pairs are in it")
    _require_alike(one, other, "merged")
    shared = np.intersect1d(one.cluster_ids, other.cluster_ids)
    if len(shared):
        raise PlanError(
            f"{count_of(len(shared), 'cluster')} (pairs or groups) in two shards: "
            "a shard was given twice, or it splits a group"
        )
    if (one.nuisance is None) != (other.nuisance is None):
        raise PlanError("one of these contrasts has a nuisance and another none: they cannot be merged")
    return replace(
        one,
        weights_id=with_stronger_id(one, other).weights_id,
        activations=np.where(one.activations < 0, -1, one.activations + other.activations),
        tokens=one.tokens + other.tokens,
        sums=one.sums + other.sums,
        cluster_ids=np.sort(np.concatenate([one.cluster_ids, other.cluster_ids])),
        pairs=one.pairs + other.pairs,
        skipped=one.skipped + other.skipped,
        alike=one.alike + other.alike,
        chat=common(one.chat, other.chat),
        made_from=_without_shards((*one.made_from, *other.made_from)),
        strata=one.strata + other.strata if one.strata and other.strata else None,
        replicates=one.replicates + other.replicates if one.replicates and other.replicates else None,
        nuisance=_merge_two(one.nuisance, other.nuisance) if one.nuisance and other.nuisance else None,
    )


def _require_alike(one: RoutingContrast, other: RoutingContrast, done: str) -> None:
    """Raise `PlanError` where two contrasts are of different models, or of different tokens."""
    said = [{what: of(each) for what, of in _COUNTED_BY.items()} for each in (one, other)]
    if not same_weights(one, other):
        said = [{**of, "weights id": each.weights_id} for of, each in zip(said, (one, other), strict=True)]
    if told := rendered_otherwise(to_json(one.chat), to_json(other.chat), "{} and {}"):
        raise PlanError(
            f"these contrasts differ in {told[0]} and cannot be {done}; "
            f"count one of them again with {told[1]}"
        )
    if different := differences(said[0], said[1], "{} and {}"):
        raise PlanError(f"these contrasts differ in their {different} and cannot be {done}")


_COUNTED_BY: dict[str, Callable[[RoutingContrast], object]] = {
    "architecture": lambda contrast: contrast.architecture.id,
    "weighting": lambda contrast: contrast.weighting,
    "tokens": lambda contrast: contrast.counted,
    "number of new tokens": lambda contrast: contrast.new_tokens,
    "strata": lambda contrast: None if contrast.strata is None else contrast.strata.starts,
    "bootstrap": lambda contrast: 0 if contrast.replicates is None else contrast.replicates.number,
}


def _without_shards(sources: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
    """Sources with all the shards of one as the one."""
    merged: list[Mapping[str, Any]] = []
    for source in sources:
        whole = {key: value for key, value in source.items() if key != "shard"}
        shards = {
            str(other["shard"])
            for other in sources
            if "shard" in other and {**whole, "shard": other["shard"]} == dict(other)
        }
        count = str(source.get("shard", "")).partition("/")[2]
        complete = bool(count) and shards == {f"{number + 1}/{count}" for number in range(int(count))}
        if not complete:
            merged.append(source)
        elif whole not in merged:
            merged.append(whole)
    return tuple(merged)
