"""Will a concept carry over? Known before anything is steered: does the mapped direction tell held-out pairs
apart in the target, beyond what label-shuffled concepts do through the same map?

The gate has two forms. Where it can be asked, the lower end of the AUROC must exceed the 95th percentile of
those of label-shuffled concepts. Where the sides are so far apart that nearly every direction separates them,
no AUROC could: then it must exceed ½, and more of the concept must be carried, (Wv)·δ, than of 95 in 100
shuffled ones, which is a randomisation test over the labels of the source.

A good R² alone proves nothing: a map can carry everything but the concept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from steersman.certainty import CANNOT_TELL, MARGIN, NOT_SHOWN, SHOWN, Verdict
from steersman.chat_record import ChatRecord, rendered_otherwise, to_json
from steersman.chats.format import NotedChats
from steersman.concepts.affine_map import AffineMap
from steersman.concepts.concept import ConceptVector
from steersman.concepts.opening import check_opened
from steersman.concepts.pair_states import PairStates, read_pairs
from steersman.concepts.separation import Separation, auroc, separation
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
from steersman.models.identity import has_weights, model_name
from steersman.models.loading import load_model
from steersman.models.same_weights import same_weights
from steersman.pairs import ContrastPairs, Rows, load_pairs
from steersman.showing import Shown, Table, ranges
from steersman.ties import largest

Target = tuple[nn.Module, PreTrainedTokenizerBase] | str | Path
Pairs = ContrastPairs | str | Path | Rows

FEWEST_SHUFFLES = 19
"""Below, chance alone exceeds all of them in more than one of twenty cases."""
SATURATED = 0.95
"""Label-shuffled concepts that separate like this leave no room for an AUROC to exceed them; nor do those
that exceed the lower end of an AUROC of 1, where there are few clusters.
"""
_SCORES_BYTES = 1 << 24
"""Scores along shuffled concepts that are in memory at once."""


@dataclass(frozen=True, repr=False)
class LayerCheck(Shown):
    """What was found at one target layer.

    Attributes:
        layer: Of the target.
        source_layer: That the map takes it from.
        separation: AUROC in the target of held-out pairs along the mapped direction; None where nothing can
            be held out.
        shuffled: The AUROCs of label-shuffled concepts through the same map, ascending.
        reachable: The lower end that an AUROC of 1 of these pairs would have.
        carried: (Wv)·δ, the mean over held-out pairs, δ the difference of a pair's states in the target: what
            of the concept arrives, as long as it is.
        shuffled_carried: The same of label-shuffled concepts, ascending.
        at_source: How well the concept separates held-out pairs in its own model, at `source_layer`.
        share_explained: What the map explains of the mapped direction (`AffineMap.share_explained`).
        length: ‖Wv‖ / median ‖h‖ there: what strength 1 adds, as a dose.
        gap: û·δ / median ‖h‖, û = Wv/‖Wv‖, the mean over held-out pairs: how far apart their sides lie along
            the direction, as a dose.
    """

    layer: int
    source_layer: int
    separation: Separation | None
    shuffled: tuple[float, ...]
    reachable: float
    carried: float
    shuffled_carried: tuple[float, ...]
    at_source: Separation | None
    share_explained: float
    length: float
    gap: float

    @property
    def threshold(self) -> float | None:
        """The AUROC that at most one in twenty label-shuffled concepts reaches (the fifth highest of 99), and
        at least ½. None below 19 of them.
        """
        if len(self.shuffled) < FEWEST_SHUFFLES:
            return None
        return max(0.5, self.shuffled[_one_in_twenty(len(self.shuffled))])

    @property
    def saturated(self) -> bool:
        """Whether the noise alone separates the pairs: then no direction proves anything by its AUROC."""
        return self.threshold is not None and self.threshold >= min(SATURATED, self.reachable)

    @property
    def margin(self) -> float:
        """How far the lower end is above the threshold (above ½ where it is saturated); −∞ where one of them
        cannot be told.
        """
        if self.separation is None or self.threshold is None:
            return -math.inf
        return self.separation.low - (0.5 if self.saturated else self.threshold)

    @property
    def chance(self) -> float | None:
        """The share of concepts, this one counted, of which at least as much is carried: a p-value under
        shuffled labels. None below 19 of them.
        """
        if len(self.shuffled_carried) < FEWEST_SHUFFLES:
            return None
        at_least = sum(other >= self.carried for other in self.shuffled_carried)
        return (1 + at_least) / (1 + len(self.shuffled_carried))

    @property
    def passed(self) -> bool:
        """Whether the gate lets it through.

        The lower end of the AUROC must exceed that of label-shuffled concepts. Where these leave no room
        (all sides are so far apart that nearly every direction separates them, half of all directions
        forwards), it must exceed ½, and more of the concept must be carried than of 95 in 100 shuffled ones.
        """
        by_chance = self.chance
        return self.margin > 0 and (not self.saturated or (by_chance is not None and by_chance <= 0.05))

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
        found, source = self.separation, self.at_source
        return {
            "layer": self.layer,
            "source_layer": self.source_layer,
            "auroc": None if found is None else found.auroc,
            "low": None if found is None else found.low,
            "high": None if found is None else found.high,
            "shuffled": len(self.shuffled),
            "threshold": self.threshold,
            "saturated": self.saturated,
            "carried": self.carried,
            "chance": self.chance,
            "passed": self.passed,
            "verdict": self.verdict,
            "source_auroc": None if source is None else source.auroc,
            "source_low": None if source is None else source.low,
            "source_high": None if source is None else source.high,
            "share_explained": self.share_explained,
            "length": self.length,
            "gap": self.gap,
        }

    def in_words(self) -> str:
        """What arrives, and whether it passes."""
        auroc = "no AUROC" if self.separation is None else f"AUROC {self.separation.auroc:.3f}"
        verdict = "passed" if self.passed else "not passed"
        return f"layer {self.layer} from {self.source_layer}, {auroc}, {verdict}"


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
    """

    layers: Mapping[int, LayerCheck]
    pairs: Mapping[str, Any]
    held_out: int
    clusters: int
    skipped: int
    alike: int = 0

    @property
    def best_layer(self) -> int:
        """The layer with the best held-out separation; of equals, the one where the mapped direction is
        longest among the states. Raises PlanError where nothing was held out.
        """
        known = [entry for entry in self.layers.values() if entry.separation is not None]
        if not known:
            raise PlanError(_nothing_held_out(self.pairs["name"]))
        return _best(known).layer

    @property
    def best(self) -> LayerCheck:
        """What was found at the best layer; at the lowest, where none can be told."""
        return _best(self.layers.values())

    @property
    def passed(self) -> bool:
        """Whether the gate lets it through at its best layer."""
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
            threshold = "–" if check.threshold is None else f"{check.threshold:.3f}"
            passed = "yes" if check.passed else "no"
            rows.append((layer, check.source_layer, auroc, threshold, f"{check.carried:.3g}", passed))
        return [(("target", "source", "AUROC", "noise's", "carried", "passed"), rows)]


