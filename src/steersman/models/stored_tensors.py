"""The tensors of a checkpoint's files, safetensors or GGUF: which there are, and where their bytes lie."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import try_to_load_from_cache

from steersman.errors import ModelError
from steersman.models import gguf_header
from steersman.stand_ins import stand_in_at

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SETTINGS_FILE = "generation_config.json"
_READ_WITH_A_MODEL = re.compile(
    r"((.*_)?config|tokenizer.*|special_tokens_map|added_tokens|vocab|chat_template)\.(json|jinja|model)"
    r"|(merges|vocab)\.txt"
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its bytes lie."""

    name: str
    dtype: str
    """As the file's format calls it: F32, BF16 … of safetensors, Q4_1 … of GGUF."""
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` within the tensor."""
        with self.file.open("rb") as stream:
            stream.seek(self.start + offset)
            return stream.read(count)


def checkpoint_files(name: str, revision: str | None) -> list[Path]:
    """The safetensors files of a checkpoint, in a folder or in the Hub's cache; [] where they are not all
    there.

    Raises ModelError for a damaged index.
    """
    if not name:
        return []
    index = checkpoint_file(name, revision, INDEX_FILE)
    if index is None:
        single = checkpoint_file(name, revision, SINGLE_FILE)
        return [] if single is None else [single]
    check_content(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{index}: not a safetensors index with a weight_map") from None
    files = [checkpoint_file(name, revision, file) for file in names]
    return [] if None in files else [file for file in files if file is not None]


def check_folder(folder: Path) -> None:
    """Raise ModelError where a file of a checkpoint's folder is damaged, or another thing lies in its place.

    transformers says of such a file what its parser stumbles over, or takes it (any text is a chat template),
    or goes on without it (`generation_config.json`).
    """
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if _READ_WITH_A_MODEL.fullmatch(path.name):
                check_content(path)
                if path.suffix == ".json":
                    _check_object(path)
        for path in checkpoint_files(str(folder), None):
            stored_tensors(path)


def check_settings(name: str, revision: str | None) -> None:
    """Raise ModelError where a checkpoint's `generation_config.json`, in a folder or in the Hub's cache, is
    damaged: transformers goes on without it.
    """
    if (path := checkpoint_file(name, revision, SETTINGS_FILE)) is not None:
        check_content(path)
        _check_object(path)


def _check_object(path: Path) -> None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error}); download or copy it again") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object {{…}}; download or copy it again")


def check_content(path: Path) -> None:
    """Raise ModelError where another thing than content lies in a file."""
    if not path.is_dir() and (instead := stand_in_at(path)) is not None:
        raise ModelError(f"{path}: {instead}")


def checkpoint_file(name: str, revision: str | None, file: str) -> Path | None:
    """A file of a checkpoint, in a folder or in the Hub's cache; None where it is not there."""
    folder = Path(name)
    if folder.is_dir():
        path = folder / file
        return path if path.is_file() else None
    if name.count("/") > 1 or folder.is_absolute():
        return None
    cached = try_to_load_from_cache(name, file, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors or GGUF file, of the latter its metadata as one more. Raises ModelError
    where it is damaged or another thing.
    """
    if is_gguf(path):
        file = read_gguf(path)
        return [file.metadata_bytes, *file.tensors]
    check_content(path)
    with path.open("rb") as stream:
        found = _of_safetensors(stream, path)
        _check_whole(found, path, stream.seek(0, 2))
    return found


def _check_whole(found: list[StoredTensor], path: Path, end: int) -> None:
    for tensor in found:
        if tensor.size < 0 or tensor.start + tensor.size > end:
            raise ModelError(
                f"{path}: cut off: it has {end} bytes, and {tensor.name} ends at byte "
                f"{tensor.start + tensor.size}; download or copy it again"
            )


def is_gguf(path: Path) -> bool:
    """Whether a file is named as GGUF files are."""
    return path.suffix.lower() == ".gguf"


def _of_safetensors(stream: BinaryIO, path: Path) -> list[StoredTensor]:
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 0 < length < 100_000_000:
        raise ModelError(f"{path}: not a safetensors file")
    try:
        header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return [
            StoredTensor(
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                file=path,
                start=8 + length + entry["data_offsets"][0],
                size=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        ]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ModelError(f"{path}: the safetensors header is damaged") from None


# ---------------------------------------------------------------- GGUF


@dataclass(frozen=True)
class GgufFile:
    """What the header of a GGUF file says: its metadata but for arrays, and its tensors."""

    path: Path
    metadata: dict[str, Any]
    metadata_bytes: StoredTensor
    """All of it as it lies there, arrays too: the configuration is part of it, so it tells models apart."""
    tensors: list[StoredTensor]


def read_gguf(path: Path) -> GgufFile:
    """A GGUF file's header. Raises ModelError where it is damaged or another thing."""
    check_content(path)
    with path.open("rb") as stream:
        found = _of_gguf(stream, path)
        _check_whole(found.tensors, path, stream.seek(0, 2))
    return found


def _of_gguf(stream: BinaryIO, path: Path) -> GgufFile:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        version, tensors, entries = gguf_header.start(stream)
        if version not in gguf_header.VERSIONS or max(tensors, entries) > gguf_header.MOST:
            raise ValueError("it is not of version 2 or 3, little-endian")
        first = stream.tell()
        metadata = gguf_header.metadata(stream, entries)
        after = stream.tell()
        alignment = metadata.get(gguf_header.ALIGNMENT, 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError("an alignment that is no number above 0")
        found = []
        for _ in range(tensors):
            name = gguf_header.text(stream)
            (dimensions,) = struct.unpack("<I", stream.read(4))
            if dimensions > 8:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            *shape, kind, offset = struct.unpack(f"<{dimensions}QIQ", stream.read(8 * dimensions + 12))
            count = 1
            for extent in shape:
                count *= extent
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            dtype = GGMLQuantizationType(kind).name
            found.append((name, dtype, tuple(shape), offset, count // block * size))
    except (struct.error, ValueError, LookupError, OverflowError) as error:
        why = " ".join(str(error).split())[:120]
        raise ModelError(f"{path}: damaged, or not a GGUF file ({why})") from None
    begin = -(-stream.tell() // alignment) * alignment
    stored = [
        StoredTensor(name, dtype, shape, path, begin + offset, size)
        for name, dtype, shape, offset, size in found
    ]
    whole = StoredTensor("(metadata)", "KV", (entries,), path, first, after - first)
    return GgufFile(path, metadata, whole, stored)
