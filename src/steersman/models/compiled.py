"""Compiled models: where one enters their code, and whether there is any.

Compiled code cannot ask which plan a thread follows. So the plan is laid out where that code reads it, on the
way in: outside of it, on every call.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule


def compiled_entrances(model: nn.Module, decoder: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, attribute) of every compiled callable through which the decoder runs, the decoder's own
    included.
    """
    for module in model.modules():
        if all(inside is not decoder for inside in module.modules()):
            continue
        if isinstance(module, OptimizedModule):
            yield module, "forward"
        elif getattr(module, "_compiled_call_impl", None) is not None:
            yield module, "_compiled_call_impl"
        if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            yield module, "forward"


def holds_compiled_code(model: nn.Module) -> bool:
    """Whether any part of a model is compiled."""
    return any(
        isinstance(module, OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )
