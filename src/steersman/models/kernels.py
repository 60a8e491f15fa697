"""Kernels that run in the place of modules, and leave out the routers inside: those of the kernels package
(`use_kernels=True`) and GPT-OSS's for MXFP4 weights.
"""

from __future__ import annotations

from types import MethodType

from torch import nn

_MXFP4 = "transformers.integrations.mxfp4"


def kernel_around(layer: nn.Module, router: nn.Module) -> str | None:
    """Why a router may never run: the kernel in the place of a module around it; None where there is none."""
    for module in layer.modules():
        if module is router or (kernel := _kernel_of(module)) is None:
            continue
        if any(inside is router for inside in module.modules()):
            cure = "Mxfp4Config(dequantize=True)" if _is_mxfp4(module) else "use_kernels=False"
            return (
                f"a kernel runs in its place ({kernel} in the place of {type(module).__name__}): "
                f"load the model with {cure}"
            )
    return None


def _kernel_of(module: nn.Module) -> str | None:
    """The name of what runs as a module's forward, where that is a kernel's."""
    own = module.__dict__.get("forward")
    if isinstance(own, MethodType) and own.__self__ is module and own.__func__ is not type(module).forward:
        if hasattr(type(module), "kernel_layer_name") or own.__func__.__module__ == _MXFP4:
            return own.__func__.__qualname__.removesuffix(".forward")  # bound by `kernelize`, or as it does
        return None
    # Under expert parallelism it lets the router choose.
    hooked = getattr(getattr(module, "experts", None), "_is_hooked", False)
    return "MXFP4 routing" if _is_mxfp4(module) and own is None and not hooked else None


def _is_mxfp4(module: nn.Module) -> bool:
    """Whether a module is an MoE block for MXFP4 weights, by its class or by what is bound to it."""
    own = module.__dict__.get("forward")
    bound = isinstance(own, MethodType) and own.__func__.__module__ == _MXFP4
    return bound or (type(module).__module__ == _MXFP4 and hasattr(module, "router"))
