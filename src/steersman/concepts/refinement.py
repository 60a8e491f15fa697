"""Refinement: a concept vector from contrast pairs, all layers in one pass, streaming (ConTrans, arXiv
2405.13578, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from steersman.chats.format import NotedChats
from steersman.concepts.concept import METHODS, ConceptVector, Method
from steersman.concepts.directions import (
    Directions,
    fold_of,
    held_out_scores,
    mean_differences,
    principal_directions,
    unit_of,
)
from steersman.concepts.pair_states import Checkpoint, PairStates, read_pairs
from steersman.concepts.positions import POSITIONS, Position, dtype_of
from steersman.concepts.separation import Separation, separation
from steersman.concepts.states import check_layers
from steersman.edits import as_layers
from steersman.errors import ModelError, PairsError, whole_number
from steersman.models.architecture import decoder_layers, read_architecture
from steersman.models.identity import model_name, weights_id
from steersman.models.loading import Named, open_named
from steersman.pairs import ContrastPairs, Rows, load_pairs
from steersman.progress import discard


def refine_concept(
    model: Named,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: ContrastPairs | str | Path | Rows,
    *,
    layers: Sequence[int] | Literal["all"] | None = None,
    position: Position = "last",
    method: Method = "mean_difference",
    batch_size: int = 16,
    truncate: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> ConceptVector:
    """Refine a concept: per layer, the direction from the negative sides' states to the positive ones'.

    h is the output of a decoder layer, from 0, before any final norm, at one token of each side. Memory does
    not grow with the number of pairs but for a few numbers a pair: states go to a temporary file.

    Args:
        model: A transformers decoder model, dense or Mixture-of-Experts, or its name.
        tokenizer: Its (fast) tokenizer; None takes that of a model named.
        pairs: Contrast pairs, or what `load_pairs` takes.
        layers: Decoder layers, from 0; all of them by default.
        position: `last`: the last target token where a side ends with the assistant's words (or is a text),
            else the last token of the generation prompt. `target_mean`: the mean over the target's tokens.
        method: `mean_difference`, the mean over pairs of h(positive) − h(negative) (ConTrans); or `pca`, the
            top direction of these differences, with the orientation and length of the mean's projection on it
            (RepE, arXiv 2310.01405; `pca_center` of repeng); or `pca_diff`, that of the differences less
            their mean (the default of repeng).
        batch_size: Texts in one forward.
        truncate: Leave out pairs with a side longer than the model's context, and count them in `skipped`.
        checkpoint: A folder to save the states that are read in, with how far it is. It is yours to remove.
        resume: Go on from what is saved in `checkpoint`, if anything is; otherwise that is an error.
        progress: Show a progress bar on stderr where it takes more than a second.

    Raises:
        ArtifactError: saved progress is damaged, not wanted, or of another run.
        ModelError: a layer does not exist, or gives states that are not finite.
        PairsError: a pair cannot be encoded, both sides of every pair are the same tokens up to the last one
            that is read (where only some are, they are left out and counted in `alike`), or at every layer
            both sides of all pairs have the same state.

    Example:
        >>> pairs = steersman.load_pairs("lab:refusal/train")[:24]
        >>> concept = steersman.refine_concept("lab:source", None, pairs)
        >>> concept.steering("dose:0.5", layers=1)
        <Steering: vectors (add × ...) at layer 1; scope answer; for lab:source, ...>
    """
    model, tokenizer = open_named(model, tokenizer)
    batch_size = _checked_options(position, method, batch_size)
    source = pairs if isinstance(pairs, ContrastPairs) else load_pairs(pairs)
    count = len(decoder_layers(model))
    every = layers is None or (isinstance(layers, str) and layers == "all")
    asked = range(count) if every else as_layers(layers, ModelError)  # type: ignore[arg-type]
    check_layers(asked, count)
    chosen = tuple(sorted(set(asked)))
    if not chosen:
        raise PairsError("no layer is named; leave layers out for all of them")
    identity, architecture = weights_id(model), read_architecture(model)  # before the work
    noted, saved = NotedChats(tokenizer), None
    if checkpoint is not None:
        run = {
            "weights": identity,
            "dtype": str(dtype_of(model)).removeprefix("torch."),
            "versions": {name: version(name) for name in ("steersman", "torch", "transformers")},
            "pairs": source.sha256,
            "layers": list(chosen),
            "position": position,
            "batch size": batch_size,
            "truncate": truncate,
        }
        saved = Checkpoint(checkpoint, run, resume)
    with read_pairs(
        model,
        tokenizer,
        source,
        chosen,
        position,
        batch_size=batch_size,
        truncate=truncate,
        progress=progress,
        checkpoint=saved,
    ) as states:
        chat = noted.record
        folds = _Folds(states.clusters)
        found = {
            layer: _refine_layer(states, layer, folds, method)
            for layer in tqdm(chosen, desc="refine", unit="layer", delay=1, disable=not progress)
        }
        try:
            _check_some_direction(source.name, position, states, found, dtype_of(model))
        except PairsError:
            if checkpoint is not None:
                discard(checkpoint)  # whoever went on from it would come here again
            raise
        name, revision = model_name(model)
        return ConceptVector(
            vectors={layer: torch.from_numpy(found[layer].directions.whole).float() for layer in chosen},
            separation={layer: found[layer].separation for layer in chosen},
            fold_vectors=_stacked([found[layer].directions.of_folds for layer in chosen]),
            fold_clusters=torch.from_numpy(folds.clusters),
            cluster_units=torch.from_numpy(folds.unit_of_cluster),
            unit_sums=_stacked([found[layer].directions.unit_sums for layer in chosen]),
            unit_sizes=torch.from_numpy(np.bincount(unit_of(folds.numbers))),
            norms=states.norms,
            architecture=architecture,
            weights_id=identity,
            method=method,
            position=position,
            pairs=len(states),
            clusters=len(folds.clusters),
            skipped=states.skipped,
            alike=states.alike,
            model=name,
            revision=revision,
            chat=chat,
            made_from=({"kind": "pairs", "name": source.name, "sha256": source.sha256},),
            _pairs=source,
        )


def _checked_options(position: str, method: str, batch_size: int) -> int:
    for name, value, known in (("position", position, POSITIONS), ("method", method, METHODS)):
        if value not in known:
            raise PairsError(f"{name}={value!r} is unknown: use {' or '.join(map(repr, known))}")
    return whole_number("batch_size", batch_size, 1, PairsError)


class _Folds:
    """Which fold each pair lies in, and which unit each cluster."""

    def __init__(self, of_pairs: NDArray[np.int64]) -> None:
        self.of_pairs = of_pairs
        self.clusters, first, inverse = np.unique(of_pairs, return_index=True, return_inverse=True)
        appearance = np.argsort(np.argsort(first))  # the number of each cluster, by its first appearance
        self.numbers = appearance[inverse]
        self.folds = fold_of(self.numbers)
        self.unit_of_cluster = unit_of(appearance)


@dataclass(frozen=True)
class _Layer:
    """What was found at one layer; `spread` is the longest difference between a pair's sides."""

    directions: Directions
    separation: Separation | None
    spread: float


