"""Maps by way of anchors: each model is encoded once, and any two encoded models are mapped to each other.

After "Cross-Family Universality of Behavioral Axes via Anchor-Projected Representations" (Kim and Han, arXiv
2605.09875): a direction's coordinates are its products with the model's own states of shared anchor texts,
and another model's direction is the one with the same coordinates there. With anchor states A (standardised,
[anchors, d]): c = A_s v and v_t = argmin |A_t v_t − c|² + ridge · anchors · |v_t|², that is

W = (A_t'A_t + ridge · anchors · I)⁻¹ A_t'A_s.

N models need N encoders, not N² maps; an affine map, which is fitted for a pair, explains more of the states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from steersman.concepts.affine_map import AffineMap, LayerMap, MappedModel, MapTable
from steersman.concepts.aligned_texts import is_held_out
from steersman.concepts.joint_moments import DRAWS
from steersman.concepts.norms import NormHistogram
from steersman.concepts.opening import Side
from steersman.concepts.regression import R2_TIE, RIDGES, HeldOut, effective_rank
from steersman.concepts.rows import states_of_texts
from steersman.concepts.states import check_layers
from steersman.edits import as_layers
from steersman.errors import ModelError, PairsError, check_kind, whole_number
from steersman.models.loading import Named, open_named
from steersman.showing import Shown, cut, ranges
from steersman.texts import load_texts
from steersman.ties import largest


@dataclass(frozen=True, eq=False, repr=False)
class AnchorEncoder(Shown):
    """A model's states of the anchors.

    Attributes:
        of: The model.
        states: {layer: float32 [anchors, width]}, of each text's last token.
        held_out: bool [anchors], those that judge maps instead of making them.
        norms: {layer: norms of the states}.
        made_from: Name and sha256 of the anchors.
    """

    of: MappedModel
    states: Mapping[int, Tensor]
    held_out: Tensor
    norms: Mapping[int, NormHistogram]
    made_from: Mapping[str, Any]

    def in_words(self) -> str:
        """Whose states, at how many anchors."""
        layers = ranges(tuple(sorted(self.states)))
        return f"{len(self.held_out)} anchors at layers {layers} of {cut(self.of.name or 'a model', 100)}"


def encode_anchors(
    model: Named,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Any,
    layers: Sequence[int] | None = None,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> AnchorEncoder:
    """Encode a model once, for maps to and from every other model that is encoded with the same texts.

    Args:
        model: A transformers model, or its name.
        tokenizer: Its fast tokenizer; None takes that of a model named.
        texts: Anchors: texts or chats, or what `load_texts` takes; some hundreds. One in five is held out.
        layers: Default: all.
        batch_size: Texts in one forward.
        progress: Show a bar on stderr.

    Raises:
        PairsError: a text cannot be read, or there are too few to hold some out.
        ModelError: a layer does not exist, or a state is not finite.

    Example:
        >>> anchors = [f"please give me {number}" for number in range(40)]
        >>> steersman.encode_anchors("lab:source", None, anchors)
        <AnchorEncoder: 40 anchors at layers 0–1 of lab:source>
    """
    model, tokenizer = open_named(model, tokenizer)
    side = Side((model, tokenizer), late=False, options=None)
    chosen = side.layers if layers is None else as_layers(layers, ModelError)
    check_layers(chosen, len(side.layers))
    if not chosen:
        raise PairsError("name at least one layer")
    batch_size = whole_number("batch_size", batch_size, 1, PairsError)
    read = load_texts(texts)
    held_out = torch.tensor([is_held_out(text.content) for text in read])
    if min(int(held_out.sum()), int((~held_out).sum())) < 2:
        raise PairsError(f"{read.name}: {len(read)} anchors are too few to hold some out: give more texts")
    reader = side.reader()
    ids = [reader.ids(text.content, text.where) for text in read]
    with side.ready() as ready:
        found = [
            states[-1].float()
            for states in tqdm(
                states_of_texts(ready, chosen, ids, batch_size),
                total=len(ids),
                desc="anchors",
                unit="text",
                delay=1,
                disable=not progress,
            )
        ]
    stacked = torch.stack(found)
    norms = {layer: NormHistogram() for layer in chosen}
    for place, layer in enumerate(chosen):
        norms[layer].add(stacked[:, place].norm(dim=-1))
    return AnchorEncoder(
        of=side.identity,
        states={layer: stacked[:, place].clone() for place, layer in enumerate(chosen)},
        held_out=held_out,
        norms=norms,
        made_from={"kind": "anchors", "name": read.name, "sha256": read.sha256},
    )


def anchor_map(source: AnchorEncoder, target: AnchorEncoder, *, seed: int = 0) -> AffineMap:
    """The map between two encoded models by way of their anchors, judged on the anchors that are held out.

    Raises ModelError where they were encoded with other anchors, or states are the same at all of them.

    Example:
        >>> anchors = [f"please give me {number}" for number in range(40)]
        >>> encoded = [steersman.encode_anchors(name, None, anchors) for name in ("lab:source", "lab:target")]
        >>> steersman.anchor_map(*encoded)
        <AffineMap: lab:source → lab:target, target layers 0–3; 40 rows of 40 texts>
    """
    for encoder in (source, target):
        check_kind(encoder, AnchorEncoder, ModelError)
    if source.made_from["sha256"] != target.made_from["sha256"]:
        raise ModelError(
            f"the models were encoded with other anchors ({source.made_from['name']} and "
            f"{target.made_from['name']}): encode both with the same texts"
        )
    for side, encoder in (("source", source), ("target", target)):
        _check_varies(encoder, side)
    pairs = {
        (one, other): AnchorPair(source.states[one], target.states[other], source.held_out, seed)
        for one in source.states
        for other in target.states
    }
    maps = {}
    for other in target.states:
        r2 = {one: pairs[one, other].r2 for one in source.states}
        best = largest(sorted(r2), r2.__getitem__, 0.0, R2_TIE)[0]
        maps[other] = pairs[best, other].layer_map(best)
    count, held_out = len(source.held_out), int(source.held_out.sum())
    return AffineMap(
        maps=maps,
        source=source.of,
        target=target.of,
        rows=count,
        texts=count,
        held_out_rows=held_out,
        held_out_texts=held_out,
        skipped=0,
        alignment="last",
        table=_table(tuple(source.states), tuple(target.states), pairs),
        norms=target.norms,
        made_from=(source.made_from,),
        seed=seed,
    )


def _check_varies(encoder: AnchorEncoder, side: str) -> None:
    for layer, states in encoder.states.items():
        for part in (states[~encoder.held_out], states[encoder.held_out]):
            if bool((part == part[0]).all()):
                raise ModelError(
                    f"the states of the {side}'s layer {layer} are the same at every anchor: nothing can be "
                    "mapped; give texts that differ, or leave the layer out"
                )


class _Standard:
    """Anchor states of a layer: float64, standardised by those that are not held out."""

    def __init__(self, states: Tensor, held_out: Tensor) -> None:
        wide = states.double()
        self.mean, spread = wide[~held_out].mean(0), wide[~held_out].std(0, correction=0)
        self.inverse = torch.where(spread > 0, 1 / spread.masked_fill(spread == 0, 1.0), 0.0)
        self.spread = spread
        scaled = (wide - self.mean) * self.inverse
        self.fit, self.held_out = scaled[~held_out], scaled[held_out]


class AnchorPair:
    """The map of one pair of layers, with the ridge that does best on held-out anchors."""

    def __init__(self, source: Tensor, target: Tensor, held_out: Tensor, seed: int) -> None:
        self._source, self._target = _Standard(source, held_out), _Standard(target, held_out)
        left, self._singular, right = torch.linalg.svd(self._target.fit, full_matrices=False)
        self._left, self._right = left, right
        tried = [self._quality(self._standard(ridge, self._source.fit)) for ridge in RIDGES]
        best = largest(range(len(RIDGES)), tried.__getitem__, 0.0, R2_TIE)[-1]
        self.r2, self.ridge = tried[best], RIDGES[best]
        generator = torch.Generator().manual_seed(seed)
        control = torch.tensor([self._of_other_texts(generator) for _ in range(DRAWS)])
        self.r2_control, self.control_sd = float(control.mean()), float(control.std())
        self.standard = self._standard(self.ridge, self._source.fit)
        eigenvalues = torch.linalg.svdvals(self._source.fit) ** 2
        self.source_rank = effective_rank(eigenvalues)
        self.condition = min(float(eigenvalues.max() / eigenvalues.min().clamp(min=1e-300)), 1e16)

    def _standard(self, ridge: float, source: Tensor) -> Tensor:
        gains = self._singular / (self._singular**2 + ridge * len(source))
        standard: Tensor = self._right.T @ (gains[:, None] * (self._left.T @ source))
        return standard

    def _quality(self, standard: Tensor, order: Tensor | None = None) -> float:
        wanted = self._target.held_out if order is None else self._target.held_out[order]
        residual = ((wanted - self._source.held_out @ standard.T) ** 2).sum()
        return float(1 - residual / (wanted**2).sum())

    def _of_other_texts(self, generator: torch.Generator) -> float:
        fitted = torch.randperm(len(self._source.fit), generator=generator)
        order = torch.randperm(len(self._target.held_out), generator=generator)
        return self._quality(self._standard(self.ridge, self._source.fit[fitted]), order)

    def affine(self) -> tuple[Tensor, Tensor]:
        """W [dt, ds] and b [dt] for states as they are."""
        weight = self._target.spread[:, None] * self.standard * self._source.inverse
        return weight, self._target.mean - weight @ self._source.mean

    def layer_map(self, source_layer: int) -> LayerMap:
        """With the held-out anchors' moments."""
        weight, bias = self.affine()
        x = self._source.held_out * self._source.spread
        y = self._target.held_out * self._target.spread
        x, y = x - x.mean(0), y - y.mean(0)
        return LayerMap(
            source_layer=source_layer,
            weight=weight,
            bias=bias,
            r2=self.r2,
            r2_control=self.r2_control,
            control_sd=self.control_sd,
            ridge=self.ridge,
            effective_rank=effective_rank(torch.linalg.svdvals(self.standard)),
            held_out=HeldOut(*((a.T @ b / len(x)).float() for a, b in ((x, x), (y, x), (y, y)))),
        )


def _table(
    sources: tuple[int, ...], targets: tuple[int, ...], pairs: Mapping[tuple[int, int], AnchorPair]
) -> MapTable:
    def of(name: str) -> Tensor:
        rows = [[getattr(pairs[one, other], name) for other in targets] for one in sources]
        return torch.tensor(rows, dtype=torch.float64)

    return MapTable(
        source_layers=sources,
        target_layers=targets,
        r2=of("r2"),
        r2_control=of("r2_control"),
        control_sd=of("control_sd"),
        ridge=of("ridge"),
        source_rank=of("source_rank")[:, 0],
        condition=of("condition")[:, 0],
    )
