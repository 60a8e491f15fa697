"""Which weights a model has: an id read from its checkpoint's files, or from memory where there is no
checkpoint.

The id is sha256 over each tensor's name, dtype, shape and bytes, in the order of the names. A model that was
built in memory gets the id that its checkpoint would have if it were saved now, so that a plan made before
saving fits after loading. How a checkpoint was loaded (dtype, device, offloaded, sharded, quantised while
loading) does not count; active adapters do. That the weights in memory are those of the files is judged by a
sample of their values. Ids of earlier versions are over a sample of the bytes; they are recomputed.
"""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel, remove_tied_weights_from_state_dict

from steersman.errors import ModelError
from steersman.models.adapters import adapter_tensors, unwrap
from steersman.models.digest_cache import stamp
from steersman.models.digests import TensorBytes, id_by_bytes, id_by_sample, windows
from steersman.models.gguf_models import GGUF
from steersman.models.stored_tensors import StoredTensor, checkpoint_files, stored_tensors
from steersman.models.weights import first_index, is_sharded, local, own_tensors, tied_names
from steersman.models.weights_ids import UNKNOWN, is_by_sample

if TYPE_CHECKING:
    from steersman.models.loading import Named

NAME = "steersman_name"
"""Attribute of a model that its configuration does not name: what opens it (`lab:…`, `FOLDER#FILE.gguf`)."""

# Torch's dtypes by the names that safetensors has for them.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items() if code in ("F64", "F32", "F16", "BF16")}


WEIGHTLESS = "steersman_weightless"
"""Attribute of a model of which only the structure is known: no weights are at hand."""


def weights_id(model: Named) -> str:
    """Text that tells one set of weights from another, whatever dtype or device they were loaded to: the name
    of a scheme, a colon, and hex sha256 over every byte of every tensor.

    Read from the checkpoint's safetensors files (or its GGUF file) where the model came from some and still
    agrees with them, judged by a sample of its values; otherwise from the tensors in memory, under the names
    and in the layout that saving would give them. What was read from files is kept in the user's cache.

    Args:
        model: The model, or its name (`load_model`).

    Raises:
        ModelError: the checkpoint's files are damaged, or the weights are neither in files nor in memory.

    Example:
        >>> steersman.weights_id("lab:moe") == steersman.Steering.from_experts("lab:moe", {3: [5]}).weights_id
        True
    """
    from steersman.models.loading import structure_of  # which rests on this file

    model = structure_of(model)
    if WEIGHTLESS in model.__dict__:
        return UNKNOWN
    return _identity(model, id_by_bytes)


def has_weights(model: nn.Module, identity: str, what: str = "this steering") -> bool:
    """Whether a model has the weights of an id that `what` names. One by sample, of an earlier version, is
    recomputed, and taken with a warning.

    Raises:
        ModelError: as of `weights_id`.
    """
    if not is_by_sample(identity):
        return identity != UNKNOWN and weights_id(model) == identity
    if _identity(model, id_by_sample) != identity:
        return False
    told = _told.setdefault(unwrap(model), set())
    if identity not in told:  # a run applies a plan many times
        told.add(identity)
        warnings.warn(
            f"{what} was saved by an earlier version, which names weights by a sample of their bytes: it "
            "agrees, which does not prove that every byte does; make it again, or save it again with "
            "weights_id=steersman.weights_id(model), to have the proof from then on",
            stacklevel=2,
        )
    return True


def identify_by_files(model: PreTrainedModel) -> None:
    """Let a model whose weights were never loaded (all on the meta device) have the id of the checkpoint that
    it names.

    Raises:
        ModelError: its files are not at hand, or hold none of its tensors.
    """
    files = _files_of(model)
    stored = [tensor for file in files for tensor in stored_tensors(file)]
    shapes = {tensor.name: tensor.shape for tensor in stored}
    own = model.state_dict()
    # GGUF has names of its own for tensors.
    fits = GGUF in model.__dict__ or any(
        shapes.get(key) == tuple(tensor.shape) for key, tensor in own.items()
    )
    if not fits or not stored or any(not tensor.is_meta for tensor in own.values()):
        raise ModelError(f"{_checkpoint_name(model)[0]}: its safetensors files are not at hand")
    _known[model] = _Known((_state_of_memory(model, {}), _stamps(files)), stored)


