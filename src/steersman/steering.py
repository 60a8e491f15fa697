"""What a plan is: edits of a model's routers and of its residual stream, for one architecture and its
weights; composed, scaled, saved, applied.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steersman.edits import (
    ROLES,
    SCOPES,
    Edit,
    ExpertEdit,
    Operation,
    ResidualEdit,
    Scope,
    clipped,
    effective_strengths,
    expert_edits,
    finite_number,
    residual_edits,
)
from steersman.errors import PlanError, check_kind, each_of, told
from steersman.limits import Router, broken_limit
from steersman.showing import Shown, Table, count_of, cut, ranges

if TYPE_CHECKING:
    from torch import nn

    from steersman.models.receipt import Receipt

OnConflict = Literal["error", "sum"]
ExpertChoice = Mapping[int, Iterable[int]] | Mapping[int, Mapping[int, float]]


def canonical_json(value: object) -> str:
    """The one text of a JSON value: sorted keys, no spaces, shortest floats, UTF-8; NaN and infinity are
    refused.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: object) -> str:
    """Hex sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True, repr=False)
class Architecture(Shown):
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

    def check_layer(self, layer: int) -> None:
        """Raise `PlanError` where there is no such decoder layer."""
        if not 0 <= layer < len(self.layers):
            raise PlanError(f"layer {layer} does not exist: the model has layers 0 to {len(self.layers) - 1}")

    def router(self, layer: int) -> Router:
        """The router of a layer. Raises `PlanError` where there is none that can be steered."""
        self.check_layer(layer)
        router = self.layers[layer]
        if router is None:
            named = ", ".join(str(router.layer) for router in self.routers) or "none"
            raise PlanError(f"layer {layer} has no router (layers with one: {named})")
        if router.reason is not None:
            raise PlanError(f"the router of layer {layer} cannot be steered: {router.reason}")
        return router

    def in_words(self) -> str:
        """ "olmoe, width 2048, 16 layers, 16 routers: 64 experts, top-8, softmax-topk"."""
        facts = sorted(
            {
                f"{count_of(router.experts, 'expert')}, top-{router.top_k}, {router.rule}"
                for router in self.routers
            }
        )
        routers = f"{count_of(len(self.routers), 'router')}{': ' + ' | '.join(facts) if facts else ''}"
        return (
            f"{self.model_type} (width {self.hidden_size}, {count_of(self.layer_count, 'layer')}, {routers})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Steering(Shown):
    """A plan: edits in order, for one architecture and the weights they were made for.

    Raises `PlanError` when the plan names what does not exist, contradicts itself or breaks a router's limit.
    """

    edits: tuple[Edit, ...]
    architecture: Architecture
    weights_id: str
    model: str = ""
    revision: str | None = None
    on_conflict: OnConflict = "error"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    evidence: tuple[str | Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(edit for edit in self.edits if edit.layers))
        check_edits(self.edits, self.architecture, self.on_conflict)

    @classmethod
    def from_experts(
        cls,
        model: nn.Module | str | Path,
        activate: ExpertChoice | None = None,
        deactivate: ExpertChoice | None = None,
        *,
        scope: Scope = "all",
        strength: float = 1.0,
    ) -> Steering:
        """A plan by hand: {layer: [expert, …]}, or {layer: {expert: size of λ}}, to activate and to
        deactivate.

        Args:
            model: The transformers model the plan is for, or the name of one (`load_model`).
            activate: Experts to put into the top-k.
            deactivate: Experts to keep out of it.
            scope: Which tokens: `all`, `prompt`, `generated` or `answer`.
            strength: 0 to 1, multiplied into every λ.

        Raises:
            PlanError: experts or layers out of range, an expert named on both sides, a limit broken.

        Example:
            >>> plan = steersman.Steering.from_experts("lab:moe", {3: [5]}, {1: [1, 2]})
            >>> plan.strengths
            {1: {1: -1.0, 2: -1.0}, 3: {5: 1.0}}
        """
        from steersman.models.architecture import read_architecture
        from steersman.models.identity import model_name, weights_id
        from steersman.models.loading import structure_of

        model = structure_of(model)
        if not 0 <= finite_number(strength) <= 1:
            raise PlanError(
                f"strength {strength:g} must lie between 0 and 1; use `deactivate` for the other direction"
            )
        strengths: dict[int, dict[int, float]] = {}
        for chosen, sign in ((activate or {}, 1.0), (deactivate or {}, -1.0)):
            if not isinstance(chosen, Mapping):
                raise PlanError(f"experts are {told(chosen)}: give {{layer: [expert, …]}}")
            for layer, experts in chosen.items():
                if isinstance(experts, str) or not isinstance(experts, Iterable):
                    raise PlanError(f"layer {layer}: give a list of experts, or {{expert: strength}}")
                sizes = experts if isinstance(experts, Mapping) else dict.fromkeys(experts, 1.0)
                for expert, size in sizes.items():
                    if expert in strengths.setdefault(layer, {}):
                        raise PlanError(f"expert {expert} of layer {layer} is both activated and deactivated")
                    if not 0 <= finite_number(size, f"expert {expert} of layer {layer}: its size") <= 1:
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

    @classmethod
    def from_vectors(
        cls,
        model: nn.Module | str | Path,
        vectors: Mapping[int, Any],
        *,
        strength: float = 1.0,
        scope: Scope = "answer",
        operation: Operation = "add",
    ) -> Steering:
        """A plan by hand of vectors in the residual stream: {layer: direction [width]}.

        Args:
            model: The transformers model the plan is for, or the name of one (`load_model`).
            vectors: Of decoder layers (from 0), whose output they change; tensors, arrays or lists.
            strength: Multiplied into the vectors; for `project` between 0 and 1.
            scope: Which tokens: `all`, `prompt`, `generated` or `answer`.
            operation: `add` the vectors, or `project` them out (see `ResidualEdit`).

        Raises:
            PlanError: a layer that does not exist, a vector of another width, zero or not finite, a model
                whose layers do not give one residual stream.

        Example:
            >>> plan = steersman.Steering.from_vectors("lab:moe", {2: [0.1] * 96}, scope="all")
            >>> plan.edits
            (<ResidualEdit: add at layers 2, strength 1, scope all>,)
        """
        from steersman.models.architecture import read_architecture
        from steersman.models.identity import model_name, weights_id
        from steersman.models.loading import structure_of
        from steersman.models.streams import check_stream

        edit = ResidualEdit(vectors, strength, scope, operation)
        if not edit.layers:
            raise PlanError("there are no vectors: give {layer: direction}")
        model = structure_of(model)
        check_stream(model, edit.layers)
        architecture = read_architecture(model)
        check_edits([edit], architecture)  # before the weights are read, which takes longer
        name, revision = model_name(model)
        return cls(
            edits=(edit,),
            architecture=architecture,
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
        for edit in expert_edits(self.edits):
            for layer, expert, strength in edit.entries():
                experts = total.setdefault(layer, {})
                experts[expert] = experts.get(expert, 0.0) + strength
        return {
            layer: {expert: clipped(experts[expert]) for expert in sorted(experts)}
            for layer, experts in sorted(total.items())
        }

    def __add__(self, other: Steering) -> Steering:
        return compose(self, other)

    def __radd__(self, other: Any) -> Steering:
        return self if type(other) is int and other == 0 else compose(other, self)  # what `sum` begins with

    def __sub__(self, other: Steering) -> Steering:
        check_kind(other, Steering, PlanError)
        return compose(self, -other)

    def __neg__(self) -> Steering:
        return self.reversed()

    def __eq__(self, other: object) -> bool:
        """Whether both do the same to the same weights: where a plan comes from does not count."""
        return isinstance(other, Steering) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str, str]:
        return self.fingerprint, self.weights_id, self.on_conflict

    __array_ufunc__ = None
    """numpy's numbers leave their products with a plan to the plan."""

    def __truediv__(self, factor: object) -> Steering:
        divisor = finite_number(factor, "a steering's divisor")
        if not divisor:
            raise PlanError("a steering cannot be divided by 0")
        return self * (1 / divisor)

    def __mul__(self, factor: object) -> Steering:
        scale = finite_number(factor, "a steering's factor")
        edits = tuple(edit * scale for edit in self.edits)
        return replace(self, edits=edits, provenance=_derived("scaled", [self], factor=scale), evidence=())

    __rmul__ = __mul__

    def reversed(self) -> Steering:
        """The plan with every sign changed. Raises `PlanError` where that breaks a limit."""
        edits = tuple(edit * -1 for edit in self.edits)
        return replace(self, edits=edits, provenance=_derived("reversed", [self]), evidence=())

    def with_scope(self, scope: Scope) -> Steering:
        """The plan with all its edits in another scope: `all`, `prompt`, `generated` or `answer`.

        Raises `PlanError` where edits of different scopes contradict each other in one, or break a limit.
        """
        edits = tuple(replace(edit, scope=scope) for edit in self.edits)
        return replace(self, edits=edits, provenance=_derived("rescoped", [self], scope=scope), evidence=())

    def apply(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        match: Literal["weights", "architecture"] = "weights",
        prompt_lengths: Sequence[int] | None = None,
        threads: Literal["own", "all"] = "own",
        receipt: Literal["tokens", "changes"] = "tokens",
    ) -> AbstractContextManager[Receipt]:
        """Steer `model` inside a `with` block, with `strength` times the plan.

        See `steersman.apply_rows` for the arguments and what is raised.

        Example:
            >>> model, tokenizer = steersman.load_model("lab:moe")
            >>> plan = steersman.Steering.from_experts(model, {3: [5]})
            >>> with plan.apply(model, strength=0.5) as receipt:
            ...     _ = model(**tokenizer("please give me the badge", return_tensors="pt"))
            >>> receipt.tokens
            {'router:3': 5}
        """
        from steersman.models.apply import apply

        return apply(
            model,
            self,
            strength=strength,
            match=match,
            prompt_lengths=prompt_lengths,
            threads=threads,
            receipt=receipt,
        )

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the plan as a folder (manifest.json, tensors.safetensors), atomically."""
        from steersman.artifacts import save_steering

        save_steering(self, folder, force=force)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Steering:
        """Read a plan from a folder or from the Hub.

        Raises `ArtifactError` for anything damaged, foreign or newer.

        Example:
            >>> plan = steersman.Steering.from_experts("lab:moe", {3: [5]})
            >>> plan.save_pretrained("plan")
            >>> steersman.Steering.from_pretrained("plan") == plan
            True
        """
        from steersman.artifacts import load_steering

        return load_steering(source, revision=revision)

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **options: Any) -> str:
        """Upload the plan to the Hugging Face Hub with a model card; returns the commit's address.

        `license` is asked for, as the Hub names it ("apache-2.0"); options are `base_model`, `private`,
        `revision`, `token`, and those of `HfApi.upload_folder`. Raises `ArtifactError` where it fails.

        Example:
            >>> plan = steersman.Steering.from_experts("lab:moe", {3: [5]})
            >>> plan.push_to_hub("you/safer", license="apache-2.0")
            'http...you/safer/commit/...'
        """
        from steersman.artifacts import push_folder

        return push_folder(self.save_pretrained, repo_id, license=license, **options)

    def in_words(self) -> str:
        """What the plan does, how strongly where that is not 1, for which model."""
        of = {"activated": 1, "deactivated": -1}
        given = [strength for experts in self.strengths.values() for strength in experts.values()]
        words = [
            f"{count_of(len(sizes), 'expert')} {way}{_times(sizes)}"
            for way, sign in of.items()
            if (sizes := [strength * sign for strength in given if strength * sign > 0])
        ]
        vectors = residual_edits(self.edits)
        if layers := sorted({layer for edit in vectors for layer in edit.layers}):
            strengths: dict[str, list[float]] = {}
            for edit in vectors:
                strengths.setdefault(edit.operation, []).append(edit.strength)
            done = "/".join(f"{name}{_times(of_it)}" for name, of_it in sorted(strengths.items()))
            words.append(f"vectors ({done}) at layer{'s' * (len(layers) > 1)} {ranges(layers)}")
        scopes = "/".join(sorted({edit.scope for edit in self.edits}))
        what = ", ".join(words) or "changes nothing"
        where = f"{self.model or 'a model'}, {self.architecture.in_words()}"
        return (
            f"{what}{f'; scope {scopes}' if scopes else ''}; for {cut(where, 120)}; {self.fingerprint[:8]}…"
        )

    def as_tables(self) -> list[Table]:
        """Experts and vectors, as `steersman show` prints them."""
        experts = [
            (layer, expert, "in" if strength > 0 else "out", f"{strength:+g}", edit.scope)
            for edit in expert_edits(self.edits)
            for layer, expert, strength in edit.entries()
            if strength
        ]
        vectors = [
            (layer, edit.operation, f"{edit.strength:+g}", f"{float(vector.norm()):.4g}", edit.scope)
            for edit in residual_edits(self.edits)
            for layer, vector in edit.vectors.items()
        ]
        found: list[Table] = []
        if experts:
            found.append((("layer", "expert", "top-k", "strength", "tokens"), experts))
        if vectors:
            header = ("layer", "residual stream", "strength", "norm of the vector", "tokens")
            found.append((header, vectors))
        return found


def compose(*steerings: Steering, on_conflict: OnConflict = "error") -> Steering:
    """One plan of several, edits in order.

    Raises `PlanError` when they are for different models, pull one expert in opposite directions (unless
    `on_conflict="sum"`), or together break a limit.

    Example:
        >>> experts = steersman.Steering.from_experts("lab:moe", {3: [5]})
        >>> vectors = steersman.Steering.from_vectors("lab:moe", {2: [0.1] * 96})
        >>> steersman.compose(experts, vectors) == experts + vectors
        True
    """
    from steersman.models.same_weights import same_weights, with_stronger_id

    if not each_of(steerings, Steering, PlanError):
        raise PlanError("there is nothing to compose: give at least one steering")
    first = steerings[0]
    for other in steerings[1:]:
        if other.architecture_id != first.architecture_id:
            raise PlanError(
                "these steerings are for different architectures and cannot be composed: "
                f"{first.architecture.in_words()}, and {other.architecture.in_words()}"
            )
        if not same_weights(first, other):
            raise PlanError("these steerings were made for different weights and cannot be composed")
        first = with_stronger_id(first, other)
    either_sums = any(steering.on_conflict == "sum" for steering in steerings)
    return replace(
        first,
        edits=tuple(edit for steering in steerings for edit in steering.edits),
        on_conflict="sum" if either_sums else on_conflict,
        provenance=_derived("composed", steerings),
        evidence=(),
    )


def check_edits(edits: Sequence[Edit], architecture: Architecture, on_conflict: OnConflict = "error") -> None:
    """Raise `PlanError` where edits name what does not exist, contradict each other or break a limit
    together.
    """
    for edit in edits:
        if isinstance(edit, ExpertEdit):
            _check_experts(edit, architecture)
        else:
            _check_vectors(edit, architecture)
    checked: list[list[ExpertEdit]] = []
    for role in ROLES:
        held = [edit for edit in expert_edits(edits) if role in SCOPES[edit.scope]]
        if held in checked:
            continue  # what holds for this role has been looked at
        checked.append(held)
        if on_conflict == "error":
            _check_conflicts(held)
        for layer, strengths in effective_strengths(held, role).items():
            broken = broken_limit(architecture.router(layer), strengths)
            if broken is not None:
                raise PlanError(f"layer {layer}: {broken}")


def _check_experts(edit: ExpertEdit, architecture: Architecture) -> None:
    for layer, experts in edit.strengths.items():
        router = architecture.router(layer)
        for expert in experts:
            if not 0 <= expert < router.experts:
                raise PlanError(
                    f"layer {layer} has no expert {expert}: its experts are 0 to {router.experts - 1}"
                )


def _check_vectors(edit: ResidualEdit, architecture: Architecture) -> None:
    for layer, vector in edit.vectors.items():
        architecture.check_layer(layer)
        if len(vector) != architecture.hidden_size:
            raise PlanError(
                f"layer {layer}: its vector has {count_of(len(vector), 'number')}, but the model's width is "
                f"{architecture.hidden_size}"
            )


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


def sources_of(provenance: Mapping[str, Any], strength: float = 1.0) -> list[dict[str, Any]]:
    """The plans that a plan was composed, scaled, reversed or rescoped of, as they were saved: [{"name",
    "fingerprint", "made", "strength"}], `strength` being what each was multiplied by, `name` None where it is
    not known. Empty for another plan.
    """
    made, sources = provenance.get("made"), provenance.get("from")
    factor = provenance.get("factor", -1 if made == "reversed" else 1)
    derived = made in ("composed", "scaled", "reversed", "rescoped") and isinstance(factor, int | float)
    if not derived or not isinstance(sources, list | tuple):  # another tool's words may be of any form
        return []
    found: list[dict[str, Any]] = []
    for source in (one for one in sources if isinstance(one, Mapping) and "fingerprint" in one):
        below = [] if "name" in source else sources_of(source, strength * factor)
        told = {key: source.get(key) for key in ("name", "fingerprint", "made")}
        found += below or [{**told, "strength": strength * factor}]
    return found


def _times(strengths: Iterable[float]) -> str:
    """By what is multiplied: " × 0.5", " × -1 to 2"; nothing where that is 1."""
    known = sorted(set(strengths))
    if known == [1]:
        return ""
    return f" × {known[0]:.3g}" + (f" to {known[-1]:.3g}" if known[1:] else "")


def source_in_words(source: Mapping[str, Any]) -> str:
    """One of them: "safer (6fcebb36b501f2a3…) × 0.5"."""
    scaled = "" if source["strength"] == 1 else f" × {source['strength']:g}"
    return f"{source['name'] or 'a plan'} ({str(source['fingerprint'])[:16]}…){scaled}"


def _derived(made: str, sources: Sequence[Steering], **facts: object) -> dict[str, Any]:
    return {
        "made": made,
        **facts,
        "from": [{"fingerprint": source.fingerprint, **dict(source.provenance)} for source in sources],
    }
