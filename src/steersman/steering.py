"""What a plan is: edits of a model's routers, for one architecture and its weights; composed, scaled,
saved, applied.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steersman.errors import PlanError
from steersman.limits import Router, broken_limit

if TYPE_CHECKING:
    from torch import nn

    from steersman.models.receipt import Receipt

Scope = Literal["all", "prompt", "generated", "answer"]
OnConflict = Literal["error", "sum"]
ExpertChoice = Mapping[int, Iterable[int]] | Mapping[int, Mapping[int, float]]

ROLES = ("prompt", "last", "generated")
"""What a token is to its row: prompt, the last token of the prompt, or generated and fed back."""

SCOPES: dict[str, frozenset[str]] = {
    "all": frozenset(ROLES),
    "prompt": frozenset({"prompt", "last"}),
    "generated": frozenset({"generated"}),
    "answer": frozenset({"last", "generated"}),
}
"""The roles that each scope holds. `answer` is every position that produces a token of the answer."""


def canonical_json(value: object) -> str:
    """The one text of a JSON value: sorted keys, no spaces, shortest floats, UTF-8; NaN and infinity are
    refused.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: object) -> str:
    """Hex sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Architecture:
    """The structure that a plan is made for: model type, width, and each decoder layer's router (None
    where dense).
    """

    model_type: str
    hidden_size: int
    layers: tuple[Router | None, ...]

    @property
    def routers(self) -> tuple[Router, ...]:
        """The routers, by layer."""
        return tuple(router for router in self.layers if router is not None)

    @property
    def layer_count(self) -> int:
        """Number of decoder layers, dense ones included."""
        return len(self.layers)

    @property
    def id(self) -> str:
        """sha256 over {model_type, width, per layer [rule, E, k, groups]}: no names, dtypes or library
        versions.
        """
        layers = [
            None if router is None else [router.rule, router.experts, router.top_k, router.groups]
            for router in self.layers
        ]
        return sha256_of({"model_type": self.model_type, "width": self.hidden_size, "layers": layers})

    def router(self, layer: int) -> Router:
        """The router of a layer. Raises `PlanError` where there is none that can be steered."""
        if not 0 <= layer < len(self.layers):
            raise PlanError(f"layer {layer} does not exist: the model has layers 0 to {len(self.layers) - 1}")
        router = self.layers[layer]
        if router is None:
            named = ", ".join(str(router.layer) for router in self.routers) or "none"
            raise PlanError(f"layer {layer} has no router (layers with one: {named})")
        if router.reason is not None:
            raise PlanError(f"the router of layer {layer} cannot be steered: {router.reason}")
        return router


@dataclass(frozen=True)
class ExpertEdit:
    """Experts moved toward or out of the routers' top-k.

    `strengths` is {layer: {expert: λ}} with λ in [-1, 1]: 1 puts the expert into every token's top-k, -1
    keeps it out, ±½ moves its score by one standard deviation of the token's scores, 0 leaves it (SteerMoE,
    arXiv 2509.09660).
    """

    strengths: Mapping[int, Mapping[int, float]]
    scope: Scope = "all"
    operation: str = "bound"
    when: str = "always"

    point = "router"

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise PlanError(f"scope {self.scope!r} is unknown: use one of {', '.join(SCOPES)}")
        if self.operation != "bound":
            raise PlanError(f"operation {self.operation!r} is unknown at routers: use 'bound'")
        if self.when != "always":
            raise PlanError(f"when={self.when!r} is not supported: use 'always'")
        ordered: dict[int, dict[int, float]] = {}
        for layer in sorted(self.strengths):
            experts = self.strengths[layer]
            if experts:
                ordered[_whole(layer, "layer")] = {
                    _whole(expert, "expert"): _valid_strength(layer, expert, experts[expert])
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


def _whole(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise PlanError(f"{what} {value!r} is not a whole number") from None


def _valid_strength(layer: int, expert: int, strength: float) -> float:
    value = float(strength)
    if not -1 <= value <= 1:  # also false for NaN
        raise PlanError(
            f"expert {expert} of layer {layer} has strength {value:g}: it must lie between -1 and 1"
        )
    return value + 0.0  # -0.0 becomes 0.0: one number, one fingerprint


@dataclass(frozen=True)
class Steering:
    """A plan: edits in order, for one architecture and the weights they were made for.

    Raises `PlanError` when the plan names what does not exist, contradicts itself or breaks a router's limit.
    """

    edits: tuple[ExpertEdit, ...]
    architecture: Architecture
    weights_id: str
    model: str = ""
    revision: str | None = None
    on_conflict: OnConflict = "error"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(edit for edit in self.edits if edit.strengths))
        check_edits(self.edits, self.architecture, self.on_conflict)

    @classmethod
    def from_experts(
        cls,
        model: nn.Module,
        activate: ExpertChoice | None = None,
        deactivate: ExpertChoice | None = None,
        *,
        scope: Scope = "all",
        strength: float = 1.0,
    ) -> Steering:
        """A plan by hand: {layer: [expert, …]}, or {layer: {expert: size of λ}}, to activate and to
        deactivate.

        Args:
            model: The transformers model the plan is for.
            activate: Experts to put into the top-k.
            deactivate: Experts to keep out of it.
            scope: Which tokens: `all`, `prompt`, `generated` or `answer`.
            strength: 0 to 1, multiplied into every λ.

        Raises:
            PlanError: experts or layers out of range, an expert named on both sides, a limit broken.
        """
        from steersman.models.architecture import read_architecture
        from steersman.models.identity import model_name, weights_id

        if not 0 <= strength <= 1:
            raise PlanError(
                f"strength {strength:g} must lie between 0 and 1; use `deactivate` for the other direction"
            )
        strengths: dict[int, dict[int, float]] = {}
        for chosen, sign in ((activate or {}, 1.0), (deactivate or {}, -1.0)):
            for layer, experts in chosen.items():
                if isinstance(experts, str) or not isinstance(experts, Iterable):
                    raise PlanError(f"layer {layer}: give a list of experts, or {{expert: strength}}")
                sizes = experts if isinstance(experts, Mapping) else dict.fromkeys(experts, 1.0)
                for expert, size in sizes.items():
                    if expert in strengths.setdefault(layer, {}):
                        raise PlanError(f"expert {expert} of layer {layer} is both activated and deactivated")
                    if not 0 <= float(size) <= 1:
                        raise PlanError(
                            f"expert {expert} of layer {layer} is given the size {size:g}: "
                            "it must lie between 0 and 1; `activate` and `deactivate` say which way"
                        )
                    strengths[layer][expert] = sign * float(size) * strength
        name, revision = model_name(model)
        return cls(
            edits=(ExpertEdit(strengths, scope),),
            architecture=read_architecture(model),
            weights_id=weights_id(model),
            model=name,
            revision=revision,
            provenance={"made": "by hand"},
        )

    @property
    def architecture_id(self) -> str:
        """Identity of the architecture that the plan is for."""
        return self.architecture.id

    @property
    def fingerprint(self) -> str:
        """sha256 over the architecture id and the edits, and nothing else."""
        return sha256_of(
            {"architecture": self.architecture_id, "edits": [edit.canonical() for edit in self.edits]}
        )

    @property
    def strengths(self) -> dict[int, dict[int, float]]:
        """{layer: {expert: λ}}: the clipped sum over all edits, whatever their scope."""
        total: dict[int, dict[int, float]] = {}
        for edit in self.edits:
            for layer, expert, strength in edit.entries():
                experts = total.setdefault(layer, {})
                experts[expert] = experts.get(expert, 0.0) + strength
        return {
            layer: {expert: _clipped(experts[expert]) for expert in sorted(experts)}
            for layer, experts in sorted(total.items())
        }

    def __add__(self, other: object) -> Steering:
        return compose(self, other) if isinstance(other, Steering) else NotImplemented

    def __mul__(self, factor: object) -> Steering:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        if not math.isfinite(factor):
            raise PlanError(f"a steering cannot be scaled by {factor}")
        edits = tuple(edit * factor for edit in self.edits)
        return replace(
            self, edits=edits, provenance=_derived("scaled", [self], factor=float(factor)), evidence=()
        )

    __rmul__ = __mul__

    def reversed(self) -> Steering:
        """The plan with every sign changed. Raises `PlanError` where that breaks a limit."""
        edits = tuple(edit * -1 for edit in self.edits)
        return replace(self, edits=edits, provenance=_derived("reversed", [self]), evidence=())

    def apply(
        self,
        model: nn.Module,
        *,
        match: Literal["weights", "architecture"] = "weights",
        prompt_lengths: Sequence[int] | None = None,
        threads: Literal["own", "all"] = "own",
        receipt: Literal["tokens", "changes"] = "tokens",
    ) -> AbstractContextManager[Receipt]:
        """Steer `model` inside a `with` block.

        See `steersman.apply_rows` for the arguments and what is raised.
        """
        from steersman.models.apply import apply

        return apply(
            model, self, match=match, prompt_lengths=prompt_lengths, threads=threads, receipt=receipt
        )

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the plan as a folder (manifest.json, tensors.safetensors), atomically."""
        from steersman.artifacts import save_steering

        save_steering(self, folder, force=force)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Steering:
        """Read a plan from a folder or from the Hub.

        Raises `ArtifactError` for anything damaged, foreign or newer.
        """
        from steersman.artifacts import load_steering

        return load_steering(source, revision=revision)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the plan to the Hugging Face Hub; returns the commit's address.

        Options go to `upload_folder`.
        """
        from steersman.artifacts import push_folder

        return push_folder(self.save_pretrained, repo_id, **options)


def compose(*steerings: Steering, on_conflict: OnConflict = "error") -> Steering:
    """One plan of several, edits in order.

    Raises `PlanError` when they are for different models, pull one expert in opposite directions (unless
    `on_conflict="sum"`), or together break a limit.
    """
    if not steerings:
        raise PlanError("there is nothing to compose: give at least one steering")
    first = steerings[0]
    for other in steerings[1:]:
        if other.architecture_id != first.architecture_id:
            raise PlanError("these steerings are for different architectures and cannot be composed")
        if other.weights_id != first.weights_id:
            raise PlanError("these steerings were made for different weights and cannot be composed")
    either_sums = any(steering.on_conflict == "sum" for steering in steerings)
    return replace(
        first,
        edits=tuple(edit for steering in steerings for edit in steering.edits),
        on_conflict="sum" if either_sums else on_conflict,
        provenance=_derived("composed", steerings),
        evidence=(),
    )


def effective_strengths(edits: Iterable[ExpertEdit], role: str) -> dict[int, dict[int, float]]:
    """{layer: {expert: λ}} for a token of this role: the clipped sum over the edits whose scope holds it."""
    held = [edit for edit in edits if role in SCOPES[edit.scope]]
    layers = {layer for edit in held for layer in edit.layers}
    return {layer: strengths_at(held, layer) for layer in sorted(layers)}


def strengths_at(held: Iterable[ExpertEdit], layer: int) -> dict[int, float]:
    """{expert: λ} in one layer, for a token that all these edits hold: the clipped sum."""
    named = [edit.strengths[layer] for edit in held if layer in edit.strengths]
    if len(named) == 1:
        return dict(named[0])
    total: dict[int, float] = {}
    for experts in named:
        for expert, strength in experts.items():
            total[expert] = total.get(expert, 0.0) + strength
    return {expert: _clipped(strength) for expert, strength in total.items()}


def check_edits(
    edits: Sequence[ExpertEdit], architecture: Architecture, on_conflict: OnConflict = "error"
) -> None:
    """Raise `PlanError` where edits name what does not exist, contradict each other or break a limit
    together.
    """
    for edit in edits:
        for layer, experts in edit.strengths.items():
            router = architecture.router(layer)
            for expert in experts:
                if not 0 <= expert < router.experts:
                    raise PlanError(
                        f"layer {layer} has no expert {expert}: its experts are 0 to {router.experts - 1}"
                    )
    checked: list[list[ExpertEdit]] = []
    for role in ROLES:
        held = [edit for edit in edits if role in SCOPES[edit.scope]]
        if held in checked:
            continue  # what holds for this role has been looked at
        checked.append(held)
        if on_conflict == "error":
            _check_conflicts(held)
        for layer, strengths in effective_strengths(held, role).items():
            broken = broken_limit(architecture.router(layer), strengths)
            if broken is not None:
                raise PlanError(f"layer {layer}: {broken}")


def _check_conflicts(edits: Sequence[ExpertEdit]) -> None:
    if len(edits) < 2:
        return  # an edit names each expert once
    signs: dict[tuple[int, int], bool] = {}
    for edit in edits:
        for layer, expert, strength in edit.entries():
            if strength and signs.setdefault((layer, expert), strength > 0) != (strength > 0):
                raise PlanError(
                    f"layer {layer}, expert {expert}: one edit activates it and another deactivates it; "
                    'compose with on_conflict="sum" to add them up'
                )


def _clipped(strength: float) -> float:
    return max(-1.0, min(1.0, strength))


def _derived(made: str, sources: Sequence[Steering], **facts: object) -> dict[str, Any]:
    return {
        "made": made,
        **facts,
        "from": [{"fingerprint": source.fingerprint, **dict(source.provenance)} for source in sources],
    }
