"""Kernels that run in the place of modules (`use_kernels=True`, the kernels package)."""

from __future__ import annotations

from types import MethodType

from torch import nn


def kernel_around(layer: nn.Module, router: nn.Module) -> str | None:
    """The kernel that runs in the place of a module around a router, so that the router itself may never
    run; None where there is none.
    """
    for module in layer.modules():
        if module is router or (kernel := _kernel_of(module)) is None:
            continue
        if any(inside is router for inside in module.modules()):
            return f"{kernel} in the place of {type(module).__name__}"
    return None


def _kernel_of(module: nn.Module) -> str | None:
    """The name of the kernel layer whose forward `kernelize` has bound to a module."""
    own = module.__dict__.get("forward")
    if not hasattr(type(module), "kernel_layer_name") or not isinstance(own, MethodType):
        return None
    if own.__self__ is not module or own.__func__ is type(module).forward:
        return None
    return own.__func__.__qualname__.removesuffix(".forward")
