"""GGUF control vectors (of llama.cpp's `--control-vector`), both ways.

A file says `general.architecture = "controlvector"`, `controlvector.model_hint` (a model type, which
llama.cpp does not read), `controlvector.layer_count` (how many vectors there are, not read either), and for
each steered layer a one-dimensional float32 tensor `direction.N`, added as it is, to every token.

Which layer N is: llama.cpp (common.cpp, `common_control_vector_load_one`; llama-adapter.cpp,
`llama_adapter_cvec::apply`) keeps direction.N at place N - 1 of a buffer and hands place il - 1 to layer il,
so the two ones cancel; `build_cvec(cur, il)` then adds it to what decoder layer il, counted from 0, gives to
the next one (`l_out`). So direction.N is our vector of layer N. There is never one for layer 0: llama.cpp
refuses the file. repeng, too, writes the index of the layer whose output it changes (see `repeng`).

The file is read by the `gguf` package, which trusts it: an array in the metadata may claim any length and is
built element by element, also beyond the end of the file. So the metadata is walked through here first, and
what no control vector needs ends the reading.
"""

from __future__ import annotations

import io
import re
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steersman.edits import Scope
from steersman.errors import ArtifactError, valid_name
from steersman.interop.foreign_files import read_bytes, write_bytes
from steersman.interop.foreign_vectors import MOST_LAYERS, Array, edits_by_layer, steering_of, sum_of
from steersman.models import gguf_header
from steersman.models.gguf_header import ALIGNMENT, MAGIC
from steersman.models.loading import Named, structure_of
from steersman.steering import Steering

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURE = "controlvector"
MODEL_HINT = f"{ARCHITECTURE}.model_hint"
LAYER_COUNT = f"{ARCHITECTURE}.layer_count"

METHOD = f"{ARCHITECTURE}.method"
"""A key of EasySteer's alone."""

_MOST_ENTRIES = 16_384
_FLOAT32 = 0
_NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")


@dataclass(frozen=True)
class ControlVector:
    """What a control vector file holds."""

    model_hint: str | None
    directions: dict[int, Array]
    """{N of direction.N: float32 [width]}."""
    said: Mapping[str, Any] = field(default_factory=dict)
    """Metadata of the keys that the reader knows beside the format's own."""


def import_gguf(source: str | Path, model: Named, *, scope: Scope = "all") -> Steering:
    """Read a GGUF control vector as a steering of `model`, at strength 1.

    Args:
        source: The file.
        model: The model (or its name) that the vectors are for: layers and width are checked against it.
        scope: Which tokens to steer: `all`, as llama.cpp does, `prompt`, `generated` or `answer`.

    Raises:
        ArtifactError: the file is damaged, foreign, or has what no control vector has.
        PlanError: it has vectors of layers that the model lacks, or of another width.

    Example:
        >>> plan = steersman.Steering.from_vectors("lab:moe", {2: [0.1] * 96}, scope="all")
        >>> steersman.export_gguf(plan, "vectors.gguf")
        >>> steersman.import_gguf("vectors.gguf", "lab:moe", scope="answer")
        <Steering: vectors (add) at layer 2; scope answer; for lab:moe, ...>
    """
    model = structure_of(model)
    path = Path(valid_name(source, ArtifactError))
    content = read_bytes(path)
    found = parse_gguf(content, path)
    check_layers(found, path)
    return steering_of(found.directions, model, scope=scope, path=path, kind="gguf", content=content)


def read_gguf(path: Path) -> ControlVector:
    """What a control vector file for llama.cpp holds. Raises `ArtifactError` as `import_gguf` does."""
    found = parse_gguf(read_bytes(path), path)
    check_layers(found, path)
    return found


def check_layers(found: ControlVector, path: Path) -> None:
    """Raise `ArtifactError` where a file names layer 0, as llama.cpp does."""
    if 0 in found.directions:
        raise ArtifactError(
            f"{path}: direction.0: llama.cpp has no vector for layer 0 (repeng has: --format repeng)"
        )


