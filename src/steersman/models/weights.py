"""The tensors that a model runs with, under the names it would save them by, wherever they are: in memory,
offloaded by accelerate, sharded over processes, under adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from steersman.models.adapters import own_name, unwrap, wrappers_in


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state without its adapters, offloaded tensors as they are kept; those that cannot be reached
    stay meta.

    Offloaded ones may lie in files: they are mapped into memory, not copied.
    """
    plain = unwrap(model)
    wrappers = wrappers_in(plain)
    state: dict[str, Tensor] = {}
    for name, tensor in plain.state_dict().items():
        own = own_name(name.replace("_orig_mod.", ""), wrappers)  # of parts that are compiled
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