@dataclass
class _Known:
    """What was found of a model in a state: the files' tensors where they are its weights, and its ids by how
    they are made. Tensors in memory are not held on to.
    """

    state: object
    stored: list[StoredTensor] | None
    ids: dict[Callable[..., str], str] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""Of which ids by sample it was said that they prove little."""


def _identity(model: nn.Module, made: Callable[[Sequence[TensorBytes]], str]) -> str:
    plain = unwrap(model)
    files = _files_of(plain)
    adapters = adapter_tensors(model)
    state = (_state_of_memory(plain, adapters), _stamps(files))
    known = _known.get(plain)
    if known is None or known.state != state:
        stored = [tensor for file in files for tensor in stored_tensors(file)]
        known = _Known(state, stored if stored and _agrees(plain, stored) else None)
    if made not in known.ids:
        identity = made(_in_memory(plain) if known.stored is None else known.stored)
        known.ids[made] = _with_adapters(identity, adapters, made) if adapters else identity
    _known[plain] = known
    return known.ids[made]


def model_name(model: nn.Module) -> tuple[str, str | None]:
    """The name that a model goes by in artifacts ('' if none), and the Hub's commit if there is one.

    That is the name or folder it was loaded from; for a model of the lab the lab's own name, and for one from
    a GGUF file that file.
    """
    plain = unwrap(model)
    name, revision = _checkpoint_name(plain)
    return getattr(plain, NAME, name), revision


def _checkpoint_name(model: nn.Module) -> tuple[str, str | None]:
    config = getattr(model, "config", None)
    name = getattr(config, "name_or_path", "") or ""
    return str(name), getattr(config, "_commit_hash", None)


# ---------------------------------------------------------------- checkpoint files


def _files_of(model: nn.Module) -> list[Path]:
    """The files of the checkpoint a model names, if they are all at hand."""
    gguf = getattr(model, GGUF, None)
    return checkpoint_files(*_checkpoint_name(model)) if gguf is None else [gguf.file.path]


def _stamps(files: list[Path]) -> tuple[object, ...]:
    return tuple((str(file), *stamp(file)) for file in files)


def _agrees(model: nn.Module, stored: list[StoredTensor]) -> bool:
    """Whether the weights in memory are those of the files, judged by a few values of each stored tensor.

    A model built from a checkpoint's *configuration* names the checkpoint too, but has other weights.
    """
    if (gguf := getattr(model, GGUF, None)) is not None:
        return bool(gguf.agrees(model))
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
    for offset, count in windows(stored.size):
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


def _in_memory(model: nn.Module) -> list[TensorBytes]:
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
    return [_MemoryTensor(name, tensor) for name, tensor in _as_saved(model, tensors).items()]


def _with_adapters(
    identity: str, adapters: Mapping[str, Tensor | str], made: Callable[[Sequence[TensorBytes]], str]
) -> str:
    """The id of a model with active adapters: they are weights too."""
    tensors = [
        _MemoryTensor(name, local(value)) for name, value in adapters.items() if isinstance(value, Tensor)
    ]
    settings = {name: value for name, value in adapters.items() if isinstance(value, str)}
    digest = hashlib.sha256(f"{identity}\0{sorted(settings.items())}\0".encode())
    digest.update(made(tensors).encode())
    scheme, colon, _ = identity.rpartition(":")
    return f"{scheme}{colon}{digest.hexdigest()}"


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


class _MemoryTensor:
    """A tensor in memory, as a run of bytes."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.dtype = _CODES.get(tensor.dtype, str(tensor.dtype))
        self.shape = tuple(tensor.shape)
        self.size = tensor.numel() * tensor.element_size()
        self._flat = tensor.detach().reshape(-1)

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` within the tensor, both multiples of an element's."""
        size = self._flat.element_size()
        part = self._flat[offset // size : (offset + count) // size].cpu().contiguous()
        return part.view(torch.uint8).numpy().tobytes()
