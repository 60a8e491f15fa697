"""Will a concept carry over? Known before anything is steered: does more of it arrive in the target, in pairs
that it was not made of, than of concepts of the same pairs with other labels, made and judged alike?

The gate, one rule for every layer: the mean held-out projection of the pairs' differences on W v exceeds what
relabelled groups bring (`relabelling`, p ≤ .05 over all layers that are offered), through a map that is one:
its R² on held-out texts exceeds that of its own rows paired between texts (p ≤ .05 over the layers). The
second is needed since *any* direction tells apart sides that are far apart, half of all directions the right
way round, and labels know nothing of that. How well the direction separates the pairs (AUROC) is described
beside; it decides nothing, since it saturates. Layers that pass so are asked once more, where pairs allow it:
whether adding the concept makes its own side likelier (`causal_probe`, p ≤ .05 over these layers).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn
from transformers import PreTrainedTokenizerBase

from steersman.certainty import CANNOT_TELL, MARGIN, NOT_SHOWN, SHOWN, SIGNIFICANT, Verdict
from steersman.chat_record import ChatRecord, rendered_otherwise, to_json
from steersman.chats.format import NotedChats
from steersman.concepts.affine_map import AffineMap, LayerMap
from steersman.concepts.causal_probe import BEYOND, LAYERS, NOT_PASSED, Asked, Probe, forks, probe, why_not
from steersman.concepts.concept import ConceptVector
from steersman.concepts.directions import held_out_scores, unit_of, unit_sums
from steersman.concepts.dose import DEFAULT_DOSE, Strength, typical_layer
from steersman.concepts.joint_moments import DRAWS
from steersman.concepts.opening import check_opened
from steersman.concepts.pair_states import PairStates, read_pairs
from steersman.concepts.relabelling import FEWEST_UNITS, Arrival, arrivals, labellings, products
from steersman.concepts.separation import Separation, separation
from steersman.edits import as_layers
from steersman.errors import (
    ArchitectureMismatch,
    ArtifactError,
    ModelError,
    PairsError,
    PlanError,
    WeightsMismatch,
    check_kind,
)
from steersman.models.architecture import read_architecture
from steersman.models.encoding import hash_of_cluster
from steersman.models.identity import has_weights, model_name
from steersman.models.loading import load_model
from steersman.models.same_weights import same_weights
from steersman.pairs import ContrastPairs, Rows, load_pairs
from steersman.showing import Shown, Table, ranges
from steersman.ties import largest

Target = tuple[nn.Module, PreTrainedTokenizerBase] | str | Path
Pairs = ContrastPairs | str | Path | Rows

AS_GOOD = 0.1
"""Layers whose z is less than a tenth below the largest do as well: pairs tell no more."""


@dataclass(frozen=True, repr=False)
class LayerCheck(Shown):
    """What was found at one target layer.

    Attributes:
        layer: Of the target.
        source_layer: That the map takes it from.
        arrival: What of the concept arrives: the mean over held-out pairs of δ·Wv, δ the difference of a
            pair's states in the target; its z among relabellings, and p, over all layers that were looked at.
            None where there are too few groups to tell.
        map_p: How likely the map's R² on held-out texts is by chance, by its own control, times the layers.
        separation: AUROC in the target of held-out pairs along the mapped direction; None where nothing can
            be held out. It describes, and decides nothing.
        at_source: How well the concept separates held-out pairs in its own model, at `source_layer`.
        share_explained: What the map explains of the mapped direction (`AffineMap.share_explained`).
        length: ‖Wv‖ / median ‖h‖ there: what strength 1 adds, as a dose.
        gap: û·δ / median ‖h‖, û = Wv/‖Wv‖, the mean over held-out pairs: how far apart their sides lie along
            the direction, as a dose.
        probe: What adding the concept does to the log-odds of its own side; None where that was not asked,
        unprobed: and why not.
    """

    layer: int
    source_layer: int
    arrival: Arrival | None
    map_p: float
    separation: Separation | None
    at_source: Separation | None
    share_explained: float
    length: float
    gap: float
    probe: Probe | None = None
    unprobed: str = ""

    @property
    def passed(self) -> bool:
        """Whether the gate lets it through: more arrives than of relabelled pairs, through what is a map; and
        where it could be asked, adding it raises its own side more than relabelled ones do.
        """
        raises = self.unprobed != BEYOND if self.probe is None else self.probe.p <= SIGNIFICANT
        return self.arrives and raises

    @property
    def arrives(self) -> bool:
        """Whether it passes without the probe."""
        return self.arrival is not None and max(self.arrival.p, self.map_p) <= SIGNIFICANT

    @property
    def z(self) -> float:
        """How far beyond relabelled pairs; −∞ where it cannot be told."""
        return -np.inf if self.arrival is None else self.arrival.z

    @property
    def verdict(self) -> Verdict:
        """Whether it is shown that the concept arrives: by the gate. Not shown where the AUROC's interval
        lies within ±0.05 of ½; else nobody can tell.
        """
        found = self.separation
        if self.passed or found is None:
            return SHOWN if self.passed else CANNOT_TELL
        return NOT_SHOWN if max(0.5 - found.low, found.high - 0.5) <= MARGIN else CANNOT_TELL

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        found, source, arrival = self.separation, self.at_source, self.arrival
        return {
            "layer": self.layer,
            "source_layer": self.source_layer,
            "carried": None if arrival is None else arrival.carried,
            "z": None if arrival is None else arrival.z,
            "p": None if arrival is None else arrival.p,
            "map_p": self.map_p,
            "passed": self.passed,
            "verdict": self.verdict,
            "auroc": None if found is None else found.auroc,
            "low": None if found is None else found.low,
            "high": None if found is None else found.high,
            "source_auroc": None if source is None else source.auroc,
            "source_low": None if source is None else source.low,
            "source_high": None if source is None else source.high,
            "share_explained": self.share_explained,
            "length": self.length,
            "gap": self.gap,
            "probe": None if self.probe is None else self.probe.to_json(),
            "unprobed": self.unprobed,
        }

    def in_words(self) -> str:
        """What arrives, and whether it passes."""
        p = "no p" if self.arrival is None else f"p = {self.arrival.p:.3f}"
        verdict = "passed" if self.passed else "not passed"
        asked = "" if self.probe is None else f", probe {self.probe.change:+.2f} nats, p = {self.probe.p:.3f}"
        return f"layer {self.layer} from {self.source_layer}, {p}{asked}, {verdict}"


@dataclass(frozen=True, repr=False)
class TransplantCheck(Shown):
    """Whether a concept carries over, at each mapped target layer that it can be taken to.

    Attributes:
        layers: {target layer: what was found}.
        pairs: Name and sha256 of the pairs it was looked at with.
        held_out: How many pairs there were, and
        clusters: in how many clusters: those of pairs that the concept was refined from are looked at along
            the direction of the other folds.
        skipped: Pairs left out because they are too long for the target.
        alike: Pairs left out because both sides are the same tokens to the target.
        depth: How many layers the target has.
    """

    layers: Mapping[int, LayerCheck]
    pairs: Mapping[str, Any]
    held_out: int
    clusters: int
    skipped: int
    alike: int = 0
    depth: int = 0

    @property
    def best_layer(self) -> int:
        """The layer that is taken: `best`. Raises PlanError where nothing was held out."""
        if not any(entry.separation is not None for entry in self.layers.values()):
            raise PlanError(_nothing_held_out(self.pairs["name"]))
        return self.best.layer

    @property
    def best(self) -> LayerCheck:
        """Of the layers that do as well as the best (`as_good`) the one nearest to two thirds of the depth,
        the lower of two.
        """
        return self.layers[typical_layer(self.as_good, self.depth)]

    @property
    def as_good(self) -> tuple[int, ...]:
        """The layers that pass with the largest z or less than a tenth below it, ascending; where none
        passes, of all layers alike.
        """
        known = sorted(self.layers.values(), key=lambda entry: entry.layer)
        known = [entry for entry in known if entry.passed] or known
        return tuple(entry.layer for entry in largest(known, lambda entry: entry.z, relative=AS_GOOD))

    @property
    def passed(self) -> bool:
        """Whether the gate lets it through at a layer."""
        return self.best.passed

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "passed": self.passed,
            "layer": self.best.layer,
            "layers": [self.layers[layer].to_json() for layer in sorted(self.layers)],
            "pairs": dict(self.pairs),
            "held_out": self.held_out,
            "clusters": self.clusters,
            "skipped": self.skipped,
            "alike": self.alike,
        }

    def in_words(self) -> str:
        """Whether the concept carries over, and where best."""
        verdict = "carries over" if self.passed else "not shown to carry over"
        layers = ranges(tuple(sorted(self.layers)))
        return f"{verdict}; best at layer {self.best.layer} of layers {layers}; {self.held_out} pairs"

    def as_tables(self) -> list[Table]:
        """Layer by layer."""
        rows = []
        for layer, check in sorted(self.layers.items()):
            auroc = "–" if check.separation is None else f"{check.separation.auroc:.3f}"
            z, p = ("–", "–") if check.arrival is None else (f"{check.z:.1f}", f"{check.arrival.p:.3f}")
            asked = "–" if check.probe is None else f"{check.probe.change:+.2f} (p = {check.probe.p:.3f})"
            passed = "yes" if check.passed else "no"
            rows.append((layer, check.source_layer, auroc, z, p, f"{check.map_p:.2g}", asked, passed))
        return [(("target", "source", "AUROC", "z", "p", "map's p", "probe", "passed"), rows)]


def rank(checks: Mapping[str, TransplantCheck]) -> list[str]:
    """Names of checks, those first that carry over best: what the gate lets through; then by how well the
    source tells the pairs apart, and how well the target (AUROC, to two digits, at the best layer); then by
    how far apart they lie in the target, which still tells where an AUROC is 1.
    """

    def order(name: str) -> tuple[bool, float, float, float]:
        best = checks[name].best
        return checks[name].passed, _digits(best.at_source), _digits(best.separation), best.gap

    return sorted(checks, key=order, reverse=True)


def _digits(found: Separation | None) -> float:
    return -1.0 if found is None else round(found.auroc, 2)


def check_transplant(
    bridge: AffineMap,
    concept: ConceptVector,
    target: Target | None = None,
    pairs: Pairs | None = None,
    *,
    layers: Sequence[int] | None = None,
    strength: float | str | None = None,
    batch_size: int = 16,
    truncate: bool = False,
    progress: bool = False,
) -> TransplantCheck:
    """Look whether a concept carries over through a map, without making a plan.

    At each target layer: the mean projection, in the target, of the pairs' differences on v = W v_source. A
    pair of a cluster that the concept was refined from is looked at along the direction of the folds that do
    not hold it; others along the whole one. The same is done with whole groups relabelled, each fold's
    concept refitted, which is what labels that mean nothing would bring. Where both sides of pairs go on from
    one prompt, the layers that pass are probed: v is added, and the log-odds of the positive side's next
    token must rise, more than relabelled concepts raise them.

    Args:
        bridge: The map.
        concept: A concept of its source.
        target: Model and tokenizer, or a name; the model that the map was fitted with, if it is still in
            memory, or opened by its name, where nothing is given.
        pairs: What to look with; the pairs that the concept was refined from, if they are still in memory or
            can be read again by their name, where nothing is given.
        layers: Target layers; all that are mapped from a layer of the concept by default.
        strength: What the probe adds, as for `transplant`; its size, whatever its sign. By default a dose of
            .3.
        batch_size: Texts in one forward.
        truncate: Leave out pairs with a side longer than the target's context.
        progress: Show a progress bar on stderr where it takes more than a second.

    Raises:
        WeightsMismatch, ArchitectureMismatch: the concept is of another model than the map's source, or the
            target is not the one that the map leads to.
        PlanError: a layer that concept or map lacks.
        ModelError, PairsError: target or pairs cannot be had.

    Example:
        >>> pairs = steersman.load_pairs("lab:refusal/train")[:24]
        >>> concept = steersman.refine_concept("lab:source", None, pairs)
        >>> things, places = ("badge", "key", "book", "door"), ("garden", "tower", "house", "river")
        >>> texts = [f"please give me the {one} of the {other}" for one in things for other in places] * 4
        >>> bridge = steersman.fit_affine_map("lab:source", "lab:target", texts)
        >>> steersman.check_transplant(bridge, concept, layers=[2])
        <TransplantCheck: not shown to carry over; best at layer 2 of layers 2; 24 pairs>
    """
    dial = Strength.parse(DEFAULT_DOSE if strength is None else strength)
    check_source(bridge, concept)
    bridge = bridge.of_concept(concept)
    chosen = mapped_layers(bridge, concept, layers)
    source = resolve_pairs(concept, pairs)
    model, tokenizer = resolve_target(bridge, target)
    noted = NotedChats(tokenizer)
    with read_pairs(
        model,
        tokenizer,
        source,
        chosen,
        concept.position,
        batch_size=batch_size,
        truncate=truncate,
        progress=progress,
    ) as states:
        _warn_of_chats(bridge, concept, noted.record)
        rows = _direction_rows(concept, states.clusters)
        rows[np.isin(states.clusters, [*bridge.fitted_groups])] = -1  # the map has seen them
        found = _check_layers(bridge, concept, states, rows)
        most = LAYERS if layers is None else len(chosen)
        found = _probed(bridge, concept, (model, tokenizer), source, found, dial, most)
        held = states.clusters[rows >= 0]
        return TransplantCheck(
            layers=found,
            pairs={"name": source.name, "sha256": source.sha256},
            held_out=len(held),
            clusters=len(np.unique(held)),
            skipped=states.skipped,
            alike=states.alike,
            depth=bridge.architecture.layer_count,
        )


def _probed(
    bridge: AffineMap,
    concept: ConceptVector,
    opened: tuple[nn.Module, PreTrainedTokenizerBase],
    pairs: ContrastPairs,
    found: Mapping[int, LayerCheck],
    strength: Strength,
    most: int,
) -> dict[int, LayerCheck]:
    """The layers with what the probe says of those that pass, of them the `most` with the largest z."""
    passing = sorted((n for n, check in found.items() if check.arrives), key=lambda n: (-found[n].z, n))
    if not passing:
        return {n: replace(check, unprobed=NOT_PASSED) for n, check in found.items()}
    asked = _asked(bridge, concept, opened, pairs)
    if reason := why_not(opened[0], concept, asked):
        return {n: replace(check, unprobed=reason) for n, check in found.items()}
    probes = probe(bridge, concept, opened, asked, sorted(passing[:most]), strength)
    return {
        n: replace(
            check,
            probe=probes.get(n),
            unprobed="" if n in probes else BEYOND if check.arrives else NOT_PASSED,
        )
        for n, check in found.items()
    }


def _asked(
    bridge: AffineMap,
    concept: ConceptVector,
    opened: tuple[nn.Module, PreTrainedTokenizerBase],
    pairs: ContrastPairs,
) -> Asked:
    """The pairs of a probe, held out like those of the gate."""
    some, texts = forks(*opened, pairs)
    clusters = np.array([hash_of_cluster(pair.cluster) for pair in some], np.int64)
    if not len(some):
        return Asked([], clusters, clusters, clusters, clusters)
    rows = _direction_rows(concept, clusters)
    rows[np.isin(clusters, [*bridge.fitted_groups])] = -1
    units = _units(concept, clusters, rows)
    return Asked(texts, rows, units, *_folds_and_sizes(concept, int(units.max()) + 1))


def _folds_and_sizes(concept: ConceptVector, units: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of the concept's units and those of other pairs: the fold, −1 where in none; and the pairs in it."""
    every = max(len(concept.unit_sums), units)
    sizes = np.pad(concept.unit_sizes.numpy(), (0, every - len(concept.unit_sums)))
    return np.where(sizes > 0, np.arange(every) % max(1, len(concept.fold_vectors)), -1), sizes


