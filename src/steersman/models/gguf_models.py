"""Models in GGUF files: how one is named, whether transformers reads it as it is meant, and what was loaded.

transformers dequantises such a file into an ordinary model. What it cannot read it leaves out, of the rotary
embedding for one: so what a file says is compared with the configuration that came of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    GGUF_TO_TRANSFORMERS_MAPPING,
)

from steersman.errors import ModelError
from steersman.models.adapters import unwrap
from steersman.models.digests import windows
from steersman.models.stored_tensors import GgufFile, checkpoint_file, read_gguf
from steersman.models.weights import is_sharded, local, own_tensors

GGUF = "steersman_gguf"
"""Attribute of a model that was loaded from a GGUF file: what of it, as `Dequantised`."""

_READ = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})
_PLAIN_NUMBERS = {"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"}
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


class GgufName(NamedTuple):
    """A model named by a GGUF file: the folder or the name on the Hub, and the file in it."""

    place: str
    file: str


def gguf_name(name: str) -> GgufName | None:
    """`FILE.gguf`, `FOLDER#FILE.gguf` or, on the Hub, `NAME#FILE.gguf`; None for another name of a model.

    Raises ModelError for another file behind #, and for a file that is not there.
    """
    path = Path(name)
    try:
        if path.is_dir():
            return None
        here = path.exists() or path.is_symlink()
    except OSError:  # a name that no file system takes
        return None
    place, hash_, file = name.partition("#")
    if hash_ and not here:
        if not place or not file.lower().endswith(".gguf"):
            raise ModelError(f"{name}: right behind # is a GGUF file of the folder, as in FOLDER#FILE.gguf")
        return GgufName(place, file)
    if not name.lower().endswith(".gguf"):
        return None
    if not here:
        raise ModelError(f"{name}: no such file")
    return GgufName(str(path.parent), path.name)


def readable(found: GgufName, revision: str | None) -> GgufFile | None:
    """The file, where it is at hand; None where it has to be downloaded first.

    Raises:
        ModelError: it is damaged, or is no model that transformers reads.
    """
    path = checkpoint_file(found.place, revision, found.file)
    if path is None:
        if Path(found.place).is_dir() or found.place.startswith((".", "/", "~")):
            raise ModelError(f"{Path(found.place) / found.file}: no such file")
        return None
    file = read_gguf(path)
    part = _PART.search(path.name)
    if part is not None and int(part[2]) > 1:
        raise ModelError(
            f"{path}: is part {int(part[1])} of {int(part[2])}, and transformers reads a GGUF file in one "
            "piece: put them together with llama-gguf-split --merge"
        )
    architecture = file.metadata.get("general.architecture")
    if architecture == "controlvector":
        raise ModelError(f"{path}: is a control vector and no model; steersman import reads it")
    if _plain(architecture) not in map(_plain, _READ):
        raise ModelError(
            f"{path}: has the architecture {str(architecture)[:40]!r}, which transformers does not read from "
            f"GGUF; it reads {', '.join(_READ)}"
        )
    return file


def _plain(architecture: object) -> str:
    """An architecture's name without signs: llama.cpp writes qwen3moe and gpt-oss, transformers qwen3_moe."""
    return str(architecture).replace("_", "").replace("-", "")


def check_read(file: GgufFile, config: PretrainedConfig) -> None:
    """Raise ModelError where a configuration that transformers made of a file lacks what the file says."""
    said = file.metadata.get(f"{file.metadata['general.architecture']}.rope.scaling.type", "none")
    factors = [tensor.name for tensor in file.tensors if tensor.name.startswith("rope_")]
    if (said in ("none", "") and not factors) or _scales(config):
        return
    what = f"the tensor {factors[0]}" if factors else f"rope.scaling.type {said!r}"
    raise ModelError(
        f"{file.path}: scales its rotary embedding ({what}), which transformers does not read from GGUF: it "
        "would be another model; open the checkpoint that the file was made from"
    )


def _scales(config: PretrainedConfig) -> bool:
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return rope.get("rope_type", rope.get("type", "default")) not in ("default", None)


@dataclass(frozen=True)
class Dequantised:
    """A GGUF file that a model was loaded from, and a sample of the numbers that came of it."""

    file: GgufFile
    samples: dict[str, Tensor]

    @classmethod
    def of(cls, file: GgufFile, model: nn.Module) -> Dequantised:
        """What is in memory now; nothing of a model without weights."""
        return cls(file, {name: _sample(tensor) for name, tensor in _compared(model).items()})

    def agrees(self, model: nn.Module) -> bool:
        """Whether a model's numbers are still those that were loaded, whatever dtype they have now."""
        now = _compared(model)
        return bool(now.keys() & self.samples.keys()) and all(
            torch.equal(self.samples[name].to(tensor.dtype), _sample(tensor))
            for name, tensor in now.items()
            if name in self.samples
        )

    @property
    def types(self) -> list[str]:
        """The quantised formats in the file, those of most tensors first."""
        names = [tensor.dtype for tensor in self.file.tensors if tensor.dtype not in _PLAIN_NUMBERS]
        return sorted(set(names), key=lambda name: (-names.count(name), name))

    @property
    def not_read(self) -> list[str]:
        """Settings of the architecture in the file that transformers takes nothing from."""
        architecture = self.file.metadata["general.architecture"]
        read: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
        known = {
            f"{architecture}.{setting}"
            for name, settings in read.items()
            if _plain(name) == _plain(architecture)
            for setting in settings
        }
        said = (key for key in self.file.metadata if key.startswith(f"{architecture}."))
        return sorted(key for key in said if key not in known)


def dequantised(model: nn.Module) -> dict[str, Any] | None:
    """{"from": [quantised format, …], "to": dtype, "not_read": [setting of the file, …]} of a model that
    was loaded from a GGUF file; None of another.
    """
    loaded: Dequantised | None = getattr(unwrap(model), GGUF, None)
    if loaded is None:
        return None
    dtype = next(unwrap(model).parameters()).dtype
    name = str(dtype).removeprefix("torch.")
    return {"from": loaded.types, "to": name, "not_read": loaded.not_read}


def _compared(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in own_tensors(model).items()
        if not tensor.is_meta and tensor.is_floating_point() and not is_sharded(tensor)
    }


def _sample(tensor: Tensor) -> Tensor:
    flat = local(tensor).detach().reshape(-1)
    return torch.cat([flat[start : start + count] for start, count in windows(flat.numel())]).cpu()
