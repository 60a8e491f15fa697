"""Does adding a concept make its own side likelier? Asked in the target, of held-out pairs, by one token.

Where both sides go on from one prompt, d = log p(positive side's next token) − log p(negative side's), where
they part. W v of the folds that do not hold a pair is added, as `transplant` would, and d should rise, by
more than with relabelled concepts of the same pairs, added at the same dose. These swap the sides of a random
half of the groups and have each fold's concept refitted, less what imbalance leaves of the mean difference:
scaled to one dose, that would be the concept again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from steersman.concepts.affine_map import AffineMap
from steersman.concepts.concept import ConceptVector
from steersman.concepts.dose import Strength
from steersman.concepts.relabelling import FEWEST_UNITS, balanced, raised
from steersman.edits import ResidualEdit
from steersman.models.encoding import longest_text
from steersman.models.plan_rows import PlanRows
from steersman.models.replacing import replace_method
from steersman.models.scored_text import Text
from steersman.models.weights import is_sharded
from steersman.pairs import ContrastPair, ContrastPairs, shared_length
from steersman.rendering import TruncatedTarget, encode
from steersman.steering import Steering

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PAIRS = 48
"""Most pairs that are asked, one of each group in turn."""
LAYERS = 6
"""Most layers that are asked, unless more are named: those with the largest z."""
DRAWS = 39
"""Relabelled concepts; of models with more than `_SMALL` parameters the fewest that carry a verdict."""
_FEW_DRAWS = 19
_SMALL = 500_000_000
NO_PROMPT = "its pairs' sides do not go on from one prompt"
NO_LOGITS = "the target gives no logits"
PRINCIPAL = "relabelled concepts of a principal direction are that direction again"
BEYOND = f"only the {LAYERS} layers that pass with the largest z are asked"
NOT_PASSED = "the layer does not pass before"


@dataclass(frozen=True)
class Probe:
    """What adding the concept does to d, in nats, the mean over groups with its 95 % interval (t, by group);
    and p, the share of relabellings that raise it as much at any layer.
    """

    change: float
    low: float
    high: float
    p: float

    def to_json(self) -> dict[str, float]:
        """The same as plain values."""
        return {"change": self.change, "low": self.low, "high": self.high, "p": self.p}


@dataclass(frozen=True)
class Asked:
    """Pairs to ask with.

    Attributes:
        texts: Up to where the sides part, [pairs].
        rows: Of each pair's direction, as the gate's; −1 where the only one has seen it.
        units: Of each pair; −1 where it is not held out.
        folds: Of each unit, −1 for those that are not in the concept.
        sizes: Pairs of each unit in the concept.
    """

    texts: Sequence[Text]
    rows: Ints
    units: Ints
    folds: Ints
    sizes: Ints

    def chosen(self) -> Ints:
        """The pairs that are asked: held-out ones, a first of each unit, then a second, up to `PAIRS`."""
        turns: dict[int, int] = {}
        order = []
        for pair, unit in enumerate(self.units.tolist()):
            if unit >= 0:
                turns[unit] = turns.get(unit, -1) + 1
                order.append((turns[unit], pair))
        return np.array([pair for _, pair in sorted(order)[:PAIRS]], np.int64)


def forks(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: ContrastPairs
) -> tuple[list[ContrastPair], list[Text]]:
    """The pairs whose sides go on from one prompt, and d of each as what is to be read."""
    asked: list[ContrastPair] = []
    texts: list[Text] = []
    for pair in pairs:
        text = _fork(tokenizer, pair, longest_text(model), len(texts))
        if text is not None:
            asked.append(pair)
            texts.append(text)
    return asked, texts


def _fork(
    tokenizer: PreTrainedTokenizerBase, pair: ContrastPair, most: int | None, number: int
) -> Text | None:
    """Both sides up to where they part: within the assistant's words; within the targets of texts; of texts
    that are their own targets after at least half of the shorter, since a common first word is no prompt.
    """
    sides = (pair.positive, pair.positive_target), (pair.negative, pair.negative_target)
    if any(not isinstance(content, str) and content[-1]["role"] != "assistant" for content, _ in sides):
        return None
    try:
        one, other = (
            encode(
                tokenizer,
                content,
                target,
                where=pair.where,
                max_length=most,
                part="target" if isinstance(content, str) else "answer",
            )
            for content, target in sides
        )
    except TruncatedTarget:
        return None
    place = shared_length(one.ids, other.ids)
    start = min(one.target[0], other.target[0])
    whole = any(isinstance(content, str) and target is None for content, target in sides)
    least = (min(len(one.ids), len(other.ids)) + 1) // 2 if whole else max(one.target[0], other.target[0])
    if not max(least, 1) <= place < min(len(one.ids), len(other.ids)):
        return None
    prompt = place if whole else max(start, 1)
    scored = (place - 1, one.ids[place], 1.0), (place - 1, other.ids[place], -1.0)
    return Text(number, one.ids[:place], prompt, scored)


def why_not(model: nn.Module, concept: ConceptVector, asked: Asked) -> str:
    """Why the probe cannot be asked; nothing where it can."""
    if concept.method != "mean_difference":
        return PRINCIPAL
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        return NO_LOGITS
    if not len(asked.texts):
        return NO_PROMPT
    if (groups := len(np.unique(asked.units[asked.units >= 0]))) < FEWEST_UNITS:
        return f"of the pairs that go on from one prompt only {groups} groups are held out"
    return ""


def probe(
    bridge: AffineMap,
    concept: ConceptVector,
    opened: tuple[nn.Module, PreTrainedTokenizerBase],
    asked: Asked,
    layers: Sequence[int],
    strength: Strength,
    *,
    draws: int | None = None,
    seed: int = 0,
) -> dict[int, Probe]:
    """What adding the concept does at each of these target layers, all judged together."""
    model, tokenizer = opened
    if draws is None:
        small = sum(parameter.numel() for parameter in model.parameters()) <= _SMALL
        draws = DRAWS if small else _FEW_DRAWS
    chosen = asked.chosen()
    units, places = np.unique(asked.units[chosen], return_inverse=True)
    member = (places == np.arange(len(units))[:, None]) / np.bincount(places)[:, None]
    signs = balanced(len(asked.folds), draws, seed)
    reader: Any = PlanRows(model, tokenizer)  # type: ignore[arg-type]
    changes = np.zeros((len(layers), 1 + draws, len(chosen)))
    with _only(model, [asked.texts[pair] for pair in chosen]) as texts:
        for row in np.unique(asked.rows[chosen]):
            own = np.flatnonzero(asked.rows[chosen] == row)
            read = [texts[pair] for pair in own.tolist()]
            base = reader.scores(read, [None])
            for number, layer in enumerate(layers):
                plans = list(_plans(bridge, concept, layer, int(row), asked, signs, strength))
                changes[number][:, own] = reader.scores(read, plans) - base
    by_unit = changes @ member.T
    p = raised(by_unit, signs[:, units])
    return {
        layer: Probe(*_with_interval(by_unit[number, 0]), float(p[number]))
        for number, layer in enumerate(layers)
    }


@contextmanager
def _only(model: Any, texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
    """While open, the model gives the logits of these texts' tokens alone, numbered anew in the texts given:
    a vocabulary of 262,144 is half of a small model. d needs no others.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or is_sharded(head.weight) or head.weight.is_meta:
        yield texts
        return
    tokens = sorted({token for text in texts for _, token, _ in text.scored})
    chosen = torch.tensor(tokens, device=head.weight.device)
    weight = head.weight.detach()[chosen]
    bias = None if head.bias is None else head.bias.detach()[chosen]

    def few(_: object, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, weight, bias)

    restore = replace_method(head, "forward", few)
    try:
        numbers = {token: number for number, token in enumerate(tokens)}
        yield [
            replace(text, scored=tuple((place, numbers[token], sign) for place, token, sign in text.scored))
            for text in texts
        ]
    finally:
        restore()


