"""Which weights a model has: an id read from its checkpoint's files, or from memory where there is no
checkpoint.

The id is sha256 over each tensor's name, shape and sampled bytes, in the order of the names. A model that
was built in memory gets the id that its checkpoint would have if it were saved now, so that a plan made
before saving fits after loading. How a checkpoint was loaded (dtype, device, offloaded, sharded, quantised
while loading) does not count; active adapters do.
"""

from __future__ import annotations

import hashlib
import json
import struct
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel, remove_tied_weights_from_state_dict

from steersman.errors import ModelError
from steersman.models.adapters import adapter_tensors, unwrap
from steersman.models.weights import first_index, is_sharded, local, own_tensors, tied_names

WINDOWS = 8
"""How many stretches of a tensor's bytes are read."""
WINDOW_BYTES = 64
"""How long each of them is."""

LAB_NAME = "steersman_lab_name"
"""Attribute of a model of the lab: what it is called there, wherever the package is installed."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` within the tensor."""
        with self.file.open("rb") as stream:
            stream.seek(self.start + offset)
            return stream.read(count)


def weights_id(model: nn.Module) -> str:
    """Hex sha256 that tells one set of weights from another, whatever dtype or device they were loaded to.

    Read from the checkpoint's safetensors files where the model came from some and still agrees with them;
    otherwise from the tensors in memory, under the names and in the layout that saving would give them.

    Raises:
        ModelError: the checkpoint's files are damaged, or the weights are neither in files nor in memory.
    """
    plain = unwrap(model)
    files = _checkpoint_files(plain)
    adapters = adapter_tensors(model)
    state = (_state_of_memory(plain, adapters), tuple((str(file), *_stamp(file)) for file in files))
    known = _known_ids.get(plain)
    if known is not None and known[0] == state:
        return known[1]
    stored = [tensor for file in files for tensor in _read_header(file)]
    identity = _digest_of_files(stored) if stored and _agrees(plain, stored) else _digest_of_memory(plain)
    if adapters:
        identity = _digest_with_adapters(identity, adapters)
    _known_ids[plain] = (state, identity)
    return identity


def identify_by_files(model: PreTrainedModel) -> None:
    """Let a model whose weights were never loaded (all on the meta device) have the id of the checkpoint that
    it names.

    Raises:
        ModelError: its safetensors files are not at hand, or hold none of its tensors.
    """
    files = _checkpoint_files(model)
    stored = [tensor for file in files for tensor in _read_header(file)]
    shapes = {tensor.name: tensor.shape for tensor in stored}
    own = model.state_dict()
    if not any(shapes.get(name) == tuple(tensor.shape) for name, tensor in own.items()) or any(
        not tensor.is_meta for tensor in own.values()
    ):
        raise ModelError(f"{_checkpoint_name(model)[0]}: its safetensors files are not at hand")
    state = (_state_of_memory(model, {}), tuple((str(file), *_stamp(file)) for file in files))
    _known_ids[model] = (state, _digest_of_files(stored))


_known_ids: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()


def model_name(model: nn.Module) -> tuple[str, str | None]:
    """The name that a model goes by in artifacts ('' if none), and the Hub's commit if there is one.

    That is the name or folder it was loaded from, and for a model of the lab the lab's own name.
    """
    plain = unwrap(model)
    name, revision = _checkpoint_name(plain)
    return getattr(plain, LAB_NAME, name), revision


def _checkpoint_name(model: nn.Module) -> tuple[str, str | None]:
    config = getattr(model, "config", None)
    name = getattr(config, "name_or_path", "") or ""
    return str(name), getattr(config, "_commit_hash", None)


def _digest(tensors: Iterable[tuple[str, tuple[int, ...], int, Callable[[int, int], bytes]]]) -> str:
    """sha256 over (name, shape, size in bytes, reader of bytes), sorted by name."""
    digest = hashlib.sha256()
    for name, shape, size, read in sorted(tensors, key=lambda tensor: tensor[0]):
        digest.update(f"{name}\0{list(shape)}\0".encode())
        for offset, count in _windows(size):
            digest.update(read(offset, count))
    return digest.hexdigest()


