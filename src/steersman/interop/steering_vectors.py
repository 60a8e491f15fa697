"""Vectors that `torch.save` has saved, of the library steering-vectors or bare: read.

The library (github.com/steering-vectors/steering-vectors) has no format of its own; people save the vector
with `torch.save`: the object as it is, a dict of its fields (`{"layer_activations": …, "layer_type": …}`), or
its `layer_activations` alone ({layer: tensor}; a layer may be text of digits). All three are read, and
nothing of them is run (see `inert_pickle`). So are bare tensors, as others save them: one vector, a matrix
with a row a layer, a list of vectors, also as numpy arrays. Such a file does not say which layers it is for
(a matrix may begin with the embeddings): the importer does.

Which layer a number is: `layer_activations[n]` is added to the output of the n-th module that the library
matches, from 0; for the layer type `decoder_block` these are the decoder layers in order, so n is our layer
n. Other types (`self_attn`, `mlp`, layer norms) are other places than a decoder layer's output, and are
refused. The library adds at every position, unless told otherwise when it is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steersman.edits import Scope, as_layers
from steersman.errors import ArtifactError, valid_name
from steersman.interop.foreign_files import read_bytes
from steersman.interop.foreign_vectors import MOST_LAYERS, Array, exact_float32, steering_of
from steersman.interop.inert_pickle import HostilePickle, Record
from steersman.interop.pickled_arrays import KNOWN_ARRAYS, ArrayReader, Unexpected, unexpected
from steersman.interop.pickled_tensors import TensorFile
from steersman.models.loading import Named, structure_of
from steersman.showing import count_of
from steersman.steering import Steering

KNOWN = {**KNOWN_ARRAYS, ("steering_vectors.steering_vector", "SteeringVector"): "steering vector"}

_FIELDS = {"layer_activations", "layer_type"}
_BLOCK = "decoder_block"


def import_steering_vectors(
    source: str | Path, model: Named, *, scope: Scope = "all", layers: Sequence[int] | None = None
) -> Steering:
    """Read a saved `SteeringVector`, or bare tensors, as a steering of `model`, at strength 1 (the library's
    `multiplier`).

    Args:
        source: The file that `torch.save` wrote.
        model: The model (or its name) that the vector is for: layers and width are checked against it.
        scope: Which tokens to steer: `all`, as the library does, `prompt`, `generated` or `answer`.
        layers: For a file that does not say it: the layer of each vector, from 0; or several for one vector.

    Raises:
        ArtifactError: the file is damaged, foreign, names what no tensor needs, is for another layer type
            than `decoder_block`, holds numbers that float32 cannot say, or does not say its layers and
            `layers` neither.
        PlanError: it has vectors of layers that the model lacks, or of another width.

    Example:
        >>> import torch
        >>> torch.save(torch.ones(96), "vector.pt")
        >>> steersman.import_steering_vectors("vector.pt", "lab:moe", layers=[2])
        <Steering: vectors (add) at layer 2; scope all; for lab:moe, ...>
    """
    model = structure_of(model)
    path = Path(valid_name(source, ArtifactError))
    content = read_bytes(path, zipped=True)
    vectors = _parsed(content, path, layers)
    return steering_of(vectors, model, scope=scope, path=path, kind="steering-vectors", content=content)


def read_steering_vectors(path: Path, layers: Sequence[int] | None = None) -> dict[int, Array]:
    """{layer: vector} of a saved `SteeringVector` or of bare tensors. Raises `ArtifactError` as the import
    does.
    """
    return _parsed(read_bytes(path, zipped=True), path, layers)


def _parsed(content: bytes, path: Path, layers: Sequence[int] | None) -> dict[int, Array]:
    try:
        file = TensorFile(content, KNOWN, "steering vector")
        bare = _bare(file, content)
        found = {} if bare else {n: file.vector(tensor) for n, tensor in _activations(file.value).items()}
    except HostilePickle as error:
        raise ArtifactError(f"{path}: refused, and nothing of it was run: {error}") from None
    except Unexpected as error:
        raise ArtifactError(f"{path}: not a steering vector that can be read: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        said = repr(" ".join(str(error).split())[:120])[1:-1] or type(error).__name__
        raise ArtifactError(f"{path}: damaged, or not saved by torch.save ({said})") from None
    if bare:
        found = _placed(bare, layers, path)
    elif layers is not None:
        raise ArtifactError(f"{path}: says itself which layers it is for: leave --layers out")
    return {
        layer: exact_float32(found[layer], f"{path}: the vector of layer {layer}") for layer in sorted(found)
    }


def _bare(file: TensorFile, content: bytes) -> list[Array]:
    """The vectors of a file that says no layers, in order; [] for any other."""
    values = file.value if isinstance(file.value, list | tuple) else [file.value]
    found: list[Array] = []
    for value in values:
        if isinstance(value, Record) and value.word in ("tensor", "parameter"):
            found += file.rows(value)
        elif isinstance(value, Record) and value.word in ("array", "empty array"):
            array = ArrayReader(len(content)).values(value)
            if array.ndim > 2 or array.dtype.kind != "f" or len(array) > MOST_LAYERS:
                unexpected(f"an array of shape {list(array.shape)} where vectors should be")
            found += list(array) if array.ndim == 2 else [array]
        elif found or len(values) > 1:
            unexpected("a list of other things than tensors")
    return found


def _placed(bare: list[Array], layers: Sequence[int] | None, path: Path) -> dict[int, Array]:
    """{layer: vector} of vectors without layers, as they are given for them."""
    many = f"{count_of(len(bare), 'vector')}" if bare[1:] else "a vector"
    layers = () if layers is None else as_layers(layers, ArtifactError)
    if not layers:
        raise ArtifactError(
            f"{path}: holds {many} and does not say of which layers: give them with --layers, such as 12 or "
            "0-31 (in Python layers=)"
        )
    if len(set(layers)) < len(layers):
        raise ArtifactError(f"{path}: --layers names a layer twice")
    if len(bare) not in (1, len(layers)):
        raise ArtifactError(f"{path}: holds {many}, and --layers names {count_of(len(layers), 'layer')}")
    return dict(zip(layers, bare * len(layers) if len(bare) == 1 else bare, strict=True))


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
    found = {_number(layer): tensor for layer, tensor in layers.items()}
    if len(found) < len(layers):
        unexpected("it has a layer twice")
    return found


def _number(layer: Any) -> int:
    if isinstance(layer, str) and layer.isascii() and layer.isdigit() and str(int(layer[:6])) == layer:
        layer = int(layer)
    if type(layer) is not int or not 0 <= layer < MOST_LAYERS:
        unexpected(f"its layer {str(layer)[:40]!r} is no layer's number")
    return int(layer)
