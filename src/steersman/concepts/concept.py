"""Concept vectors: one direction a layer, how well each tells held-out pairs apart, and what judges them in
another model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.chat_record import ChatRecord, in_provenance
from steersman.concepts.directions import shuffled_directions
from steersman.concepts.dose import (
    DEFAULT_DOSE,
    Strength,
    defaults_of,
    doses,
    residual_edits,
    typical_layer,
)
from steersman.concepts.norms import NormHistogram
from steersman.concepts.positions import Position
from steersman.concepts.separation import AUROC_TIE, Separation
from steersman.edits import Operation, Scope, as_layers
from steersman.errors import PlanError
from steersman.pairs import ContrastPairs
from steersman.showing import Shown, Table, count_of, cut, ranges
from steersman.steering import Architecture, Steering
from steersman.ties import largest

Method = Literal["mean_difference", "pca", "pca_diff"]
METHODS: tuple[Method, ...] = ("mean_difference", "pca", "pca_diff")


@dataclass(frozen=True, eq=False, repr=False)
class ConceptVector(Shown):
    """A concept in the residual stream of one model.

    Attributes:
        vectors: {layer: direction [width]} float32 on the CPU; layers from 0, their output.
        separation: {layer: how well the direction of other folds separates held-out pairs}; None where there
            are fewer than two clusters.
        fold_vectors: Directions of all pairs but a fold's, [folds, layers, width] (no folds below two
            clusters).
        fold_clusters: Ids of the clusters, ascending, int64 [clusters], and
        cluster_units: the unit that each lies in, int64 [clusters].
        unit_sums: Sums of the differences of each unit's pairs, [units, layers, width]: what relabelled
            concepts are made of. None are known of concepts that were written before format 3.
        unit_sizes: How many pairs each unit has, int64 [units].
        norms: {layer: norms of the states of tokens that scope `answer` touches}.
        architecture: Of the model.
        weights_id: Of the model.
        method: `mean_difference`, `pca` or `pca_diff`.
        position: Where it was read: `last` or `target_mean`.
        pairs: How many it was refined from.
        clusters: How many independent ones there are.
        skipped: Pairs left out because they are too long.
        alike: Pairs left out because both sides are the same tokens.
        model: The model's name.
        revision: Its commit.
        made_from: Name and sha256 of the pairs.
    """

    vectors: Mapping[int, Tensor]
    separation: Mapping[int, Separation | None]
    fold_vectors: Tensor
    fold_clusters: Tensor
    cluster_units: Tensor
    unit_sums: Tensor
    unit_sizes: Tensor
    norms: Mapping[int, NormHistogram]
    architecture: Architecture
    weights_id: str
    method: Method
    position: Position
    pairs: int
    clusters: int
    skipped: int = 0
    alike: int = 0
    model: str = ""
    revision: str | None = None
    made_from: tuple[Mapping[str, Any], ...] = ()
    chat: ChatRecord | None = None
    """How its chats were rendered; None where there were none."""
    _pairs: ContrastPairs | None = field(default=None, repr=False)
    """The pairs themselves, while they are in memory; not saved."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a direction, ascending."""
        return tuple(sorted(self.vectors))

    @property
    def fold_numbers(self) -> Tensor:
        """The fold that each cluster lies in, int64 [clusters]; −1 where nothing is held out."""
        folds = len(self.fold_vectors)
        return self.cluster_units % folds if folds else torch.full_like(self.cluster_units, -1)

    @cached_property
    def shuffled(self) -> Tensor:
        """99 directions of shuffled labels, [draws, layers, width]: nothing but the concept's noise. None of
        pairs that are of one group, and none where no sums of units are known.
        """
        if len(self.unit_sums) < 2:
            return self.unit_sums[:0]
        drawn = shuffled_directions(self.unit_sums.numpy(), self.unit_sizes.numpy())
        return torch.from_numpy(drawn).float()

    @property
    def best_layer(self) -> int:
        """The layer whose direction separates held-out pairs best (to a thousandth of AUROC); of equals, the
        one whose direction is longest among its states. It does not tell where to steer. Raises PlanError
        where none can be told.
        """
        known = [(layer, found) for layer, found in sorted(self.separation.items()) if found is not None]
        if not known:
            raise PlanError("no layer is known to separate best: its pairs are of one group")
        best = [layer for layer, _ in largest(known, lambda entry: entry[1].auroc, absolute=AUROC_TIE)]
        return largest(best, self.length)[0]

    def length(self, layer: int) -> float:
        """‖v‖ / median ‖h‖: what strength 1 adds, as a dose. 0 where no norms are known."""
        norms = self.norms.get(layer)
        if norms is None or not norms.count:
            return 0.0
        return float(self.vectors[layer].double().norm()) / norms.median

    def chosen_layers(self, layers: int | Iterable[int] | Literal["all"] | None) -> tuple[int, ...]:
        """Layers as they are asked for; by default the one nearest to two thirds of the model's depth. Raises
        PlanError for one that it lacks.
        """
        if layers is None:
            return (typical_layer(self.layers, self.architecture.layer_count),)
        if isinstance(layers, str):
            if layers != "all":
                raise PlanError(f"layers={layers!r} is unknown: give layer numbers, or 'all'")
            return self.layers
        asked = tuple(dict.fromkeys(as_layers(layers, PlanError)))
        if not asked:
            raise PlanError("no layer is named; leave layers out for the default")
        for layer in asked:
            if layer not in self.vectors:
                has = ", ".join(map(str, self.layers))
                raise PlanError(f"the concept has no layer {layer!r}; it has {has}")
        return asked

    def steering(
        self,
        strength: float | str | None = None,
        layers: int | Iterable[int] | Literal["all"] | None = None,
        *,
        scope: Scope = "answer",
        operation: Operation = "add",
    ) -> Steering:
        """A plan of this concept in its own model.

        Args:
            strength: A factor of the vector, or a dose: strength · ‖v‖ as a share of the median norm of the
                layer's states. Below 0 it steers away. By default `"dose:0.3"`.
            layers: By default the one nearest to two thirds of the depth; `"all"` only when said. What works,
                `tune` finds.
            scope: Which tokens.
            operation: `add`, or `project` with a strength from 0 to 1.

        Raises:
            PlanError: a layer that the concept lacks, a strength that is no number, a zero vector.

        Example:
            >>> pairs = steersman.load_pairs("lab:refusal/train")[:24]
            >>> concept = steersman.refine_concept("lab:source", None, pairs)
            >>> concept.steering("dose:0.5", layers=1)
            <Steering: vectors (add × ...) at layer 1; scope answer; for lab:source, ...>
        """
        dial = Strength.parse(DEFAULT_DOSE if strength is None else strength)
        chosen = {layer: self.vectors[layer] for layer in self.chosen_layers(layers)}
        edits = residual_edits(chosen, dial, self.norms, scope, operation)
        return Steering(
            edits=edits,
            architecture=self.architecture,
            weights_id=self.weights_id,
            model=self.model,
            revision=self.revision,
            provenance={
                "made": "concept",
                "strength": str(dial),
                **defaults_of(layers, strength),
                "doses": doses(edits, self.norms),
                "concept": self.provenance(),
            },
        )

    def provenance(self) -> dict[str, Any]:
        """What plans say of the concept they were made of."""
        return {
            "method": self.method,
            "position": self.position,
            "model": self.model,
            **in_provenance(self.chat),
            "from": [dict(source) for source in self.made_from],
        }

    def vector_at(self, layer: int) -> Tensor:
        """The direction of a layer, float64 [width]. Raises PlanError for one that it lacks."""
        return self.vectors[self.chosen_layers(layer)[0]].to(torch.float64)

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the concept as a folder (manifest.json, tensors.safetensors), atomically."""
        from steersman.artifacts import save_concept

        save_concept(self, folder, force=force)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> ConceptVector:
        """Read a concept from a folder or from the Hub.

        Raises `ArtifactError` for anything damaged, foreign or newer.
        """
        from steersman.artifacts import load_concept

        return load_concept(source, revision=revision)

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **options: Any) -> str:
        """Upload the concept to the Hugging Face Hub with a model card; returns the commit's address.

        `license` is asked for, as the Hub names it ("apache-2.0"); options are `base_model`, `private`,
        `revision`, `token`, and those of `HfApi.upload_folder`. Raises `ArtifactError` where it fails.
        """
        from steersman.artifacts import push_folder

        return push_folder(self.save_pretrained, repo_id, license=license, **options)

    def in_words(self) -> str:
        """What was refined, from what, and where it separates best."""
        known = [found for found in self.separation.values() if found is not None]
        best = (
            f", AUROC {max(found.auroc for found in known):.3f} at layer {self.best_layer}" if known else ""
        )
        pairs, clusters = count_of(self.pairs, "pair"), count_of(self.clusters, "cluster")
        where = f"layers {ranges(self.layers)}{best}; {pairs} in {clusters}"
        return f"{where}; {self.method}, {self.position}; for {cut(self.model or 'a model', 100)}"

    def as_tables(self) -> list[Table]:
        """Layer by layer: how well the direction separates held-out pairs, and how long it is."""
        best = self.best_layer if any(self.separation.values()) else None
        rows = []
        for layer in self.layers:
            found = self.separation[layer]
            rows.append(
                (
                    layer,
                    "–" if found is None else f"{found.auroc:.3f}",
                    "–"
                    if found is None or found.low != found.low
                    else f"[{found.low:.3f}, {found.high:.3f}]",
                    f"{float(self.vectors[layer].norm()):.3g}",
                    f"{self.length(layer):.2f}",
                    "best" if layer == best else "",
                )
            )
        return [(("layer", "AUROC", "95 % interval", "norm", "dose at 1", ""), rows)]