def parse_gguf(content: bytes, path: Path, knows: Callable[[str], bool] = lambda key: False) -> ControlVector:
    """The content of a control vector file, any layer allowed. `path` is for messages; `knows` says of a key
    beside the format's own whether the caller reads it.

    Raises:
        ArtifactError: it is damaged, foreign, or has what no control vector has.
    """
    try:
        metadata = _metadata(content, path)
        more = _check_metadata(metadata, path, knows)
        with tempfile.NamedTemporaryFile(suffix=".gguf") as copy:
            # The package maps a file; this one holds what was looked through, whoever changes the other.
            copy.write(content)
            copy.flush()
            directions = _directions(_opened(copy.name), len(content), path)
            return ControlVector(metadata.get(MODEL_HINT), directions, more)
    except (struct.error, ValueError, LookupError, OverflowError, TypeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: damaged, or not a GGUF file ({_one_line(error)})") from None


def _opened(name: str) -> GGUFReader:
    from gguf import GGUFReader

    with np.errstate(all="ignore"):  # sizes that overflow are looked at below
        return GGUFReader(name)


def _one_line(error: Exception) -> str:
    return repr(" ".join(str(error).split())[:120])[1:-1] or type(error).__name__


# ------------------------------------------------------------ looked through before the package reads it


def _metadata(content: bytes, path: Path) -> dict[str, Any]:
    """{key: value} of the file's metadata, in which no array is."""
    if not content.startswith(MAGIC):
        raise ArtifactError(f"{path}: not a GGUF file: it does not begin with {MAGIC.decode()}")
    stream = io.BytesIO(content)
    version, tensors, entries = gguf_header.start(stream)
    if version not in gguf_header.VERSIONS:
        raise ArtifactError(f"{path}: GGUF version {version} is not read: right is 2 or 3, little-endian")
    if entries > _MOST_ENTRIES:
        raise ArtifactError(f"{path}: claims {entries} entries of metadata: a control vector has a few")
    if not 0 < tensors <= MOST_LAYERS:
        raise ArtifactError(f"{path}: claims {tensors} tensors: a control vector has one a layer")

    def refused(key: str, kind: int) -> None:
        what = "an array" if kind == gguf_header.ARRAY else f"of the unknown type {kind}"
        raise ArtifactError(f"{path}: {key[:80]!r} is {what}, which no control vector has")

    return gguf_header.metadata(stream, entries, refused)


def _check_metadata(metadata: Mapping[str, Any], path: Path, knows: Callable[[str], bool]) -> dict[str, Any]:
    """What the metadata says beside the format's own keys."""
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        said = "no general.architecture" if architecture is None else repr(architecture)[:80]
        raise ArtifactError(f"{path}: a GGUF file of {said}: a control vector says {ARCHITECTURE!r} there")
    for key, kind in ((MODEL_HINT, str), (LAYER_COUNT, int)):
        if type(metadata.get(key, kind())) is not kind:
            raise ArtifactError(f"{path}: {key} is not {'text' if kind is str else 'a whole number'}")
    alignment = metadata.get(ALIGNMENT, 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ArtifactError(f"{path}: {ALIGNMENT} is {str(alignment)[:20]!r} and not a power of two")
    # What describes the file changes nothing (general.name, general.author …). Anything else may say that the
    # vectors are not simply added: there are files of this kind whose vectors are projected out.
    more = {
        key: value
        for key, value in metadata.items()
        if not key.startswith("general.") and key not in (MODEL_HINT, LAYER_COUNT)
    }
    unknown = [key for key in more if not knows(key)]
    if unknown:
        whose = "; EasySteer writes such files: --format easysteer" if METHOD in unknown else ""
        raise ArtifactError(
            f"{path}: {unknown[0][:80]!r} is unknown: it may change what the vectors mean{whose}"
        )
    return more


# ------------------------------------------------------------ what the package has read


def _directions(reader: GGUFReader, size: int, path: Path) -> dict[int, Array]:
    directions: dict[int, Array] = {}
    for tensor in reader.tensors:
        where = f"{path}: tensor {tensor.name[:80]!r}"
        named = _NAME.fullmatch(tensor.name)
        if named is None:
            raise ArtifactError(f"{where} is unknown: a control vector has direction.1, direction.2, …")
        if tensor.tensor_type != _FLOAT32:
            raise ArtifactError(f"{where} is of type {tensor.tensor_type.name}: right is F32")
        if tensor.data.ndim != 1 or not tensor.data.size:
            raise ArtifactError(f"{where} has the shape {tensor.shape.tolist()[:8]}: right is [width]")
        # The package adds these up in 64 bits, which a large offset overflows.
        end = int(reader.data_offset) + int(tensor.field.parts[-1][0]) + tensor.data.nbytes
        if end > size:
            raise ArtifactError(f"{where} ends beyond the end of the file")
        directions[int(named[1])] = np.array(tensor.data, np.float32)
    return dict(sorted(directions.items()))


# ------------------------------------------------------------ out


def export_gguf(steering: Steering, target: str | Path, *, force: bool = False) -> None:
    """Write the vectors of a steering as a GGUF control vector, the strength multiplied in.

    To be applied with `--control-vector FILE`, at its own scale 1. Several edits that add at one layer become
    one vector, their sum.

    Args:
        steering: The plan.
        target: The file to write.
        force: Replace a file that is there.

    Raises:
        ArtifactError: the plan has what the format cannot say exactly (layer 0, `project`, another scope than
            `all`, experts), or the file cannot be written.

    Example:
        >>> plan = steersman.Steering.from_vectors("lab:moe", {2: [0.1] * 96}, scope="all")
        >>> steersman.export_gguf(plan, "plan.gguf")
        >>> steersman.import_gguf("plan.gguf", "lab:moe") == plan
        True
    """
    what = "a GGUF control vector"
    layers = edits_by_layer(steering, what)
    if 0 in layers:
        raise ArtifactError(f"{what} has no vector for layer 0: llama.cpp starts at layer 1")
    vectors = {layer: sum_of(edits, layer, what).numpy() for layer, edits in layers.items()}
    vectors = {layer: vector for layer, vector in vectors.items() if vector.any()}
    if not vectors:
        raise ArtifactError(f"the steering's vectors add up to nothing, and {what} takes no empty plan")
    write_bytes(target, written(vectors, steering.architecture.model_type), force=force)


def written(directions: Mapping[int, Array], model_hint: str) -> bytes:
    """A control vector file of {N: float32 [width]}."""
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.gguf"
        writer = GGUFWriter(path, ARCHITECTURE)
        writer.add_string(MODEL_HINT, model_hint)
        writer.add_uint32(LAYER_COUNT, len(directions))
        for layer in sorted(directions):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(directions[layer], "<f4"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
