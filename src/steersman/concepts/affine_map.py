"""Affine maps: what carries states and concepts of one model into the space of another, and how well.

ConTrans (arXiv 2405.13578), with rows at shared boundaries, ridge, and quality on held-out texts.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from steersman.chat_record import ChatRecord
from steersman.concepts.alignment import Rows
from steersman.concepts.joint_moments import JointMoments
from steersman.concepts.norms import NormHistogram
from steersman.concepts.regression import HeldOut
from steersman.errors import ArtifactError, PlanError
from steersman.showing import Shown, Table, count_of, cut, ranges
from steersman.steering import Architecture

if TYPE_CHECKING:
    from steersman.concepts.concept import ConceptVector
    from steersman.edits import Scope
    from steersman.steering import Steering


PAIRED = ("r2", "r2_control", "control_sd", "ridge")
"""What is known of each pair of layers."""
OF_SOURCES = ("source_rank", "condition")
HELD_OUT = ("xx", "yx", "yy")


@dataclass(frozen=True, repr=False)
class MappedModel(Shown):
    """One of the two models: what it is called, and which it is."""

    model: str
    revision: str | None
    weights_id: str
    architecture: Architecture
    chat: ChatRecord | None = None
    """How its chats were rendered; None where there were none."""

    @property
    def name(self) -> str:
        """What it is called."""
        return self.model

    def in_words(self) -> str:
        """What it is called, and what it is."""
        return f"{self.model or 'a model'}, {self.architecture.in_words()}"


@dataclass(frozen=True, repr=False)
class LayerMap(Shown):
    """x ↦ W x + b from a source layer's states to a target layer's.

    Attributes:
        source_layer: From 0.
        weight: float64 [d_target, d_source].
        bias: float64 [d_target].
        r2: 1 − ΣSS_res/ΣSS_tot over standardised dimensions, on held-out texts.
        r2_control: Mean of the same over 20 pairings of rows between texts.
        control_sd: Their standard deviation.
        ridge: What did best on the held-out texts.
        effective_rank: exp of the entropy of the standardised map's singular values.
        held_out: Second moments of held-out rows, for `AffineMap.share_explained`.
    """

    source_layer: int
    weight: Tensor
    bias: Tensor
    r2: float
    r2_control: float
    control_sd: float
    ridge: float
    effective_rank: float
    held_out: HeldOut

    def to_tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` takes, beside the source layer and the effective rank."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "quality": torch.tensor([getattr(self, name) for name in PAIRED], dtype=torch.float64),
            **{f"held_out.{name}": getattr(self.held_out, name) for name in HELD_OUT},
        }

    @classmethod
    def from_tensors(
        cls, source_layer: int, effective_rank: float, tensors: Mapping[str, Tensor]
    ) -> LayerMap:
        """A map as it was."""
        return cls(
            source_layer=source_layer,
            weight=tensors["weight"],
            bias=tensors["bias"],
            held_out=HeldOut(**{name: tensors[f"held_out.{name}"] for name in HELD_OUT}),
            effective_rank=effective_rank,
            **dict(zip(PAIRED, tensors["quality"].tolist(), strict=True)),
        )

    def in_words(self) -> str:
        """Where it comes from, how large it is, how well it does."""
        rows, columns = self.weight.shape
        size = f"{columns} → {count_of(rows, 'number')}"
        return f"from layer {self.source_layer}, {size}, R² {self.r2:.3f}, ridge {self.ridge:.1g}"


@dataclass(frozen=True, repr=False)
class MapTable(Shown):
    """Every pair of layers: float64 [source layers, target layers] `r2`, `r2_control`, `control_sd` and
    `ridge`; [source layers] `source_rank` (exp of the entropy of the eigenvalues of the states' correlations)
    and `condition` (their largest over their smallest).

    `rows` says of how many rows, where it is the estimate that layers were chosen by (`layer_choice`); None
    where all rows made it.
    """

    source_layers: tuple[int, ...]
    target_layers: tuple[int, ...]
    r2: Tensor
    r2_control: Tensor
    control_sd: Tensor
    ridge: Tensor
    source_rank: Tensor
    condition: Tensor
    rows: int | None = None

    @classmethod
    def below(cls, tables: Sequence[MapTable], *, rows: int | None = None) -> MapTable:
        """One table of those of other source layers, one below the other."""
        joined = {
            name: torch.cat([getattr(table, name) for table in tables]) for name in (*PAIRED, *OF_SOURCES)
        }
        sources = tuple(layer for table in tables for layer in table.source_layers)
        return cls(sources, tables[0].target_layers, **joined, rows=rows)

    def beside(self, other: MapTable) -> MapTable:
        """The same with other target layers as well."""
        joined = {name: torch.cat([getattr(of, name) for of in (self, other)], 1) for name in PAIRED}
        return replace(self, target_layers=self.target_layers + other.target_layers, **joined)  # type: ignore[arg-type]

    def in_words(self) -> str:
        """Which layers it pairs."""
        of = "" if self.rows is None else f", from {count_of(self.rows, 'row')}"
        return f"source layers {ranges(self.source_layers)} × target layers {ranges(self.target_layers)}{of}"


@dataclass(frozen=True, eq=False, repr=False)
class AffineMap(Shown):
    """Maps of decoder layers' outputs, from a source model to a target model.

    Attributes:
        maps: {target layer: its map}; empty for a part (`shard`) that is to be merged.
        source, target: The models.
        rows, texts: How many were read, held-out ones included; `held_out_rows` and `held_out_texts` of them.
        skipped: Texts left out, as too long or without a row that both share.
        alignment: Which rows: `boundaries` or `last`.
        table: Every pair of layers; None for a part whose layers no sample has chosen.
        norms: {target layer: norms of its states in scope}, for doses.
        made_from: Name and sha256 of the texts, and of the concept that chose the source layer.
        seed: Of the control's pairings.
        moments: Of a part, to be merged; else None.
        shard: "I/N" of a part; else None.
        others: {(source layer, target layer): map} beside `maps`, where several concepts chose other layers.
    """

    maps: Mapping[int, LayerMap]
    source: MappedModel
    target: MappedModel
    rows: int
    texts: int
    held_out_rows: int
    held_out_texts: int
    skipped: int
    alignment: Rows
    table: MapTable | None
    norms: Mapping[int, NormHistogram]
    made_from: tuple[Mapping[str, Any], ...] = ()
    seed: int = 0
    moments: JointMoments | None = None
    shard: str | None = None
    others: Mapping[tuple[int, int], LayerMap] = field(default_factory=dict)
    _live: dict[str, tuple[weakref.ref[Any], weakref.ref[Any]]] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The target layers."""
        return tuple(sorted(self.maps))

    def of_concept(self, concept: ConceptVector) -> AffineMap:
        """The same with the maps from the layer that a concept chose, where it was among those given."""
        layer = next(
            (entry.get("source_layer") for entry in self._concepts if entry["refined"] == refined(concept)),
            None,
        )
        if not self.others or layer is None:
            return self
        maps = {target: self.others.get((layer, target), of_layer) for target, of_layer in self.maps.items()}
        return replace(self, maps=maps, others={})

    @property
    def fitted_groups(self) -> frozenset[int]:
        """Hashes of the groups of concepts' pairs that the fit has seen, which therefore cannot judge it."""
        return frozenset(group for entry in self._concepts for group in entry.get("fitted", ()))

    @property
    def _concepts(self) -> list[Mapping[str, Any]]:
        return [entry for entry in self.made_from if entry.get("kind") == "concept" and "refined" in entry]

    @property
    def architecture(self) -> Architecture:
        """The target's architecture: the model that a plan made by this map belongs to."""
        return self.target.architecture

    @property
    def weights_id(self) -> str:
        """The target's weights."""
        return self.target.weights_id

    @property
    def model(self) -> str:
        """The target's name."""
        return self.target.model

    @property
    def revision(self) -> str | None:
        """The target's revision on the Hub."""
        return self.target.revision

    @property
    def chat(self) -> ChatRecord | None:
        """How the target's chats were rendered."""
        return self.target.chat

    @property
    def _target(self) -> tuple[nn.Module, PreTrainedTokenizerBase] | None:
        """The target model and its tokenizer, where they were fitted here and are still in memory."""
        return self._alive("target")

    @property
    def _source(self) -> tuple[nn.Module, PreTrainedTokenizerBase] | None:
        return self._alive("source")

    def _alive(self, side: str) -> tuple[nn.Module, PreTrainedTokenizerBase] | None:
        if side not in self._live:
            return None
        model, tokenizer = (reference() for reference in self._live[side])
        return None if model is None or tokenizer is None else (model, tokenizer)

    def remember(self, side: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Know a model, "source" or "target", as long as others keep it in memory."""
        self._live[side] = weakref.ref(model), weakref.ref(tokenizer)

    def layer_map(self, layer: int) -> LayerMap:
        """The map of a target layer. Raises PlanError where there is none, ArtifactError for a part."""
        if self.shard is not None:
            raise ArtifactError(f"this is part {self.shard} of a map: merge all parts first")
        if layer not in self.maps:
            known = ", ".join(map(str, self.layers))
            raise PlanError(f"the map has no target layer {layer!r}: it has {known}")
        return self.maps[layer]

    def map_vector(self, layer: int, vector: Tensor) -> Tensor:
        """W v for a target layer: where a difference of source states goes (b cancels).

        Args:
            layer: Target layer.
            vector: [d_source], of the layer that `maps[layer].source_layer` names.

        Returns:
            float32 [d_target].

        Raises:
            PlanError: there is no such layer, or the vector has another length.
        """
        of_layer = self.layer_map(layer)
        return (of_layer.weight @ self._checked(of_layer, vector)).float()

    def share_explained(self, layer: int, vector: Tensor) -> float:
        """What the map explains of a concept: corr² of û·h_target with û·(W h_source) over held-out rows, û =
        Wv/|Wv|; 0 to 1. Raises PlanError as `map_vector` does.
        """
        of_layer = self.layer_map(layer)
        return of_layer.held_out.share(of_layer.weight, self._checked(of_layer, vector))

    def _checked(self, of_layer: LayerMap, vector: Tensor) -> Tensor:
        width = of_layer.weight.shape[1]
        if tuple(vector.shape) != (width,):
            raise PlanError(f"a vector of shape {list(vector.shape)} is not in the source's space, [{width}]")
        return vector.detach().cpu().double()

    def transplant(
        self,
        concept: ConceptVector,
        strength: float | str | None = None,
        *,
        layers: int | Sequence[int] | Literal["all"] | None = None,
        target: tuple[nn.Module, PreTrainedTokenizerBase] | str | Path | None = None,
        pairs: Any = None,
        force: bool = False,
        scope: Scope = "answer",
        **options: Any,
    ) -> Steering:
        """A steering of the target toward a concept of the source, if the gate lets it through.

        Takes, returns and raises what `concepts.transplant.transplant` does, with this map.
        """
        from steersman.concepts.transplant import transplant

        return transplant(
            self,
            concept,
            strength,
            layers=layers,
            target=target,
            pairs=pairs,
            force=force,
            scope=scope,
            **options,
        )

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the map. Raises ArtifactError where the folder is occupied (unless `force`) or unwritable."""
        from steersman.artifacts.affine_map import save_affine_map

        save_affine_map(self, folder, force=force)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> AffineMap:
        """Read a map from a folder or the Hub. Raises ArtifactError: it is damaged, foreign or newer."""
        from steersman.artifacts.affine_map import load_affine_map

        return load_affine_map(source, revision=revision)

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **options: Any) -> str:
        """Upload the map to the Hugging Face Hub with a model card; returns the commit's address.

        `license` is asked for, as the Hub names it ("apache-2.0"); options are `base_model`, `private`,
        `revision`, `token`, and those of `HfApi.upload_folder`. Raises `ArtifactError` where it fails.
        """
        from steersman.artifacts import push_folder

        return push_folder(self.save_pretrained, repo_id, license=license, **options)

    def in_words(self) -> str:
        """Which models and layers, of how many rows."""
        part = f", part {self.shard}" if self.shard else ""
        layers = f"target layers {ranges(self.layers)}" if self.maps else "no layers yet"
        models = f"{cut(self.source.name or 'a model')} → {cut(self.target.name or 'a model')}"
        return f"{models}, {layers}; {count_of(self.rows, 'row')} of {count_of(self.texts, 'text')}{part}"

    def as_tables(self) -> list[Table]:
        """Target layer by target layer: where it comes from, and how well."""
        if self.table is None or not self.maps:
            return []
        ranks = dict(zip(self.table.source_layers, self.table.source_rank.tolist(), strict=True))
        conditions = dict(zip(self.table.source_layers, self.table.condition.tolist(), strict=True))
        others = [(target, of) for (_, target), of in self.others.items()]
        rows = [
            (
                layer,
                of.source_layer,
                f"{of.r2:.3f}",
                f"{of.r2_control:+.3f} ± {of.control_sd:.3f}",
                f"{of.ridge:.1g}",
                f"{of.effective_rank:.1f}",
                f"{ranks[of.source_layer]:.1f}",
                f"{conditions[of.source_layer]:.1e}",
            )
            for layer, of in sorted([*self.maps.items(), *others], key=lambda one: one[0])
        ]
        header = ("target", "source", "R²", "control", "ridge", "rank of map", "rank of source", "condition")
        return [(header, rows)]


def refined(concept: ConceptVector) -> dict[str, Any]:
    """Which concept it is: how it was refined, and from what."""
    return {
        "method": concept.method,
        "position": concept.position,
        "layers": list(concept.layers),
        "from": [source.get("sha256") for source in concept.made_from],
    }
