"""The tensors that a model runs with, under the names it would save them by, wherever they are: in memory,
offloaded by accelerate, sharded over processes, under adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

_WRAPPED = ("base_layer", "original_module")
"""Attributes by which PEFT's wrappers hold the module that they wrap."""


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT or torch.compile wrapper; any other model as it is."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) and not isinstance(model, PreTrainedModel) else model


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state without its adapters, offloaded tensors as they are kept; those that cannot be reached
    stay meta.

    Offloaded ones may lie in files: they are mapped into memory, not copied.
    """
    plain = unwrap(model)
    wrappers = _wrappers(plain)
    state: dict[str, Tensor] = {}
    for name, tensor in plain.state_dict().items():
        own = _own_name(name.replace("_orig_mod.", ""), wrappers)  # of parts that are compiled
        if own is not None and isinstance(tensor, Tensor):  # bitsandbytes keeps a few words there too
            state[own] = _offloaded(plain, name) if tensor.is_meta else tensor
    return state


def tied_names(model: nn.Module, state: Mapping[str, Tensor]) -> set[str]:
    """Names in a model's state that stand for another one's tensor, and are not saved."""
    tied = getattr(unwrap(model), "all_tied_weights_keys", None) or {}
    return {name for name, source in tied.items() if name in state and source in state}


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor (tensor, expert or data parallel)."""
    placements = getattr(tensor, "placements", None)
    return placements is not None and not all(placement.is_replicate() for placement in placements)


def local(tensor: Tensor) -> Tensor:
    """A tensor as this process holds it: of a sharded one its part, any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor


def first_index(tensor: Any) -> tuple[int, ...] | None:
    """Where in a sharded tensor this process's part begins; None where it is not one contiguous part."""
    from torch.distributed.tensor import Replicate, Shard  # not in every build of torch
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(type(placement) not in (Shard, Replicate) for placement in tensor.placements):
        return None
    _, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(start)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor | str]:
    """What active adapters (LoRA and others by PEFT) add to a model's own tensors: their tensors by name, and
    their settings as text. Merged and disabled ones add nothing.
    """
    plain = unwrap(model)
    found: dict[str, Tensor | str] = {}
    for path, layer in _wrappers(plain).items():
        for adapter in _active(layer):
            for name, value in _parts(layer, adapter):
                found[f"{path}.{name}"] = value
    if plain is not model:
        found.update(_virtual_tokens(model))
    return found


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that change what a model computes."""
    names = {adapter for layer in _wrappers(unwrap(model)).values() for adapter in _active(layer)}
    return sorted(names | ({"prompt tokens"} if _virtual_tokens(model) else set()))


# ---------------------------------------------------------------- offloaded tensors


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """The tensor that accelerate keeps for a name and brings in when its module runs; else the meta one."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    hook = getattr(module, "_hf_hook", None)
    for candidate in (hook, *getattr(hook, "hooks", ())):
        kept = getattr(candidate, "weights_map", None)
        if kept is None:
            continue
        try:
            tensor = kept[attribute]
        except KeyError:
            continue
        if isinstance(tensor, Tensor):
            return tensor
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    return state[attribute]


# ---------------------------------------------------------------- adapters


def _wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's wrappers around layers, by their path. There can be none where PEFT was never imported."""
    if "peft" not in sys.modules:
        return {}
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "adapter_layer_names") and _inner(module) is not None
    }


def _inner(wrapper: nn.Module) -> str | None:
    """By which attribute a wrapper holds the module that it wraps."""
    return next((name for name in _WRAPPED if name in wrapper._modules), None)


def _own_name(name: str, wrappers: Mapping[str, nn.Module]) -> str | None:
    """The name of a tensor without the wrappers around it; None for an adapter's."""
    if not wrappers:
        return name
    parts = name.split(".")
    own: list[str] = []
    for place, part in enumerate(parts):
        wrapper = wrappers.get(".".join(parts[:place]))
        if wrapper is None:
            own.append(part)
        elif part != _inner(wrapper):
            return None
    return ".".join(own)


def _active(wrapper: nn.Module) -> list[str]:
    if getattr(wrapper, "disable_adapters", False):
        return []
    merged = getattr(wrapper, "merged_adapters", [])
    return [adapter for adapter in getattr(wrapper, "active_adapters", []) if adapter not in merged]


def _parts(wrapper: Any, adapter: str) -> Iterator[tuple[str, Tensor | str]]:
    """The tensors and the settings (rank, scaling …) of one adapter in one wrapper."""
    inner = _inner(wrapper)
    names = (*wrapper._modules, *wrapper.adapter_layer_names, *wrapper.other_param_names)
    for name in dict.fromkeys(name for name in names if name != inner):
        held = getattr(wrapper, name, None)
        if not isinstance(held, dict | nn.ModuleDict | nn.ParameterDict) or adapter not in held:
            continue
        value = held[adapter]
        if isinstance(value, nn.Module):
            yield from ((f"{name}.{key}", tensor) for key, tensor in value.state_dict().items())
        elif isinstance(value, Tensor):
            yield name, value.detach()
        elif isinstance(value, bool | int | float | str):
            yield name, repr(value)


def _virtual_tokens(model: nn.Module) -> dict[str, Tensor | str]:
    """The tensors of prompt tuning and its like, which put learned tokens before the prompt."""
    encoders = getattr(model, "prompt_encoder", None)
    if not isinstance(encoders, nn.ModuleDict) or getattr(model, "_adapters_disabled", False):
        return {}
    active = getattr(model, "active_adapter", "default")
    if active not in encoders:
        return {}
    return {f"prompt_encoder.{key}": tensor for key, tensor in encoders[active].state_dict().items()}
