"""Taking the place of a module's method for a while."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Restore = Callable[[], None]
Wrapper = Callable[..., Any]
"""(original, *args, **kwargs) → what the method returns"""

_stand_ins: weakref.WeakKeyDictionary[nn.Module, dict[str, StandIn]] = weakref.WeakKeyDictionary()
"""Compiled code holds on to the functions it was made with, so a method keeps its own from block to block."""


class StandIn:
    """A function in place of a module's method; compiled code goes through it to the original."""

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._original: Callable[..., Any] | None = None
        self._wrapper: Wrapper = _pass_on

        def function(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return self._original(*args, **kwargs)  # type: ignore[misc]
            return self._wrapper(self._original, *args, **kwargs)

        self._function = function

    @property
    def in_use(self) -> bool:
        """Whether it stands in for a method, or someone's wrapper still calls it."""
        return self._module is not None

    def attach(self, module: nn.Module, name: str, wrapper: Wrapper) -> Restore:
        """Take the place of a method; the result puts the previous one back."""
        missing = object()
        previous = module.__dict__.get(name, missing)
        self._module, self._original, self._wrapper = module, getattr(module, name), wrapper
        functools.update_wrapper(self._function, self._original)
        module.__dict__[name] = self._function

        def restore() -> None:
            self._wrapper = _pass_on
            if module.__dict__.get(name) is not self._function:
                return  # wrapped again by someone else since: this one lets everything through now
            if previous is missing:
                del module.__dict__[name]
            else:
                module.__dict__[name] = previous
            del self._function.__wrapped__
            self._module = self._original = None

        return restore


def replace_method(module: nn.Module, name: str, wrapper: Wrapper) -> Restore:
    """Put `wrapper(original, *args, **kwargs)` in place of a module's method; the result puts the previous
    one back.
    """
    known = _stand_ins.setdefault(module, {})
    if name not in known or known[name].in_use:
        known[name] = StandIn()
    return known[name].attach(module, name, wrapper)


def _pass_on(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)