def _direction_rows(concept: ConceptVector, clusters: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each pair's direction: its fold's; after the folds' comes the whole one, of pairs in none; −1 where the
    only direction has seen the pair.
    """
    return _looked_up(concept, clusters, concept.fold_numbers.numpy(), len(concept.fold_vectors))


def _looked_up(
    concept: ConceptVector, clusters: NDArray[np.int64], values: NDArray[np.int64], other: Any
) -> NDArray[np.int64]:
    """A value of each pair's cluster in the concept; `other` where it has no such cluster."""
    ids = concept.fold_clusters.numpy()
    places = np.minimum(np.searchsorted(ids, clusters), len(ids) - 1)
    return np.where(ids[places] == clusters, values[places], other)


def _units(concept: ConceptVector, clusters: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each pair's unit: its cluster's in the concept; of others a new one; −1 where it is not held out."""
    _, first, inverse = np.unique(clusters, return_index=True, return_inverse=True)
    new = len(concept.unit_sums) + unit_of(np.argsort(np.argsort(first)))[inverse]
    return np.where(rows >= 0, _looked_up(concept, clusters, concept.cluster_units.numpy(), new), -1)


def _check_layers(
    bridge: AffineMap, concept: ConceptVector, states: PairStates, rows: NDArray[np.int64]
) -> dict[int, LayerCheck]:
    units = _units(concept, states.clusters, rows)
    layers, known = states.layers, len(concept.unit_sums)
    found: list[Arrival | None] = [None] * len(layers)
    if known and len(np.unique(units[units >= 0])) >= FEWEST_UNITS:
        folds, sizes = _folds_and_sizes(concept, int(units.max()) + 1)
        of_layers = [
            products(
                _along(bridge, concept, layer, states, units, folds), folds, int((rows >= 0).sum()), sizes
            )
            for layer in layers
        ]
        found = [*arrivals(of_layers, labellings(len(folds)))]
    return {
        layer: _check_layer(bridge, concept, layer, states, rows, arrival)
        for layer, arrival in zip(layers, found, strict=True)
    }


def _along(
    bridge: AffineMap,
    concept: ConceptVector,
    layer: int,
    states: PairStates,
    units: NDArray[np.int64],
    folds: NDArray[np.int64],
) -> NDArray[np.float64]:
    """E_a · W D_b of one layer, [units, units]: E at the target, D at the source.

    A principal direction u is the same for every relabelling (Σ δδ' does not know which side is which), and
    its concept u (u·m) is linear in the differences: W D becomes W u_f (u_f·D), f the fold of a. That holds
    to the letter for `pca`; `pca_diff` takes the mean of the *true* labels off before it looks for u, so that
    its relabelled concepts keep more of their means than its own does, and the gate errs to the safe side.
    """
    of_map = bridge.layer_map(layer)
    place = concept.layers.index(of_map.source_layer)
    held_out = np.zeros((len(folds), bridge.architecture.hidden_size))
    sums = unit_sums(lambda: states.chunks(layer), units)
    held_out[: len(sums)] = sums
    back = held_out @ of_map.weight.numpy()
    at_source = concept.unit_sums[:, place].double().numpy()
    if concept.method == "mean_difference":
        along = back @ at_source.T
    else:
        directions = torch.cat([concept.fold_vectors[:, place], concept.vectors[of_map.source_layer][None]])
        unit = torch.nn.functional.normalize(directions.double(), dim=-1).numpy()[folds]
        along = (back * unit).sum(1, keepdims=True) * (unit @ at_source.T)
    return np.pad(along, ((0, 0), (0, len(folds) - along.shape[1])))


def _check_layer(
    bridge: AffineMap,
    concept: ConceptVector,
    layer: int,
    states: PairStates,
    rows: NDArray[np.int64],
    arrival: Arrival | None,
) -> LayerCheck:
    of_map, median = bridge.layer_map(layer), bridge.norms[layer].median
    source_layer, held = of_map.source_layer, rows >= 0
    vector, place = concept.vectors[source_layer], concept.layers.index(source_layer)
    directions = torch.cat([concept.fold_vectors[:, place], vector[None]])
    mapped = np.array([bridge.map_vector(layer, one).double().numpy() for one in directions])
    found, arrives = None, 0.0
    if held.any():
        scores = held_out_scores(lambda: states.chunks(layer), rows, mapped)[held]
        found = separation(scores[:, 0], scores[:, 1], states.clusters[held], rows[held])
        arrives = float((scores[:, 0] - scores[:, 1]).mean())
    length = float(np.linalg.norm(mapped[-1])) / median
    return LayerCheck(
        layer=layer,
        source_layer=source_layer,
        arrival=arrival,
        map_p=min(1.0, _by_chance(of_map) * len(states.layers)),
        separation=found,
        at_source=concept.separation[source_layer],
        share_explained=float(bridge.share_explained(layer, vector)),
        length=length,
        gap=arrives / (length * median**2) if length > 0 else 0.0,
    )


def _by_chance(of_map: LayerMap) -> float:
    """How likely a map of rows paired between texts has an R² like this one's: t over its control's draws."""
    beyond = of_map.r2 - of_map.r2_control
    spread = of_map.control_sd * (1 + 1 / DRAWS) ** 0.5
    return float(stats.t.sf(beyond / spread, DRAWS - 1)) if spread > 0 else float(beyond <= 0)


# What it is looked at with ----------------------------------------------------------------------------------


def check_source(bridge: AffineMap, concept: ConceptVector) -> None:
    """Raise where a concept is of another model than a map's source, or the map is a part of one."""
    check_kind(bridge, AffineMap, PlanError)
    check_kind(concept, ConceptVector, PlanError)
    if bridge.shard is not None:
        raise ArtifactError(f"this is part {bridge.shard} of a map: merge all parts first")
    source = bridge.source
    if concept.architecture.id != source.architecture.id:
        raise ArchitectureMismatch(
            f"the concept is of {_named(concept.model)}, but the map's source is {_named(source.model)}, "
            "of another architecture; refine it there, or fit a map from its model"
        )
    if not same_weights(concept, source):
        raise WeightsMismatch(
            f"the concept is of {_named(concept.model)}, but the map's source is {_named(source.model)}, "
            "which has other weights; refine it there, or fit a map from its model"
        )


def mapped_layers(
    bridge: AffineMap, concept: ConceptVector, layers: int | Sequence[int] | str | None
) -> tuple[int, ...]:
    """Target layers as they are asked for; all that are mapped from a layer of the concept by default.

    Raises PlanError for one that the map lacks, or that it takes from a layer that the concept lacks.
    """
    if isinstance(layers, str) and layers != "all":
        raise PlanError(f"layers={layers!r} is unknown: give target layer numbers, or 'all'")
    bridge = bridge.of_concept(concept)
    if layers is None or isinstance(layers, str):
        every = {layer: bridge.layer_map(layer).source_layer for layer in bridge.layers}
        found = tuple(layer for layer, source in every.items() if source in concept.vectors)
        if not found:
            takes, has = (", ".join(map(str, sorted(set(some)))) for some in (every.values(), concept.layers))
            raise PlanError(
                f"the map takes its layers from the source's {takes}, but the concept has {has}: refine it "
                "at all layers"
            )
        return found
    asked = tuple(dict.fromkeys(as_layers(layers, PlanError)))
    if not asked:
        raise PlanError("no layer is named; leave layers out for the default")
    for layer in asked:
        source_layer = bridge.layer_map(layer).source_layer
        if source_layer not in concept.vectors:
            has = ", ".join(map(str, concept.layers))
            raise PlanError(
                f"target layer {layer} is mapped from source layer {source_layer}, which the concept lacks: "
                f"it has {has}"
            )
    return asked


def _warn_of_chats(bridge: AffineMap, concept: ConceptVector, target: ChatRecord | None) -> None:
    """Say where chats of the concept or the target were rendered otherwise than those of the map."""
    for side, there, here, again in (
        ("source", bridge.source.chat, concept.chat, "refine the concept"),
        ("target", bridge.target.chat, target, "look"),
    ):
        if told := rendered_otherwise(to_json(there), to_json(here), "{} of the map, {} here"):
            warnings.warn(
                f"chats of the {side} differ from those that the map was fitted on in {told[0]}: the map may "
                f"not hold for them; {again} with {told[1]} for chats that are alike",
                stacklevel=3,
            )


def resolve_pairs(
    concept: ConceptVector,
    pairs: Pairs | None,
    hint: str = "give pairs (--pairs FILE), or force it (--force)",
) -> ContrastPairs:
    """The pairs to look with: given, or those of the concept. Raises PairsError, with the hint, where they
    cannot be had.
    """
    if isinstance(pairs, ContrastPairs):
        return pairs
    if pairs is not None:
        return load_pairs(pairs)
    if concept._pairs is not None:
        return concept._pairs
    sources = [source for source in concept.made_from if source.get("kind") == "pairs"]
    if len(sources) != 1:
        raise PairsError(f"the concept does not say which pairs it was refined from: {hint}")
    name = str(sources[0].get("name"))
    try:
        found = load_pairs(name)
    except PairsError as error:
        here = "" if Path(name).is_absolute() else f", looked for from {Path.cwd()}"
        raise PairsError(f"the concept's pairs cannot be read again ({error}{here}): {hint}") from None
    if found.sha256 != sources[0].get("sha256"):
        raise PairsError(f"{name}: not the pairs any more that the concept was refined from: {hint}")
    return found


def resolve_target(bridge: AffineMap, target: Target | None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The target: given, or that of the map. Raises ModelError where it cannot be had, WeightsMismatch or
    ArchitectureMismatch where it is another.
    """
    opened = _open_target(bridge, target)
    model = opened[0]
    name = _named(model_name(model)[0])
    if read_architecture(model).id != bridge.architecture.id:
        raise ArchitectureMismatch(
            f"the map leads to {_named(bridge.model)}, but the target is {name}, of another architecture"
        )
    if not has_weights(model, bridge.weights_id, "the map"):
        raise WeightsMismatch(
            f"the map leads to {_named(bridge.model)}, but the target is {name}, which has other weights"
        )
    return opened


def _open_target(bridge: AffineMap, target: Target | None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    if isinstance(target, str | Path):
        return load_model(target)
    if target is not None:
        check_opened(target, "target")
        return target
    if (alive := bridge._target) is not None:
        return alive
    hint = "give the target (model, tokenizer), or force it"
    if not bridge.model:
        raise ModelError(f"the map's target has no name to open it by: {hint}")
    try:
        return load_model(bridge.model, revision=bridge.revision)
    except ModelError as error:
        raise ModelError(f"the map's target cannot be opened ({error}): {hint}") from None


def _named(name: str) -> str:
    return name or "a model without a name"


def why_untold(clusters: int) -> str:
    """Why nothing is known of what arrives, and what would help."""
    if clusters < FEWEST_UNITS:
        return (
            f"of {clusters} groups of held-out pairs no relabelling can tell: give pairs of at least "
            f"{FEWEST_UNITS}"
        )
    return "the concept was written before its groups' differences were kept: refine it again"


def _nothing_held_out(pairs: str) -> str:
    return (
        f"{pairs}: the concept was refined from this one group of pairs, so none are held out; give pairs of "
        "other groups"
    )
