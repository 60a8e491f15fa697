"""The plans that an engine starts with: opened, checked against its model, registered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from steersman.artifacts import load_steering
from steersman.errors import SteersmanError
from steersman.steering import Steering
from steersman.vllm.dtypes import Dtypes
from steersman.vllm.registry import Registry
from steersman.vllm.settings import Settings


def first_plan(name: str, folder: str) -> Steering:
    """Open one of the plans that an engine starts with."""
    try:
        return load_steering(folder)
    except SteersmanError as error:
        raise type(error)(f"steering {name!r}: {error}") from None


def first_plans(settings: Settings) -> dict[str, Steering]:
    """All plans that an engine starts with, in the order of their slots."""
    return {name: first_plan(name, folder) for name, folder in settings.steerings.items()}


def first_registry(
    settings: Settings, check: Callable[[Steering], None], dtypes: Dtypes | None = None
) -> Registry:
    """A register of the plans that an engine is configured with.

    Args:
        settings: The operator's.
        check: Raises where a plan is not for the served model.
        dtypes: Those of the engine and of its model's checkpoint.

    Raises:
        ServingError, RequestError, ArtifactError, ArchitectureMismatch, WeightsMismatch: a plan, the default
            or an alias cannot be served.
    """
    registry = Registry(settings, check, dtypes)
    for name, steering in first_plans(settings).items():
        try:
            slot = registry.reserve(steering)
        except SteersmanError as error:
            raise type(error)(f"steering {name!r}: {error}") from None
        registry.publish(name, slot, steering, str(Path(settings.steerings[name])))
    for given in (settings.default, *settings.aliases.values()):
        if given is not None:
            registry.resolve(given)
    return registry