def _refine_layer(states: PairStates, layer: int, folds: _Folds, method: Method) -> _Layer:
    def through() -> Any:
        return states.chunks(layer)

    directions = mean_differences(through, folds.numbers)
    if method != "mean_difference":
        centred = method == "pca_diff"
        directions = principal_directions(through, folds.folds, directions, centred=centred)
    found = None
    if len(directions.of_folds):
        scores = held_out_scores(through, folds.folds, directions.of_folds)
        found = separation(scores[:, 0], scores[:, 1], folds.of_pairs, folds.folds)
    spread = max(
        float(np.linalg.norm(chunk[:, 0] - chunk[:, 1], axis=1).max()) for _, chunk in states.chunks(layer)
    )
    return _Layer(directions, found, spread)


def _check_some_direction(
    name: str, position: Position, states: PairStates, found: Mapping[int, _Layer], dtype: torch.dtype
) -> None:
    """Raise PairsError where no layer has a direction beyond what rounding makes."""
    rounding = max(1e-5, 2 * torch.finfo(dtype).eps)
    least = {layer: rounding * states.norms[layer].median for layer in found}
    if any(np.linalg.norm(entry.directions.whole) > least[layer] for layer, entry in found.items()):
        return
    if any(entry.spread > least[layer] for layer, entry in found.items()):
        raise PairsError(
            f"{name}: at every layer the differences of the pairs cancel out, so the concept is zero; "
            "right is one and the same side as positive throughout"
        )
    read = "the last token" if position == "last" else "the target's tokens"
    raise PairsError(
        f"{name}: at every layer both sides of all pairs have the same state at {read} that is read, so the "
        "concept is zero; name targets, or a position, where the sides differ"
    )


def _stacked(of_layers: list[NDArray[np.float64]]) -> torch.Tensor:
    """[n, layers, width] of a [n, width] per layer."""
    return torch.from_numpy(np.stack(of_layers, axis=1)).float()
