"""Strength of vectors: a number, or a dose, which is comparable between models, layers and maps; and what is
taken where nobody says how hard, or where, to steer.

Dose = strength · ‖v‖ / median ‖h‖, over the states h of tokens in scope at the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steersman.concepts.norms import NormHistogram
from steersman.edits import Operation, ResidualEdit, Scope, finite_number
from steersman.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_DOSE = 1e6
"""Of a vector, as a share of a state's median norm: what is beyond is a slip."""
_DOSE = "dose:"
DEFAULT_DOSE = "dose:0.3"
"""Doses of .25 to .5 at about two thirds of the depth steered every real model that was tried
(docs/real_models.md), 1 broke the text of each. What works for one model and concept, `tune` finds.
"""


def typical_layer(layers: Sequence[int], depth: int) -> int:
    """Of these layers the nearest to two thirds of a model's depth; the lower of two."""
    return min(sorted(layers), key=lambda layer: abs(3 * layer - 2 * (depth - 1)))


def defaults_of(layers: object, strength: object) -> dict[str, list[str]]:
    """What a plan's provenance says of the choices that nobody made; nothing where all were."""
    kept = [("layer", layers), ("dose", strength)]
    taken = [name for name, given in kept if given is None]
    return {"defaults": taken} if taken else {}


@dataclass(frozen=True)
class Strength:
    """A strength as it was asked for: a factor of the vector, or a dose."""

    value: float
    is_dose: bool = False

    def __str__(self) -> str:
        return f"{_DOSE}{self.value:g}" if self.is_dose else f"{self.value:g}"

    @classmethod
    def parse(cls, given: object) -> Strength:
        """Read a number, `"1.5"` or `"dose:0.3"`. Raises PlanError for anything else."""
        text = str(given)
        is_dose = text.startswith(_DOSE)
        try:
            value = float(text.removeprefix(_DOSE)) if isinstance(given, str) else finite_number(given)
        except (ValueError, PlanError):
            value = math.nan
        if not math.isfinite(value):
            raise PlanError(
                f"strength {text!r} is not a finite number; right is a number such as 1.5, or a dose such as "
                "dose:0.3 (strength · ‖v‖ as a share of a state's median norm)"
            )
        if is_dose and abs(value) > LARGEST_DOSE:
            raise PlanError(
                f"strength {text!r} is a dose beyond {LARGEST_DOSE:g}; right is one such as dose:0.3"
            )
        return cls(value, is_dose)

    def factor(self, layer: int, vector: Tensor, norms: NormHistogram | None) -> float:
        """What the vector of a layer is multiplied by. Raises PlanError where a dose cannot be told."""
        return self.value / _share(layer, vector, norms) if self.is_dose else self.value


def residual_edits(
    vectors: Mapping[int, Tensor],
    strength: Strength,
    norms: Mapping[int, NormHistogram],
    scope: Scope,
    operation: Operation,
) -> tuple[ResidualEdit, ...]:
    """The edits that add vectors, or project them out, at a strength: one for all layers, or one a layer
    where a dose makes their factors differ.

    Raises:
        PlanError: a vector is zero, the operation or scope unknown, `project` outside 0…1 or by dose.
    """
    if operation == "project" and strength.is_dose:
        raise PlanError(f"project takes a share from 0 to 1, not {strength}: a dose is for add")
    if not strength.is_dose:
        return (ResidualEdit(vectors, strength.value, scope, operation),)
    return tuple(
        ResidualEdit({layer: vector}, strength.factor(layer, vector, norms.get(layer)), scope, operation)
        for layer, vector in sorted(vectors.items())
    )


def doses(edits: tuple[ResidualEdit, ...], norms: Mapping[int, NormHistogram]) -> dict[str, float]:
    """{layer: dose} of edits that add, for provenance; without layers whose norms are not known."""
    return {
        str(layer): edit.strength * _share(layer, vector, norms[layer])
        for edit in edits
        if edit.operation == "add"
        for layer, vector in edit.vectors.items()
        if layer in norms and norms[layer].count
    }


def _share(layer: int, vector: Tensor, norms: NormHistogram | None) -> float:
    """‖v‖ / median ‖h‖."""
    if norms is None or not norms.count:
        raise PlanError(f"layer {layer}: a dose needs the norms of its states, which are not known")
    share = float(vector.double().norm()) / norms.median
    if not share:
        raise PlanError(f"layer {layer}: its vector is zero, so it has no direction")
    return share
