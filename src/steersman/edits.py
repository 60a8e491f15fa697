"""What an edit is: one change at one kind of site, of routers or of the residual stream."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from steersman.errors import PlanError, SteersmanError, told
from steersman.showing import Shown, count_of, ranges

if TYPE_CHECKING:
    from torch import Tensor

Scope = Literal["all", "prompt", "generated", "answer"]

Operation = Literal["add", "project"]
"""What a residual edit does with its vectors."""

ROLES = ("prompt", "last", "generated")
"""What a token is to its row: prompt, the last token of the prompt, or generated and fed back."""

SCOPES: dict[str, frozenset[str]] = {
    "all": frozenset(ROLES),
    "prompt": frozenset({"prompt", "last"}),
    "generated": frozenset({"generated"}),
    "answer": frozenset({"last", "generated"}),
}
"""The roles that each scope holds. `answer` is every position that produces a token of the answer."""


@dataclass(frozen=True, repr=False)
class ExpertEdit(Shown):
    """Experts moved toward or out of the routers' top-k.

    `strengths` is {layer: {expert: λ}} with λ in [-1, 1]: 1 puts the expert into every token's top-k, -1
    keeps it out, ±½ moves its score by one standard deviation of the token's scores, 0 leaves it (SteerMoE,
    arXiv 2509.09660).

    Example:
        >>> steersman.ExpertEdit({3: {5: 1.0, 7: -0.5}}, scope="answer")
        <ExpertEdit: 2 experts at layers 3, scope answer>
    """

    strengths: Mapping[int, Mapping[int, float]]
    scope: Scope = "all"
    operation: str = "bound"
    when: str = "always"

    point = "router"

    def __post_init__(self) -> None:
        _check_words(self, ("bound",))
        ordered: dict[int, dict[int, float]] = {}
        for layer in sorted(self.strengths):
            experts = self.strengths[layer]
            if experts:
                ordered[whole(layer, "layer")] = {
                    whole(expert, "expert"): _valid_strength(layer, expert, experts[expert])
                    for expert in sorted(experts)
                }
        object.__setattr__(self, "strengths", ordered)

    def __mul__(self, factor: float) -> ExpertEdit:
        return replace(
            self,
            strengths={
                layer: {expert: strength * float(factor) for expert, strength in experts.items()}
                for layer, experts in self.strengths.items()
            },
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that the edit names."""
        return tuple(self.strengths)

    def entries(self) -> list[tuple[int, int, float]]:
        """(layer, expert, λ), by layer and expert."""
        return [
            (layer, expert, strength)
            for layer, experts in self.strengths.items()
            for expert, strength in experts.items()
        ]

    def canonical(self) -> dict[str, object]:
        """What of the edit enters the fingerprint."""
        return {
            "point": self.point,
            "operation": self.operation,
            "scope": self.scope,
            "when": self.when,
            "layers": list(self.strengths),
            "strengths": [list(entry) for entry in self.entries()],
        }

    def in_words(self) -> str:
        """How many experts it moves, where."""
        number = len(self.entries())
        return f"{count_of(number, 'expert')} at layers {ranges(self.layers)}, scope {self.scope}"


class Vectors(Mapping[int, "Tensor"]):
    """{layer: vector} of an edit, to be read: every look gives a copy, so that what is done to one in place
    leaves the plan, and the fingerprint it is known by, as they were.
    """

    def __init__(self, own: Mapping[int, Tensor]) -> None:
        self._own = dict(own)

    def __getitem__(self, layer: int) -> Tensor:
        return self._own[layer].clone()

    def __iter__(self) -> Iterator[int]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def __repr__(self) -> str:
        return f"<Vectors: layers {ranges(tuple(self._own))}>"