def _plans(
    bridge: AffineMap,
    concept: ConceptVector,
    layer: int,
    row: int,
    asked: Asked,
    signs: Floats,
    strength: Strength,
) -> Iterator[Steering | None]:
    """The concept of all folds but one (of all, for the last row), then relabelled ones, at one length."""
    of_map = bridge.layer_map(layer)
    place = concept.layers.index(of_map.source_layer)
    weight = of_map.weight.double()
    whole = concept.vectors[of_map.source_layer]
    mapped = bridge.map_vector(layer, whole)
    length = abs(strength.factor(layer, mapped, bridge.norms[layer])) * float(mapped.double().norm())
    sums = concept.unit_sums[:, place].double().numpy()
    known = len(sums)
    sizes = np.where(asked.folds[:known] != row, asked.sizes[:known], 0)
    relabelled = signs[1:, :known] - (signs[1:, :known] @ sizes / sizes.sum())[:, None]
    drawn = (relabelled * (sizes > 0)) @ sums
    true = concept.fold_vectors[row, place] if row < len(concept.fold_vectors) else whole
    for vector in [true.double(), *torch.from_numpy(drawn)]:
        added = weight @ vector
        size = float(added.norm())
        if not size:  # adds nothing
            yield None
            continue
        yield Steering(
            edits=(ResidualEdit({layer: (added * (length / size)).float()}, 1.0, "answer"),),
            architecture=bridge.architecture,
            weights_id=bridge.weights_id,
            model=bridge.model,
            revision=bridge.revision,
        )


def _with_interval(values: Floats) -> tuple[float, float, float]:
    """The mean, and its 95 % interval by t."""
    mean, count = float(values.mean()), len(values)
    margin = float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count))
    return mean, mean - margin, mean + margin
