"""Vectors of the library steering-vectors, as `torch.save` saves them: read.

The library (github.com/steering-vectors/steering-vectors) has no format of its own; people save the vector
with `torch.save`: the object as it is, a dict of its fields (`{"layer_activations": …, "layer_type": …}`), or
its `layer_activations` alone ({layer: tensor}). All three are read, and nothing of them is run (see
`inert_pickle`).

Which layer a number is: `layer_activations[n]` is added to the output of the n-th module that the library
matches, from 0; for the layer type `decoder_block` these are the decoder layers in order, so n is our layer
n. Other types (`self_attn`, `mlp`, layer norms) are other places than a decoder layer's output, and are
refused. The library adds at every position, unless told otherwise when it is applied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from steersman.edits import Scope
from steersman.errors import ArtifactError
from steersman.interop.foreign_files import read_bytes
from steersman.interop.foreign_vectors import MOST_LAYERS, Array, exact_float32, steering_of
from steersman.interop.inert_pickle import HostilePickle, Record
from steersman.interop.pickled_arrays import Unexpected, unexpected
from steersman.interop.pickled_tensors import TensorFile
from steersman.steering import Steering

KNOWN = {("steering_vectors.steering_vector", "SteeringVector"): "steering vector"}

_FIELDS = {"layer_activations", "layer_type"}
_BLOCK = "decoder_block"


def import_steering_vectors(source: str | Path, model: nn.Module, *, scope: Scope = "all") -> Steering:
    """Read a saved `SteeringVector` as a steering of `model`, at strength 1 (the library's `multiplier`).

    Args:
        source: The file that `torch.save` wrote.
        model: The transformers model that the vector is for: layers and width are checked against it.
        scope: Which tokens to steer: `all`, as the library does, `prompt`, `generated` or `answer`.

    Raises:
        ArtifactError: the file is damaged, foreign, names what no tensor needs, is for another layer type
            than `decoder_block`, or holds numbers that float32 cannot say.
        PlanError: it has vectors of layers that the model lacks, or of another width.
    """
    path = Path(source)
    content = read_bytes(path, zipped=True)
    return steering_of(
        _parsed(content, path), model, scope=scope, path=path, kind="steering-vectors", content=content
    )


def read_steering_vectors(path: Path) -> dict[int, Array]:
    """{layer: vector} of a saved `SteeringVector`. Raises `ArtifactError` as the import does."""
    return _parsed(read_bytes(path, zipped=True), path)


def _parsed(content: bytes, path: Path) -> dict[int, Array]:
    try:
        file = TensorFile(content, KNOWN, "steering vector")
        found = {layer: file.vector(tensor) for layer, tensor in _activations(file.value).items()}
    except HostilePickle as error:
        raise ArtifactError(f"{path}: refused, and nothing of it was run: {error}") from None
    except Unexpected as error:
        raise ArtifactError(f"{path}: not a steering vector that can be read: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        said = repr(" ".join(str(error).split())[:120])[1:-1] or type(error).__name__
        raise ArtifactError(f"{path}: damaged, or not saved by torch.save ({said})") from None
    return {
        layer: exact_float32(found[layer], f"{path}: the vector of layer {layer}") for layer in sorted(found)
    }


def _activations(value: Any) -> dict[int, Any]:
    fields = value.state if isinstance(value, Record) and value.word == "steering vector" else value
    if not isinstance(fields, dict):
        unexpected("it holds neither a SteeringVector nor {layer: tensor}")
    layers: Any = fields
    if _FIELDS & fields.keys():
        unknown = sorted(str(key) for key in fields.keys() - _FIELDS)
        if unknown:
            unexpected(f"its field {unknown[0][:40]!r} is unknown")
        kind = fields.get("layer_type", _BLOCK)
        if kind != _BLOCK:
            unexpected(
                f"it is for layers of type {str(kind)[:40]!r}; only {_BLOCK!r} is a decoder layer's output"
            )
        layers = fields.get("layer_activations")
    if not isinstance(layers, dict) or not layers:
        unexpected("it has no vectors")
    for layer in layers:
        if type(layer) is not int or not 0 <= layer < MOST_LAYERS:
            unexpected(f"its layer {str(layer)[:40]!r} is no layer's number")
    return layers