@dataclass(frozen=True, eq=False, repr=False)
class ResidualEdit(Shown):
    """Vectors in the residual stream, at the outputs of decoder layers.

    `vectors` is {layer: v [width]}, layers from 0. `add`: h ← h + strength · v. `project`: h ← h − strength ·
    (h·v̂) v̂ with 0 ≤ strength ≤ 1, which at 1 takes the direction out (ablation, arXiv 2406.11717). Computed
    in float32 and returned in the model's dtype. Strength 0 leaves the model as it is.

    Vectors may be torch tensors, numpy arrays or lists; they are kept as float32 tensors on the CPU, and
    copies of them given out (`Vectors`). Raises `PlanError` where one is zero, not finite or not
    one-dimensional.

    Example:
        >>> steersman.ResidualEdit({2: [0.1, 0.2]}, strength=0.5, operation="project")
        <ResidualEdit: project at layers 2, strength 0.5, scope answer>
    """

    vectors: Mapping[int, Tensor]
    strength: float = 1.0
    scope: Scope = "answer"
    operation: Operation = "add"
    when: str = "always"

    point = "block_output"

    def __post_init__(self) -> None:
        _check_words(self, ("add", "project"))
        strength = finite_number(self.strength)
        if self.operation == "project" and not 0 <= strength <= 1:
            why = ", and a direction that is taken out has no opposite: reverse a plan that adds the vector"
            raise PlanError(
                f"project has strength {strength:g}: it must lie between 0 and 1{why if strength < 0 else ''}"
            )
        if not isinstance(self.vectors, Mapping):
            raise PlanError(f"vectors are a {type(self.vectors).__name__}: right is {{layer: direction}}")
        named = sorted((whole(layer, "layer"), vector) for layer, vector in self.vectors.items())
        ordered = {layer: _vector(layer, vector, strength) for layer, vector in named}
        if len(ordered) != len(named):
            raise PlanError("a layer is named twice")
        object.__setattr__(self, "vectors", Vectors(ordered))
        object.__setattr__(self, "strength", strength)

    def __mul__(self, factor: float) -> ResidualEdit:
        return replace(self, strength=self.strength * float(factor))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ResidualEdit) and self.canonical() == other.canonical()

    def __hash__(self) -> int:
        return hash((self.strength, self.scope, self.operation, self.layers))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that the edit names."""
        return tuple(self.vectors)

    def canonical(self) -> dict[str, object]:
        """What of the edit enters the fingerprint; of each vector the sha256 of its numbers (float32, little
        endian).
        """
        digests = {
            str(layer): hashlib.sha256(vector.numpy().astype("<f4").tobytes()).hexdigest()
            for layer, vector in self.vectors.items()
        }
        return {
            "point": self.point,
            "operation": self.operation,
            "scope": self.scope,
            "when": self.when,
            "layers": list(self.layers),
            "strength": self.strength,
            "vectors": digests,
        }

    def in_words(self) -> str:
        """What it does, where, how strongly."""
        where = f"layers {ranges(self.layers)}"
        return f"{self.operation} at {where}, strength {self.strength:g}, scope {self.scope}"


Edit = ExpertEdit | ResidualEdit


def _check_words(edit: Edit, operations: tuple[str, ...]) -> None:
    where = f"{edit.point.replace('_', ' ')}s"
    if not isinstance(edit.scope, str) or edit.scope not in SCOPES:
        raise PlanError(f"scope {edit.scope!r} is unknown: use one of {', '.join(SCOPES)}")
    if edit.operation not in operations:
        right = " or ".join(map(repr, operations))
        raise PlanError(f"operation {edit.operation!r} is unknown at {where}: use {right}")
    if edit.when != "always":
        raise PlanError(f"when={edit.when!r} is not supported: use 'always'")


def finite_number(given: object, what: str = "strength") -> float:
    """A finite number as a float, also that of a tensor or an array without dimensions. Raises `PlanError`
    for anything else: texts, True and False are no numbers.
    """
    plain: Any = given
    value = plain.item() if getattr(given, "ndim", None) == 0 and hasattr(given, "item") else given
    if isinstance(value, bool) or not isinstance(value, Real):
        raise PlanError(f"{what} is a number, not {told(given)}")
    try:
        found = float(value)
    except OverflowError:  # an integer that no float holds
        found = math.inf
    if not math.isfinite(found):
        raise PlanError(f"{what} {found} is not a finite number")
    return found + 0.0  # -0.0 becomes 0.0: one number, one fingerprint


def _vector(layer: int, given: Any, strength: float) -> Tensor:
    """A layer's vector as a float32 tensor of its own, checked."""
    import torch  # only plans that hold vectors wait for it

    try:
        read = torch.as_tensor(given).detach()
        if read.is_complex():
            raise TypeError("its numbers are complex")
        vector = read.to("cpu", torch.float32, copy=True).contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"layer {layer}: its vector cannot be read ({_first_line(error)})") from None
    if vector.dim() != 1 or not vector.numel():
        raise PlanError(f"layer {layer}: its vector has the shape {list(vector.shape)}: right is [width]")
    if not bool(torch.isfinite(vector).all()):
        raise PlanError(f"layer {layer}: its vector holds NaN or infinity")
    if not bool(vector.any()):
        raise PlanError(f"layer {layer}: its vector is zero, so it has no direction")
    if not bool(torch.isfinite(vector * strength).all()):
        raise PlanError(f"layer {layer}: strength {strength:g} times its vector overflows")
    return vector


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def whole(value: Any, what: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise PlanError(f"{what} {value!r} is not a whole number") from None


def as_layers(given: int | Iterable[int], error: type[SteersmanError]) -> tuple[int, ...]:
    """A layer, or several, as plain ints, NumPy's and torch's too. Raises `error` for what is neither."""
    one = isinstance(given, int) or getattr(given, "ndim", None) == 0
    several: Iterable[Any] = [given] if one else given  # type: ignore[assignment]
    if isinstance(several, str) or not isinstance(several, Iterable):
        raise error(f"layers are {told(given)}: give layer numbers")
    return tuple(_layer(layer, error) for layer in several)


def _layer(given: Any, error: type[SteersmanError]) -> int:
    value = given.item() if getattr(given, "ndim", None) == 0 else given
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise error(f"layers hold {given!r}, which is no layer's number")
    return operator.index(value)


def _valid_strength(layer: int, expert: int, strength: float) -> float:
    value = finite_number(strength, f"expert {expert} of layer {layer}: strength")
    if not -1 <= value <= 1:
        raise PlanError(
            f"expert {expert} of layer {layer} has strength {value:g}: it must lie between -1 and 1"
        )
    return value


def expert_edits(edits: Iterable[Edit]) -> list[ExpertEdit]:
    """Those of a plan's edits that are made at routers, in order."""
    return [edit for edit in edits if isinstance(edit, ExpertEdit)]


def residual_edits(edits: Iterable[Edit]) -> list[ResidualEdit]:
    """Those of a plan's edits that are made in the residual stream, in order."""
    return [edit for edit in edits if isinstance(edit, ResidualEdit)]


def effective_strengths(edits: Iterable[Edit], role: str) -> dict[int, dict[int, float]]:
    """{layer: {expert: λ}} for a token of this role: the clipped sum over the edits whose scope holds it."""
    held = [edit for edit in expert_edits(edits) if role in SCOPES[edit.scope]]
    layers = {layer for edit in held for layer in edit.layers}
    return {layer: strengths_at(held, layer) for layer in sorted(layers)}


def strengths_at(held: Iterable[Edit], layer: int) -> dict[int, float]:
    """{expert: λ} in one layer, for a token that all these edits hold: the clipped sum."""
    named = [edit.strengths[layer] for edit in expert_edits(held) if layer in edit.strengths]
    if len(named) == 1:
        return dict(named[0])
    total: dict[int, float] = {}
    for experts in named:
        for expert, strength in experts.items():
            total[expert] = total.get(expert, 0.0) + strength
    return {expert: clipped(strength) for expert, strength in total.items()}


def clipped(strength: float) -> float:
    """A sum of strengths, held between -1 and 1."""
    return max(-1.0, min(1.0, strength))