def _best(entries: Iterable[LayerCheck]) -> LayerCheck:
    """The layer that does best: by its AUROC to a hundredth, which is more than pairs can tell, then by how
    long the direction is among the layer's states: where the concept is most of what there is.
    """
    known = sorted(entries, key=lambda entry: entry.layer)
    best = largest(known, lambda entry: entry.separation.auroc if entry.separation else -1.0, absolute=0.01)
    return largest(best, lambda entry: entry.length)[0]


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
    batch_size: int = 16,
    truncate: bool = False,
    progress: bool = False,
) -> TransplantCheck:
    """Look whether a concept carries over through a map, without steering anything.

    At each target layer: the AUROC, in the target, of pairs along v = W v_source. A pair of a cluster that
    the concept was refined from is looked at along the direction of the folds that do not hold it, and
    compared within its fold; others along the whole one. The same is done with the label-shuffled concepts,
    which are the concept's noise carried by the same map.

    Args:
        bridge: The map.
        concept: A concept of its source.
        target: Model and tokenizer, or a name; the model that the map was fitted with, if it is still in
            memory, or opened by its name, where nothing is given.
        pairs: What to look with; the pairs that the concept was refined from, if they are still in memory or
            can be read again by their name, where nothing is given.
        layers: Target layers; all that are mapped from a layer of the concept by default.
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
        >>> texts = [f"please give me the {thing}" for thing in ("badge", "key", "book")] * 20
        >>> bridge = steersman.fit_affine_map("lab:source", "lab:target", texts)
        >>> steersman.check_transplant(bridge, concept, layers=[2])
        <TransplantCheck: not shown to carry over; best at layer 2 of layers 2; 24 pairs>
    """
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
        found = {layer: _check_layer(bridge, concept, layer, states, rows) for layer in chosen}
        return TransplantCheck(
            layers=found,
            pairs={"name": source.name, "sha256": source.sha256},
            held_out=int((rows >= 0).sum()),
            clusters=len(np.unique(states.clusters[rows >= 0])),
            skipped=states.skipped,
            alike=states.alike,
        )


