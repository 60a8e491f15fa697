"""PEFT's wrappers: around a model, around its layers; and what its active adapters add."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from steersman.errors import ModelError

_WRAPPED = ("base_layer", "original_module")
"""Attributes by which PEFT's wrappers hold the module that they wrap."""


def check_module(model: Any) -> None:
    """Raise ModelError where something else is given than a model, such as its name."""
    if not isinstance(model, nn.Module):
        given = model if isinstance(model, str) else type(model).__name__
        raise ModelError(
            f"a model is wanted, not {given!r}: load it first, with model, tokenizer = load_model(NAME), and "
            "give the model"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT or torch.compile wrapper; any other model as it is."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) and not isinstance(model, PreTrainedModel) else model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor | str]:
    """What active adapters (LoRA and others by PEFT) add to a model's own tensors: their tensors by name, and
    their settings as text. Merged and disabled ones add nothing.
    """
    plain = unwrap(model)
    found: dict[str, Tensor | str] = {}
    for path, layer in wrappers_in(plain).items():
        for adapter in _active(layer):
            for name, value in _parts(layer, adapter):
                found[f"{path}.{name}"] = value
    if plain is not model:
        found.update(_virtual_tokens(model))
    return found


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that change what a model computes."""
    names = {adapter for layer in wrappers_in(unwrap(model)).values() for adapter in _active(layer)}
    return sorted(names | ({"prompt tokens"} if _virtual_tokens(model) else set()))


def wrappers_in(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's wrappers around layers, by their path. There can be none where PEFT was never imported."""
    if "peft" not in sys.modules:
        return {}
    return {
        path.replace("_orig_mod.", ""): module
        for path, module in model.named_modules()
        if hasattr(module, "adapter_layer_names") and _inner(module) is not None
    }


def _inner(wrapper: nn.Module) -> str | None:
    """By which attribute a wrapper holds the module that it wraps."""
    return next((name for name in _WRAPPED if name in wrapper._modules), None)


def is_adapted(layer: nn.Module, name: str) -> bool:
    """Whether an adapter is on the module of this name in a layer, around it, or in it outside of experts."""
    return any(
        f"{name}.".startswith(f"{path}.")
        or (path.startswith(f"{name}.") and "experts" not in path.removeprefix(name).split("."))
        for path in wrappers_in(layer)
    )


def own_name(name: str, wrappers: Mapping[str, nn.Module]) -> str | None:
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
