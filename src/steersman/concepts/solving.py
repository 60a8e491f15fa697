"""From moments to an affine map: every pair of layers fitted and judged, a source layer chosen for each of
the target's; and parts of a job merged into what one run gives.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steersman.chat_record import common, rendered_otherwise, to_json
from steersman.concepts.affine_map import AffineMap, LayerMap, MapTable
from steersman.concepts.joint_moments import FIT, JointMoments, Sides
from steersman.concepts.norms import NormHistogram
from steersman.concepts.regression import R2_TIE, Fitting, Pair, held_out_moments, spreads
from steersman.concepts.separation import AUROC_TIE
from steersman.errors import ArtifactError, ModelError, PairsError, each_of
from steersman.models.same_weights import same_weights
from steersman.progress import differences
from steersman.shards import Shard
from steersman.showing import count_of
from steersman.ties import largest

if TYPE_CHECKING:
    from steersman.concepts.concept import ConceptVector

Ticking = Callable[[], object]


@dataclass(frozen=True)
class Judged:
    """How well pairs of layers do, each by its numbers; and of each source layer the effective rank and the
    condition number of its states.
    """

    sides: Sides
    pairs: Mapping[tuple[int, int], Pair]
    facts: Sequence[tuple[float, float]]

    @property
    def table(self) -> MapTable:
        """Every pair of layers. Raises KeyError where some were not judged."""

        def of(name: str) -> Tensor:
            sources, targets = range(len(self.sides.source_layers)), range(len(self.sides.target_layers))
            rows = [[getattr(self.pairs[one, other], name) for other in targets] for one in sources]
            return torch.tensor(rows, dtype=torch.float64)

        return MapTable(
            source_layers=self.sides.source_layers,
            target_layers=self.sides.target_layers,
            r2=of("r2"),
            r2_control=of("r2_control"),
            control_sd=of("control_sd"),
            ridge=of("ridge"),
            source_rank=torch.tensor([rank for rank, _ in self.facts], dtype=torch.float64),
            condition=torch.tensor([condition for _, condition in self.facts], dtype=torch.float64),
        )


Found = Callable[[Fitting, int, int, Pair], object]


def judge(moments: JointMoments, tick: Ticking | None = None, found: Found | None = None) -> Judged:
    """Fit every pair of layers that the moments have, and judge it on held-out rows.

    Args:
        moments: Of fitted and held-out rows.
        tick: Called after each source layer.
        found: Called with a source layer's fitting, the layer's and a target layer's number, and the pair.

    Raises:
        PairsError: too few rows.
        ModelError: the states of a layer are constant.
    """
    moments.flush()
    _check_rows(moments)
    sides = moments.sides
    inverse = spreads(moments)
    _check_varies(inverse[0], sides.source_layers, "source")
    _check_varies(inverse[1], sides.target_layers, "target")
    pairs: dict[tuple[int, int], Pair] = {}
    facts: list[tuple[float, float]] = []
    for source in range(len(sides.source_layers)):
        fitting = Fitting(moments, source, inverse)
        facts.append((fitting.basis.effective_rank, fitting.basis.condition))
        for target in (other for one, other in sides.numbers if one == source):
            pairs[source, target] = fitting.pair(target)
            if found is not None:
                found(fitting, source, target, pairs[source, target])
        if tick is not None:
            tick()
    return Judged(sides, pairs, facts)


def solve(
    moments: JointMoments, chosen: Sequence[int] = (), tick: Ticking | None = None
) -> tuple[dict[tuple[int, int], LayerMap], Judged]:
    """Fit every pair of layers; each target layer's map is from the source layer with the best held-out R²,
    of equals from the lowest.

    Args:
        moments: Of fitted and held-out rows.
        chosen: Source layers that are each taken for every target layer instead.
        tick: Called after each source layer.

    Returns:
        {(source layer, target layer): map}, and how well all pairs do.

    Raises:
        PairsError: too few rows.
        ModelError: the states of a layer are constant.
    """
    sides = moments.sides
    best: dict[int, tuple[float, int, LayerMap]] = {}
    maps: dict[tuple[int, int], LayerMap] = {}

    def keep(fitting: Fitting, source: int, target: int, found: Pair) -> None:
        layer, other = sides.source_layers[source], sides.target_layers[target]
        if layer in chosen:
            maps[layer, other] = _layer_map(moments, fitting, layer, target, found)
        elif not chosen and (other not in best or found.r2 > best[other][0] + R2_TIE):
            best[other] = found.r2, layer, _layer_map(moments, fitting, layer, target, found)

    judged = judge(moments, tick, keep)
    _warn_of_few_rows(moments, min(rank for rank, _ in judged.facts))
    maps |= {(source, target): of_layer for target, (_, source, of_layer) in best.items()}
    return maps, judged


def by_target(
    found: Mapping[tuple[int, int], LayerMap], chosen: Sequence[int]
) -> tuple[dict[int, LayerMap], dict[tuple[int, int], LayerMap]]:
    """Each target layer's map, from the source layer chosen first; and the others by both layers."""
    place = {layer: number for number, layer in enumerate(chosen)}
    maps: dict[int, LayerMap] = {}
    others: dict[tuple[int, int], LayerMap] = {}
    for (source, target), of_layer in sorted(
        found.items(), key=lambda one: (place.get(one[0][0], 0), one[0])
    ):
        if target in maps:
            others[source, target] = of_layer
        else:
            maps[target] = of_layer
    return dict(sorted(maps.items())), others


