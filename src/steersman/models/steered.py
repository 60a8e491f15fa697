"""A module's forward, run under the plan of the running pass: what all levers' sites have in common."""

from __future__ import annotations

import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from steersman.errors import SteeringNotApplied
from steersman.models.program import Pass, Site, site_name
from steersman.models.replacing import of_class

Current = Callable[[], Pass | None]
"""Gives the running pass of this thread; None where it is unsteered."""

S = TypeVar("S", bound="SteeredModule")


class SteeredModule(ABC):
    """Takes the place of a module's forward.

    There is one for each module, kept from block to block: compiled code holds on to the function it was made
    with (`steered`).
    """

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._previous: Any = None
        self._ask: Current = _nobody

        is_compiling = torch.compiler.is_compiling

        def forward(own: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if own is not self._module:
                return of_class(own, "forward")(*args, **kwargs)  # a copy of the module
            if is_compiling():
                return self._run_compiled(args, kwargs)
            return self._run(args, kwargs)

        self._forward = forward

    @property
    def in_use(self) -> bool:
        """Whether it is attached, or someone's wrapper still calls it."""
        return self._module is not None

    def _attach(self, module: nn.Module, key: Site, current: Current) -> None:
        self._ask = current
        self._module = module
        self._key: Site = key
        self._previous = module.__dict__.get("forward")
        self._original: Callable[..., Any] = module.forward
        self._installed = module.__dict__["forward"] = types.MethodType(self._forward, module)

    def detach(self) -> None:
        """Put the previous forward back."""
        self._ask = _nobody
        module = self._module
        if module is None or module.__dict__.get("forward") is not self._installed:
            return  # wrapped again by someone else since: this one lets everything through now
        if self._previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = self._previous
        self._module = self._previous = None
        del self._original, self._installed  # they hold the module: unused, they must not keep it alive
        self._release()

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running = self._ask()
        if running is None:
            return self._original(*args, **kwargs)
        try:
            edit = running.layout.edits[self._key]
        except KeyError:
            edit = running.layout.edits[self._key] = self._find_edit(running, args, kwargs)
        if edit is None:
            output = self._original(*args, **kwargs)
        elif self._key in running.ran:
            raise SteeringNotApplied(
                f"{site_name(self._key)} runs twice in one forward: it cannot be steered"
            )
        else:
            output = self._steer(running, edit, args, kwargs)
        running.ran.add(self._key)
        return output

    def _find_edit(self, running: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._key not in running.program.sites:
            return None
        given = args[0] if args else next(iter(kwargs.values()))
        return self._edit_of(running, given.device)

    @abstractmethod
    def _release(self) -> None:
        """Let go of what belongs to the module."""

    @abstractmethod
    def _edit_of(self, running: Pass, device: torch.device) -> Any:
        """What holds for the tokens of a forward; None: nothing, as far as the host can tell."""

    @abstractmethod
    def _steer(self, running: Pass, edit: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output under an edit."""

    @abstractmethod
    def _run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output in code that is being compiled."""


def steered(module: nn.Module, kind: type[S], known: weakref.WeakKeyDictionary[nn.Module, S]) -> S:
    """The one that steers a module, among those known of a lever; a new one where it is in use."""
    found = known.get(module)
    if found is None or found.in_use:
        found = known[module] = kind()
    return found


def outside_of_forward(what: str) -> SteeringNotApplied:
    """The error of a site in compiled code that no forward of the model has laid out a plan for."""
    return SteeringNotApplied(
        f"compiled code runs a steered {what} outside of a forward of the compiled model: compile the "
        "model itself (torch.compile(model) or model.compile()), before the block"
    )


def _nobody() -> Pass | None:
    return None