def _windows(size: int) -> list[tuple[int, int]]:
    """(offset, bytes) of evenly spaced stretches; the whole tensor where it is short.

    Offsets are multiples of 8.
    """
    if size <= WINDOWS * WINDOW_BYTES:
        return [(0, size)]
    last = size - WINDOW_BYTES
    return [(last * i // (WINDOWS - 1) // 8 * 8, WINDOW_BYTES) for i in range(WINDOWS)]


# ---------------------------------------------------------------- checkpoint files


def _checkpoint_files(model: nn.Module) -> list[Path]:
    """The safetensors files of the checkpoint a model names; [] where they are not all there."""
    name, revision = _checkpoint_name(model)
    if not name:
        return []
    index = _checkpoint_file(name, revision, INDEX_FILE)
    if index is None:
        single = _checkpoint_file(name, revision, SINGLE_FILE)
        return [] if single is None else [single]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{index}: not a safetensors index with a weight_map") from None
    files = [_checkpoint_file(name, revision, file) for file in names]
    return [] if None in files else [file for file in files if file is not None]


def _checkpoint_file(name: str, revision: str | None, file: str) -> Path | None:
    folder = Path(name)
    if folder.is_dir():
        path = folder / file
        return path if path.is_file() else None
    if name.count("/") > 1 or folder.is_absolute():
        return None
    cached = try_to_load_from_cache(name, file, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def _read_header(path: Path) -> list[StoredTensor]:
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length < 100_000_000:
            raise ModelError(f"{path}: not a safetensors file")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError:
            raise ModelError(f"{path}: the safetensors header is damaged") from None
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


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _digest_of_files(stored: list[StoredTensor]) -> str:
    return _digest((t.name, t.shape, t.size, t.read) for t in stored)


def _agrees(model: nn.Module, stored: list[StoredTensor]) -> bool:
    """Whether the weights in memory are those of the files, judged by a few values of each stored tensor.

    A model built from a checkpoint's *configuration* names the checkpoint too, but has other weights.
    """
    by_name = {tensor.name: tensor for tensor in stored}
    prefix = getattr(model, "base_model_prefix", "")
    compared = 0
    for name, tensor in own_tensors(model).items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue  # out of reach or quantised: nothing to compare
        if is_sharded(tensor):
            if (found := by_name.get(name)) is not None and (same := _same_part(tensor, found)) is not None:
                compared += 1
                if not same:
                    return False
            continue
        for part_name, part in _as_stored(model, name, local(tensor), by_name).items():
            # A decoder without its head is stored under the whole model's names.
            found = by_name.get(part_name) or by_name.get(f"{prefix}.{part_name}")
            if found is not None and found.dtype in _DTYPES and part.shape == found.shape:
                compared += 1
                if not _same_values(part, found):
                    return False
    return compared > 0  # where nothing is comparable, nothing says that these are the checkpoint's weights


def _as_stored(
    model: nn.Module, name: str, tensor: Tensor, by_name: Mapping[str, StoredTensor]
) -> dict[str, Tensor]:
    """One tensor in memory as the tensors it was loaded from: experts are stored singly and run together.

    One at a time, so that no second copy of the model is ever in memory.
    """
    if name in by_name or not isinstance(model, PreTrainedModel):
        return {name: tensor}
    try:
        return _reverted(model, {name: tensor})
    except NotImplementedError:  # of a checkpoint that was saved quantised: stored under another name
        return {}
    except ValueError:  # stored together with others (ERNIE's text and image experts): not comparable alone
        return {}


def _same_values(parameter: Tensor, stored: StoredTensor) -> bool:
    dtype = _DTYPES[stored.dtype]
    flat = parameter.detach().reshape(-1)
    for offset, count in _windows(stored.size):
        if not count:
            continue
        values = torch.frombuffer(bytearray(stored.read(offset, count)), dtype=dtype).to(parameter.dtype)
        here = flat[offset // dtype.itemsize : (offset + count) // dtype.itemsize].cpu()
        if not torch.equal(values.nan_to_num(), here.nan_to_num()):
            return False
    return True


def _same_part(tensor: Tensor, stored: StoredTensor) -> bool | None:
    """Whether the part of a sharded tensor that is here has the stored values, judged by three of them; None
    where it is not known which part it is.
    """
    start, part = first_index(tensor), local(tensor)
    if start is None or tensor.shape != stored.shape or stored.dtype not in _DTYPES or not part.numel():
        return None
    dtype = _DTYPES[stored.dtype]
    for index in (
        tuple(0 for _ in part.shape),
        tuple(n // 2 for n in part.shape),
        tuple(n - 1 for n in part.shape),
    ):
        place = 0
        for size, first, offset in zip(stored.shape, start, index, strict=True):
            place = place * size + first + offset
        value = torch.frombuffer(bytearray(stored.read(place * dtype.itemsize, dtype.itemsize)), dtype=dtype)
        here = part[index].detach().reshape(1).cpu()
        if not torch.equal(value.to(here.dtype).nan_to_num(), here.nan_to_num()):
            return False
    return True


# ---------------------------------------------------------------- memory


def _state_of_memory(model: nn.Module, adapters: Mapping[str, Tensor | str]) -> int:
    """A number that changes with the weights: it follows each tensor's place and version, and a few values
    for writes through `.data`, which no version counts.
    """
    tensors = [
        value for value in (*model.state_dict().values(), *adapters.values()) if isinstance(value, Tensor)
    ]
    real = [part for tensor in tensors if not tensor.is_meta and (part := local(tensor)).numel()]
    places = tuple((t.data_ptr(), _version(t), t.dtype) for t in real)
    samples: dict[torch.device, list[Tensor]] = {}
    for tensor in real:
        for index in (tuple(n // 2 for n in tensor.shape), tuple(n - 1 for n in tensor.shape)):
            # Not every device has doubles.
            samples.setdefault(tensor.device, []).append(tensor[index].detach().float())
    values = tuple(torch.stack(found).cpu().numpy().tobytes() for found in samples.values())
    settings = tuple((name, value) for name, value in adapters.items() if isinstance(value, str))
    return hash((len(tensors), places, values, tuple(adapters), settings))


def _digest_of_memory(model: nn.Module) -> str:
    tensors = own_tensors(model)
    for found, how in (
        (any(tensor.is_meta for tensor in tensors.values()), "offloaded"),
        (any(is_sharded(tensor) for tensor in tensors.values()), "sharded over processes"),
    ):
        if found:
            raise ModelError(
                f"the model's weights are {how} and its safetensors checkpoint is not at hand: "
                "they cannot be identified"
            )
    return _digest(
        (name, tuple(tensor.shape), tensor.numel() * tensor.element_size(), _reader(tensor))
        for name, tensor in _as_saved(model, tensors).items()
    )


def _digest_with_adapters(identity: str, adapters: Mapping[str, Tensor | str]) -> str:
    """The id of a model with active adapters: they are weights too."""
    tensors = {name: value for name, value in adapters.items() if isinstance(value, Tensor)}
    settings = {name: value for name, value in adapters.items() if isinstance(value, str)}
    digest = hashlib.sha256(f"{identity}\0{sorted(settings.items())}\0".encode())
    digest.update(
        _digest(
            (name, tuple(tensor.shape), tensor.numel() * tensor.element_size(), _reader(local(tensor)))
            for name, tensor in tensors.items()
        ).encode()
    )
    return digest.hexdigest()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _as_saved(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(model, PreTrainedModel):
        return tensors
    offloaded = any(tensor.is_meta for tensor in model.state_dict().values())
    tied = tied_names(model, tensors) if offloaded else set()  # files do not say which tensors are one
    state = remove_tied_weights_from_state_dict(
        {name: local(tensor) for name, tensor in tensors.items() if name not in tied}, model
    )
    try:
        return _reverted(model, state)
    except NotImplementedError:  # what quantising did while loading
        raise ModelError(
            "the model's quantised weights differ from the checkpoint that it names, or there is none: "
            "they cannot be identified"
        ) from None


def _reverted(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state under the names, and in the layout, that saving gives it."""
    # transformers' load_adapter leaves how the adapter's file was read in place of the model's own.
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    kept = model.__dict__.pop("_weight_conversions", None) if adapters else None
    try:
        return dict(revert_weight_conversion(model, state))
    finally:
        if kept is not None:
            model.__dict__["_weight_conversions"] = kept


def _reader(tensor: Tensor) -> Callable[[int, int], bytes]:
    flat = tensor.detach().reshape(-1)

    def read(offset: int, count: int) -> bytes:
        size = flat.element_size()
        part = flat[offset // size : (offset + count) // size].cpu().contiguous()
        return part.view(torch.uint8).numpy().tobytes()

    return read
