"""What an evaluation's record tells of a model, a plan and an arm, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steersman.edits import ResidualEdit
from steersman.evaluation.arms import Arm
from steersman.evaluation.planning import Arms
from steersman.models.architecture import read_architecture
from steersman.models.identity import model_name as name_of_model
from steersman.models.identity import weights_id
from steersman.steering import Steering

if TYPE_CHECKING:
    from torch import nn


def told_model(model: nn.Module, name: str | None) -> dict[str, Any]:
    """A model: its name, identities and size."""
    own, revision = name_of_model(model)
    architecture = read_architecture(model)
    return {
        "name": name or own,
        "revision": revision,
        "weights_id": weights_id(model),
        "architecture_id": architecture.id,
        "model_type": architecture.model_type,
        "layers": architecture.layer_count,
        "hidden_size": architecture.hidden_size,
    }


def told_steering(name: str, plan: Steering, path: str | None) -> dict[str, Any]:
    """A plan: what it changes where, and how it was made."""
    return {
        "name": name,
        "path": path,
        "fingerprint": plan.fingerprint,
        "scope": sorted({edit.scope for edit in plan.edits}),
        "strengths": {
            str(layer): {str(expert): value for expert, value in experts.items()}
            for layer, experts in plan.strengths.items()
        },
        "vectors": [
            {
                "layer": layer,
                "norm": float(vector.norm()),
                "strength": edit.strength,
                "operation": edit.operation,
            }
            for edit in plan.edits
            if isinstance(edit, ResidualEdit)
            for layer, vector in edit.vectors.items()
        ],
        "provenance": dict(plan.provenance),
        "model": {"name": plan.model, "weights_id": plan.weights_id},
    }


def told_arm(arm: Arm, arms: Arms, paths: Mapping[str, str]) -> dict[str, Any]:
    """An arm: what it is made of; `paths` names where other models are from."""
    template = next((cell.attack for cell in arms.cells if cell.arm == arm.name), None)
    return {
        "name": arm.name,
        "kind": arm.kind,
        "steering": arms.steering_of.get(arm.name),
        "strength": arms.strength_of.get(arm.name),
        "fingerprint": None if arm.steering is None else arm.steering.fingerprint,
        "system": arm.system,
        "template": None if arm.template is None else {"name": template, "text": arm.template},
        "model": None if arm.other is None else paths.get(arm.other, arm.other),
    }