def _layer_map(moments: JointMoments, fitting: Fitting, source: int, place: int, found: Pair) -> LayerMap:
    weight, bias = fitting.affine(place, found.ridge)
    held_out = held_out_moments(moments, fitting.basis.index, place)
    return LayerMap(
        source_layer=source,
        weight=weight,
        bias=bias,
        r2=found.r2,
        r2_control=found.r2_control,
        control_sd=found.control_sd,
        ridge=found.ridge,
        effective_rank=fitting.effective_rank(place, found.ridge),
        held_out=replace(held_out, xx=held_out.xx.float(), yx=held_out.yx.float(), yy=held_out.yy.float()),
    )


def _check_rows(moments: JointMoments) -> None:
    fitted, held_out = (part.rows for part in moments.parts)
    if fitted < 2 or held_out < 2:
        raise PairsError(
            f"{count_of(fitted, 'row')} to fit and {held_out} held out are too few for a map: give more texts"
        )


def _check_varies(inverse: Tensor, layers: Sequence[int], side: str) -> None:
    for layer, of_layer in zip(layers, inverse.reshape(len(layers), -1), strict=True):
        if not bool((of_layer > 0).any()):
            raise ModelError(
                f"the states of the {side}'s layer {layer} are the same at every row: nothing can be mapped; "
                "give texts that differ, or leave the layer out"
            )


def _warn_of_few_rows(moments: JointMoments, rank: float) -> None:
    rows, width = moments.parts[FIT].rows, moments.sides.source_width
    if rows < width:
        warnings.warn(
            f"{count_of(rows, 'row')} to fit {width} dimensions of the source (effective rank of its "
            f"states {rank:.1f}): the map knows few directions; more texts give more",
            stacklevel=3,
        )


def choose_source(concept: ConceptVector, layers: Sequence[int]) -> int | None:
    """Of these source layers the one where a concept separates held-out pairs best; None where it is not
    known how it separates them.

    Raises ModelError where the concept has none of them.
    """
    known = [layer for layer in layers if layer in concept.vectors]
    if not known:
        raise ModelError(
            f"the concept has layers {', '.join(map(str, concept.layers))}, and none of the source "
            f"layers {', '.join(map(str, layers))}"
        )
    judged = {layer: found for layer in known if (found := concept.separation.get(layer)) is not None}
    if not judged:
        return None
    best = largest(sorted(judged), lambda layer: judged[layer].auroc, absolute=AUROC_TIE)
    return largest(best, concept.length)[0]