def _direction_rows(concept: ConceptVector, clusters: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each pair's direction: its fold's; after the folds' comes the whole one, of pairs in none; −1 where the
    only direction has seen the pair.
    """
    ids, numbers = concept.fold_clusters.numpy(), concept.fold_numbers.numpy()
    places = np.minimum(np.searchsorted(ids, clusters), len(ids) - 1)
    seen = ids[places] == clusters
    return np.where(seen, numbers[places], len(concept.fold_vectors))


def _check_layer(
    bridge: AffineMap,
    concept: ConceptVector,
    layer: int,
    states: PairStates,
    rows: NDArray[np.int64],
) -> LayerCheck:
    source_layer = bridge.layer_map(layer).source_layer
    place = concept.layers.index(source_layer)
    vector = concept.vectors[source_layer]
    mapped = bridge.map_vector(layer, vector)

    def carried(vectors: Tensor) -> NDArray[np.float64]:
        return np.array([bridge.map_vector(layer, one).double().numpy() for one in vectors])

    directions = carried(torch.cat([concept.fold_vectors[:, place], vector[None]]))
    held = rows >= 0
    found, reachable, arrives, shuffled = None, 1.0, 0.0, np.zeros((0, 2))
    if held.any():
        scores = _scores(states, layer, directions, rows)[held]
        found = separation(scores[:, 0], scores[:, 1], states.clusters[held], rows[held])
        perfect = separation(np.ones(len(scores)), np.zeros(len(scores)), states.clusters[held], rows[held])
        reachable = 1.0 if perfect is None else perfect.low
        arrives = float((scores[:, 0] - scores[:, 1]).mean())
        if len(concept.shuffled):
            shuffled = _of_shuffled(states, layer, carried(concept.shuffled[:, place]), rows)
    length = float(mapped.double().norm()) / bridge.norms[layer].median
    return LayerCheck(
        layer=layer,
        source_layer=source_layer,
        separation=found,
        shuffled=tuple(np.sort(shuffled[:, 0]).tolist()),
        reachable=reachable,
        carried=arrives,
        shuffled_carried=tuple(np.sort(shuffled[:, 1]).tolist()),
        at_source=concept.separation[source_layer],
        share_explained=float(bridge.share_explained(layer, vector)),
        length=length,
        gap=arrives / (length * bridge.norms[layer].median ** 2) if length > 0 else 0.0,
    )


def _scores(
    states: PairStates, layer: int, directions: NDArray[np.float64], rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Each pair's two sides along its own direction, [pairs, 2]."""
    scores = np.empty((len(states), 2))
    for pairs, chunk in states.chunks(layer):
        scores[pairs] = np.einsum("nsd,nd->ns", chunk.astype(np.float64), directions[rows[pairs]])
    return scores


def _of_shuffled(
    states: PairStates, layer: int, directions: NDArray[np.float64], rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Of each of several directions, [directions, 2]: the AUROC of held-out pairs along it, compared within
    the same folds, and what of it is carried.
    """
    held, found = rows >= 0, []
    size = max(1, _SCORES_BYTES // (16 * len(states)))
    for start in range(0, len(directions), size):
        some = directions[start : start + size]
        scores = np.empty((len(states), 2, len(some)))
        for pairs, chunk in states.chunks(layer):
            scores[pairs] = chunk.astype(np.float64) @ some.T
        of_held = scores[held]
        found += [
            (auroc(of_held[:, 0, number], of_held[:, 1, number], rows[held]), difference)
            for number, difference in enumerate((of_held[:, 0] - of_held[:, 1]).mean(axis=0))
        ]
    return np.array(found).reshape(-1, 2)


def _one_in_twenty(count: int) -> int:
    """The place, from 0, of the value that at most one in twenty reach, among `count` that ascend."""
    return math.ceil(0.95 * (count + 1)) - 1


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
        raise PlanError("no layer is named; leave layers out for the best one")
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


def _nothing_held_out(pairs: str) -> str:
    return (
        f"{pairs}: the concept was refined from this one group of pairs, so none are held out; give pairs of "
        "other groups"
    )
