"""Taking the place of a module's method for a while."""

from __future__ import annotations

import functools
import inspect
import types
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
    """A function in place of a module's method; compiled code goes through it to the original.

    It is bound to its module, so that a copy of the module gets a method of its own, which is not replaced.
    """

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._original: Callable[..., Any] | None = None
        self._wrapper: Wrapper = _pass_on
        self._name = ""

        def function(own: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if own is not self._module or self._original is None:
                return of_class(own, self._name)(*args, **kwargs)
            if torch.compiler.is_compiling():
                return self._original(*args, **kwargs)
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
        self._name = name
        functools.update_wrapper(self._function, self._original)
        self._function.__signature__ = _with_self(self._original)  # type: ignore[attr-defined]
        del self._function.__wrapped__  # type: ignore[attr-defined]
        installed = module.__dict__[name] = types.MethodType(self._function, module)

        def restore() -> None:
            self._wrapper = _pass_on
            if module.__dict__.get(name) is not installed:
                return  # wrapped again by someone else since: this one lets everything through now
            if previous is missing:
                del module.__dict__[name]
            else:
                module.__dict__[name] = previous
            self._module = self._original = None

        return restore


def _with_self(method: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function that is a method once it is bound: transformers reads which arguments a
    forward takes.
    """
    signature = inspect.signature(method)
    own = inspect.Parameter("own", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[own, *signature.parameters.values()])


def of_class(module: nn.Module, name: str) -> Callable[..., Any]:
    """A method of a module as its class has it."""
    method: Callable[..., Any] = getattr(type(module), name).__get__(module)
    return method


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
