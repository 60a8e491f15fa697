"""repeng's `ControlVector` (github.com/vgel/repeng): read from GGUF (`export_gguf`), or from a pickle of it.

Which layer a number is: repeng's `directions[n]` is trained on the output of decoder layer n, from 0, and
added to the output of that layer; `export_gguf` writes it as direction.n, the same number (llama.cpp, too,
adds direction.n to the output of layer n: see `gguf`). By default repeng has no direction 0, but one that was
asked for is written, and repeng applies it; llama.cpp refuses such a file. The model hint is the transformers
`model_type`, which is checked here. repeng adds at every position, and `normalize=True` of its `set_control`
is not in the file.

A pickle (`pickle.dump` of the object) is read as data: nothing of it is run (see `inert_pickle`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steersman.edits import Scope
from steersman.errors import ArtifactError, valid_name
from steersman.interop.foreign_files import read_bytes
from steersman.interop.foreign_vectors import MOST_LAYERS, exact_float32, steering_of
from steersman.interop.gguf import ControlVector, parse_gguf
from steersman.interop.inert_pickle import HostilePickle, read_inert
from steersman.interop.pickled_arrays import KNOWN_ARRAYS, ArrayReader, Unexpected, record, unexpected
from steersman.models.architecture import decoder_config
from steersman.models.gguf_header import MAGIC
from steersman.models.loading import Named, structure_of
from steersman.steering import Steering

KNOWN = {
    **KNOWN_ARRAYS,
    **{(module, "ControlVector"): "control vector" for module in ("repeng", "repeng.extract")},
}

_FIELDS = {"model_type", "directions"}


def import_repeng(source: str | Path, model: Named, *, scope: Scope = "all") -> Steering:
    """Read repeng's control vector as a steering of `model`, at strength 1 (repeng's `coeff`).

    Args:
        source: What `export_gguf` wrote, or a pickled `ControlVector`.
        model: The model (or its name) that the vector is for: model type, layers and width are checked.
        scope: Which tokens to steer: `all`, as repeng does, `prompt`, `generated` or `answer`.

    Raises:
        ArtifactError: the file is damaged, foreign, names what no control vector needs, is for another model
            type, or holds numbers that float32 cannot say.
        PlanError: it has vectors of layers that the model lacks, or of another width.

    Example:
        >>> plan = steersman.Steering.from_vectors("lab:moe", {2: [0.1] * 96}, scope="all")
        >>> steersman.export_gguf(plan, "vectors.gguf")  # of the same form as repeng's own export_gguf
        >>> steersman.import_repeng("vectors.gguf", "lab:moe") == plan
        True
    """
    model = structure_of(model)
    path = Path(valid_name(source, ArtifactError))
    content = read_bytes(path)
    found = _parsed(content, path)
    model_type = decoder_config(model).model_type
    # A vision-language model has one name of its own and one of its language model: repeng takes the former.
    names = {model_type, getattr(getattr(model, "config", None), "model_type", model_type)}
    if found.model_hint not in names:
        raise ArtifactError(
            f"{path}: made for a model of type {found.model_hint!r}, and this is {model_type!r}"
        )
    return steering_of(found.directions, model, scope=scope, path=path, kind="repeng", content=content)


def read_repeng(path: Path) -> ControlVector:
    """What repeng's file holds. Raises `ArtifactError` as `import_repeng` does."""
    return _parsed(read_bytes(path), path)


def _parsed(content: bytes, path: Path) -> ControlVector:
    found = parse_gguf(content, path) if content.startswith(MAGIC) else _from_pickle(content, path)
    if found.model_hint is None:
        raise ArtifactError(f"{path}: says no model type, which repeng always does")
    return found


def _from_pickle(content: bytes, path: Path) -> ControlVector:
    try:
        state = record(
            read_inert(content, KNOWN, what="control vector"), "control vector", "repeng's vector"
        ).state
        if not isinstance(state, dict) or state.keys() != _FIELDS or not isinstance(state["model_type"], str):
            unexpected("its fields are not model_type and directions")
        arrays = ArrayReader(len(content))
        found = {layer: arrays.values(array) for layer, array in _by_layer(state["directions"]).items()}
    except HostilePickle as error:
        raise ArtifactError(f"{path}: refused, and nothing of it was run: {error}") from None
    except Unexpected as error:
        raise ArtifactError(f"{path}: not a control vector that can be read: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        said = repr(" ".join(str(error).split())[:120])[1:-1] or type(error).__name__
        raise ArtifactError(f"{path}: damaged, or neither GGUF nor a pickle of repeng ({said})") from None
    vectors = {
        layer: exact_float32(found[layer], f"{path}: the vector of layer {layer}") for layer in sorted(found)
    }
    return ControlVector(state["model_type"], vectors)


def _by_layer(directions: Any) -> dict[int, Any]:
    if not isinstance(directions, dict) or not directions:
        unexpected("it has no directions")
    for layer in directions:
        if type(layer) is not int or not 0 <= layer < MOST_LAYERS:
            unexpected(f"its layer {str(layer)[:40]!r} is no layer's number")
    return directions
