"""A plan as rows of a bank: for each role of a token, what it does at the routers and to the states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from steersman.concepts.residual import Add, Step, in_slots, steps_of
from steersman.edits import ROLES, SCOPES, Edit, effective_strengths, residual_edits
from steersman.steering import Steering


@dataclass(frozen=True)
class PlanRow:
    """What holds for the tokens of one role.

    Attributes:
        strengths: {layer: {expert: λ}}, without zeros.
        steps: {layer: what is done to its output, in order}.
    """

    strengths: Mapping[int, Mapping[int, float]]
    steps: Mapping[int, Sequence[Step]]

    @property
    def empty(self) -> bool:
        """Whether nothing is edited."""
        return not self.strengths and not self.steps


def rows_of(steering: Steering) -> tuple[PlanRow, ...]:
    """The rows of a plan, one for each role."""
    steps: dict[tuple[int, ...], dict[int, list[Step]]] = {}
    return tuple(_row(steering.edits, role, steps) for role in ROLES)


def _row(edits: Sequence[Edit], role: str, known: dict[tuple[int, ...], dict[int, list[Step]]]) -> PlanRow:
    held = residual_edits(edit for edit in edits if role in SCOPES[edit.scope])
    key = tuple(map(id, held))
    if key not in known:  # roles with the same edits share their vectors
        layers = sorted({layer for edit in held for layer in edit.layers})
        found = {layer: steps_of(held, layer) for layer in layers}
        known[key] = {layer: steps for layer, steps in found.items() if steps}
    strengths = {
        layer: {expert: strength for expert, strength in experts.items() if strength}
        for layer, experts in effective_strengths(edits, role).items()
    }
    return PlanRow({layer: experts for layer, experts in strengths.items() if experts}, known[key])


def sites_of(steering: Steering) -> tuple[frozenset[int], frozenset[int]]:
    """(layers whose routers a plan edits, layers whose outputs it edits)."""
    rows = rows_of(steering)
    return (
        frozenset(layer for row in rows for layer in row.strengths),
        frozenset(layer for row in rows for layer in row.steps),
    )


def why_beyond(steering: Steering, dtype: torch.dtype) -> str | None:
    """Why an engine's numbers do not hold a plan's vectors at their strengths; None: they do."""
    largest = torch.finfo(dtype).max
    for row in rows_of(steering):
        for layer, steps in row.steps.items():
            added = [float(step.vector.abs().max()) for step in steps if isinstance(step, Add)]
            size = max(added, default=0.0)
            if size > largest:
                return (
                    f"layer {layer}: strength times vector reaches {size:.3g}, and the engine's "
                    f"{str(dtype).removeprefix('torch.')} ends at {largest:.5g}: serve the model in bfloat16"
                )
    return None


def most_steps(steering: Steering) -> int:
    """Slots that a plan needs at one layer's output; adding is done at even ones, projecting at odd ones."""
    rows = rows_of(steering)
    return max(
        (slot + 1 for row in rows for steps in row.steps.values() for slot in in_slots(steps)), default=0
    )
