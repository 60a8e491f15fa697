"""Taking the place of a module's method for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Restore = Callable[[], None]


def replace_method(module: nn.Module, name: str, wrapper: Callable[..., Any]) -> Restore:
    """Put `wrapper(original, *args, **kwargs)` in place of a module's method; the result puts the previous
    one back.
    """
    missing = object()
    previous = module.__dict__.get(name, missing)
    original = getattr(module, name)

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    module.__dict__[name] = replaced

    def restore() -> None:
        if module.__dict__.get(name) is not replaced:
            return  # wrapped again by someone else since: ours lets everything through now
        if previous is missing:
            del module.__dict__[name]
        else:
            module.__dict__[name] = previous

    return restore