def merge_affine_maps(parts: Sequence[AffineMap]) -> AffineMap:
    """Add up the parts of a map (`fit_affine_map(…, shard="I/N")`), all of them: the result of one run.

    Raises ArtifactError where one is missing or given twice, or they are not parts of one map.

    Example:
        >>> texts = [f"please give me the {thing}" for thing in ("badge", "key", "book")] * 20
        >>> models = "lab:source", "lab:target"
        >>> parts = [steersman.fit_affine_map(*models, texts, shard=shard) for shard in ("1/2", "2/2")]
        >>> steersman.merge_affine_maps(parts)
        <AffineMap: lab:source → lab:target, target layers 0–3; 180 rows of 60 texts>
    """
    parts = each_of(parts, AffineMap, ArtifactError)
    first = _checked_parts(parts)
    moments = _copy_of(first)
    norms: dict[int, NormHistogram] = dict(first.norms)
    for part in parts[1:]:
        if part.moments is not None:
            moments.merge(part.moments)
        norms = {layer: histogram + part.norms[layer] for layer, histogram in norms.items()}
    concepts = [source.get("source_layer") for source in first.made_from if source.get("kind") == "concept"]
    chosen = [layer for layer in dict.fromkeys(concepts) if layer in moments.sides.source_layers]
    found, judged = solve(moments, chosen)
    maps, others = by_target(found, chosen)
    models = {
        side: replace(
            getattr(first, side), chat=functools.reduce(common, (getattr(part, side).chat for part in parts))
        )
        for side in ("source", "target")
    }
    return replace(
        first,
        **models,
        maps=maps,
        others=others,
        table=judged.table if first.table is None else first.table,
        norms=norms,
        rows=sum(part.rows for part in parts),
        texts=sum(part.texts for part in parts),
        held_out_rows=sum(part.held_out_rows for part in parts),
        held_out_texts=sum(part.held_out_texts for part in parts),
        moments=None,
        shard=None,
        _live={},
    )


def _copy_of(part: AffineMap) -> JointMoments:
    """Moments that can be added to without changing the part's."""
    if part.moments is None:
        raise ArtifactError(f"part {part.shard} has no moments")
    tensors = {name: tensor.clone() for name, tensor in part.moments.to_tensors().items()}
    return JointMoments.from_tensors(tensors, part.moments.sides, part.moments.seed)


def _checked_parts(parts: Sequence[AffineMap]) -> AffineMap:
    if not parts:
        raise ArtifactError("no parts to merge")
    whole = [part for part in parts if part.shard is None]
    if whole:
        raise ArtifactError("a map that is whole is among the parts: only parts made with --shard are merged")
    first, shards = parts[0], [Shard.parse(str(part.shard)) for part in parts]
    for part in parts[1:]:
        if told := rendered_otherwise(_chats(first), _chats(part), "{} and {}"):
            raise ArtifactError(
                f"the parts are not of one map: they differ in {told[0]}; read one again with {told[1]}"
            )
        if different := _different(first, part):
            raise ArtifactError(f"the parts are not of one map: they differ in {different}")
    count = shards[0].count
    given = [shard.number for shard in shards]
    if twice := sorted({number for number in given if given.count(number) > 1}):
        raise ArtifactError(f"part {twice[0]}/{count} is given twice")
    if missing := sorted(set(range(1, count + 1)) - set(given)):
        words = ", ".join(f"{number}/{count}" for number in missing[:8])
        raise ArtifactError(f"parts are missing: {words}; a map is merged from all of its parts")
    return first


def _chats(part: AffineMap) -> dict[str, Any]:
    return {"source": to_json(part.source.chat), "target": to_json(part.target.chat)}


def _different(one: AffineMap, other: AffineMap) -> str:
    """In what two parts differ that parts of one map have alike; empty where they are of one."""
    mine, theirs = _facts(one), _facts(other)
    for side, first, second in (
        ("source", one.source, other.source),
        ("target", one.target, other.target),
    ):
        if not same_weights(first, second):
            mine[f"the {side}'s weights"] = first.weights_id
            theirs[f"the {side}'s weights"] = second.weights_id
    return differences(mine, theirs, "{} and {}")


def _facts(part: AffineMap) -> dict[str, object]:
    """What all parts of one map have alike, beside the weights."""
    sides = None if part.moments is None else part.moments.sides
    return {
        "their texts or concept": [dict(source) for source in part.made_from],
        "their rows": part.alignment,
        "their seed": part.seed,
        "the source's layers": None if sides is None else sides.source_layers,
        "the target's layers": None if sides is None else sides.target_layers,
        "the pairs of layers": None if sides is None else sides.pairs,
        "the number of parts": Shard.parse(str(part.shard)).count,
    }
