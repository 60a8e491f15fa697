"""Vectors in and out of others' formats: checked as a steering of a model; a plan's vectors, summed by layer,
for formats that can only add.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from steersman.edits import Edit, ExpertEdit, ResidualEdit, Scope
from steersman.errors import ArtifactError, PlanError
from steersman.steering import Steering

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]

MOST_LAYERS = 4096
"""Far more than any model has: a file that claims more is refused before anything is made of it."""


def steering_of(
    vectors: Mapping[int, Array],
    model: nn.Module,
    *,
    scope: Scope,
    path: Path,
    kind: str,
    content: bytes,
    said: Mapping[str, Any] | None = None,
) -> Steering:
    """A steering that adds a file's vectors to the outputs of decoder layers, at strength 1.

    A vector of zeros adds nothing and is left out.

    Args:
        vectors: {layer, from 0: vector [width]}, float32.
        model: The model that the file is for; its weights may be on the meta device.
        scope: Which tokens to steer.
        path: The file, for messages.
        kind: The format's name, for where the plan is from.
        content: The file's bytes, whose sha256 is kept.
        said: What the file says of how the vectors were made, kept beside it.

    Raises:
        ArtifactError: a vector is not one-dimensional or holds NaN or infinity, or all are zero.
        PlanError: a layer that the model lacks, or another width than the model's.
    """
    for layer, vector in vectors.items():
        where = f"{path}: the vector of layer {layer}"
        if vector.ndim != 1 or not vector.size:
            raise ArtifactError(f"{where} has the shape {list(vector.shape)}: right is [width]")
        if not np.isfinite(vector).all():
            raise ArtifactError(f"{where} holds NaN or infinity")
    adding = {layer: vector for layer, vector in vectors.items() if vector.any()}
    if not adding:
        raise ArtifactError(f"{path}: holds no vector other than zero: there is nothing to steer")
    try:
        steering = Steering.from_vectors(model, adding, strength=1.0, scope=scope, operation="add")
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
    source: dict[str, Any] = {"kind": kind, "name": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    if said:
        source["said"] = dict(said)
    return Steering(
        edits=steering.edits,
        architecture=steering.architecture,
        weights_id=steering.weights_id,
        model=steering.model,
        revision=steering.revision,
        provenance={"made": "imported", "from": [source]},
    )


def exact_float32(values: Array, where: str) -> Array:
    """Numbers as float32. Raises `ArtifactError` where that would change one of them."""
    if values.dtype.kind != "f":
        raise ArtifactError(f"{where} holds {values.dtype} and not floating-point numbers")
    with np.errstate(over="ignore"):  # what overflows differs, and is refused
        narrowed = values.astype(np.float32)
    if not np.array_equal(narrowed.astype(values.dtype), values, equal_nan=True):
        raise ArtifactError(
            f"{where} holds {values.dtype}, which float32 cannot say exactly: save it as float32"
        )
    return narrowed


def check_scope(edit: Edit, what: str) -> None:
    """Raise `ArtifactError` where an edit steers some tokens alone, and `what` cannot say that."""
    if edit.scope != "all":
        raise ArtifactError(
            f"{what} has no scopes: the steering's is {edit.scope!r}, not 'all'; if it may steer every "
            'token, write plan.with_scope("all") (export --scope all)'
        )


def edits_by_layer(steering: Steering, what: str) -> dict[int, list[ResidualEdit]]:
    """{layer: its residual edits in order} of a plan for formats that steer every token and know no experts.

    Edits of strength 0 change nothing and are left out.

    Raises:
        ArtifactError: `what` cannot say the plan exactly: it edits experts, or has another scope than `all`,
            or changes nothing.
    """
    layers: dict[int, list[ResidualEdit]] = {}
    for edit in steering.edits:
        if isinstance(edit, ExpertEdit):
            moved = [(layer, expert) for layer, expert, strength in edit.entries() if strength]
            if moved:
                layer, expert = moved[0]
                raise ArtifactError(
                    f"{what} knows no experts: the steering names expert {expert} of layer {layer}"
                )
        elif edit.strength:
            check_scope(edit, what)
            for layer in edit.layers:
                layers.setdefault(layer, []).append(edit)
    if not layers:
        raise ArtifactError(f"the steering changes nothing, and {what} takes no empty plan")
    return dict(sorted(layers.items()))


def sum_of(edits: list[ResidualEdit], layer: int, what: str) -> Tensor:
    """Σ strength · vector of one layer's edits, which all add, as float32 [width].

    Raises:
        ArtifactError: an edit projects, or the sum overflows.
    """
    if any(edit.operation != "add" for edit in edits):
        raise ArtifactError(f"{what} can only add vectors: the steering projects one out of layer {layer}")
    # In float32, product by product, as the plan itself is computed.
    total = edits[0].vectors[layer] * edits[0].strength
    for edit in edits[1:]:
        total = total + edit.vectors[layer] * edit.strength
    if not bool(total.isfinite().all()):
        raise ArtifactError(f"the vectors of layer {layer} add up to more than float32 can say")
    return total
