"""The vectors of lm-evaluation-harness's `steered` model (lm_eval/models/hf_steered.py): written, not read.

A `.pt` file of `torch.save`: {hook point: {"action": "add" or "clamp", "steering_vector": tensor [width],
"steering_coefficient": number, "bias": tensor or None, "head_index": number or None}}. A hook point is a
module's name below `model.base_model`, so a decoder layer is `layers.12`, `h.12` and the like, which only the
model can say. `add` adds coefficient · vector to the module's output at every position; `clamp` sets the
output's component along the vector to the coefficient, so that clamping to 0 is our `project` at strength 1.

The strength is multiplied into the vector, in float32, and the coefficient is 1: the harness converts vector
and coefficient to the model's dtype one by one. There is one entry a hook point. Versions before 0.4.9.2 use
the last vector of a file with several layers for all of them, so they are fit for one layer only.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steersman.edits import ResidualEdit
from steersman.errors import ArchitectureMismatch, ArtifactError, ModelError, valid_name
from steersman.interop.foreign_files import write_bytes
from steersman.interop.foreign_vectors import edits_by_layer, sum_of
from steersman.models.adapters import unwrap
from steersman.models.architecture import decoder_layers, read_architecture
from steersman.models.loading import Named, structure_of
from steersman.steering import Steering

_WHAT = "lm-eval's format"


def export_lm_eval(steering: Steering, target: str | Path, model: Named, *, force: bool = False) -> None:
    """Write the vectors of a steering, for `--model steered --model_args pretrained=…,steer_path=FILE`.

    Args:
        steering: The plan.
        target: The file to write; the harness wants its name to end with `.pt`.
        model: The model of the plan (or its name), for its layers; its weights may be on the meta device.
        force: Replace a file that is there.

    Raises:
        ArtifactError: the plan has what the format cannot say exactly (another scope than `all`, experts,
            `project` beside another edit of the layer or at another strength than 1), the name does not end
            with .pt, or the file cannot be written.
        ArchitectureMismatch: the model is not of the plan's architecture.

    Example:
        >>> plan = steersman.Steering.from_vectors("lab:moe", {2: [0.1] * 96}, scope="all")
        >>> steersman.export_lm_eval(plan, "plan.pt", "lab:moe")
    """
    model = structure_of(model)
    path = Path(valid_name(target, ArtifactError))
    if path.suffix not in (".pt", ".pth"):
        raise ArtifactError(f"{path}: {_WHAT} wants a name that ends with .pt")
    if read_architecture(model).id != steering.architecture_id:
        raise ArchitectureMismatch("the model that names the layers is not of the steering's architecture")
    layers = edits_by_layer(steering, _WHAT)
    names = hook_points(model)
    entries = {names[layer]: _entry(edits, layer) for layer, edits in layers.items()}
    content = io.BytesIO()
    # Plain dicts, text, numbers and tensors: what torch.load(weights_only=True) takes.
    torch.save(entries, content)
    write_bytes(path, content.getvalue(), force=force)


def hook_points(model: nn.Module) -> list[str]:
    """The names of the decoder layers below `model.base_model`, by layer."""
    whole = unwrap(model)
    base = getattr(whole, "base_model", whole)
    names = {module: name for name, module in base.named_modules()}
    layers = decoder_layers(model)
    if any(layer not in names for layer in layers):
        raise ModelError(f"{type(whole).__name__}: its decoder layers have no names below its base_model")
    return [names[layer] for layer in layers]


def _entry(edits: list[ResidualEdit], layer: int) -> dict[str, Any]:
    if [edit.operation for edit in edits] == ["project"]:
        if edits[0].strength != 1:
            raise ArtifactError(
                f"{_WHAT} takes a direction out wholly or not at all: the steering projects it out of layer "
                f"{layer} at strength {edits[0].strength:g}, not 1"
            )
        return _said("clamp", edits[0].vectors[layer].clone(), 0.0)
    if any(edit.operation == "project" for edit in edits):
        raise ArtifactError(
            f"{_WHAT} has one entry a layer: the steering projects and edits layer {layer} again"
        )
    return _said("add", sum_of(edits, layer, _WHAT), 1.0)


def _said(action: str, vector: torch.Tensor, coefficient: float) -> dict[str, Any]:
    return {
        "action": action,
        "steering_vector": vector,
        "steering_coefficient": coefficient,
        "bias": None,
        "head_index": None,
    }
