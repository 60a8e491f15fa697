"""What `steersman serve` is asked for, checked before an engine is started: model, plans, names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from steersman.errors import ServingError
from steersman.vllm.first_plans import first_registry
from steersman.vllm.registry import Registry
from steersman.vllm.serveable import folder_of
from steersman.vllm.served import checker
from steersman.vllm.server.admin_key import VARIABLE
from steersman.vllm.settings import KEY, Settings, read_settings


@dataclass(frozen=True)
class Serving:
    """A model that is going to be served.

    Attributes:
        model: What the user calls it.
        folder: Where the engine finds it: a folder, or a name on the Hub.
        settings: How it is steered.
        registry: Its plans, opened and checked.
        options: Those of the engine's server.
        revision: Branch, tag or commit on the Hub.
    """

    model: str
    folder: str
    settings: Settings
    registry: Registry
    options: tuple[str, ...] = ()
    revision: str | None = None

    def configured(self) -> dict[str, Any]:
        """The settings as the engine's additional configuration."""
        given = self.settings
        return {
            "steerings": dict(given.steerings),
            "default": given.default,
            "aliases": dict(given.aliases),
            "strengths": list(given.strengths),
            "sites": given.sites,
            "max_steerings": given.max_steerings,
            "max_vectors": given.max_vectors,
            "max_per_request": given.max_per_request,
            "match": given.match,
            "count": given.count,
        }


def prepare(
    model: str,
    settings: Mapping[str, Any],
    options: tuple[str, ...] = (),
    revision: str | None = None,
) -> Serving:
    """Open all that is to be served, but not the weights.

    Args:
        model: A folder, a name on the Hub, or `lab:NAME[@SEED]`.
        settings: Those of `Settings`.
        options: Of the engine's server.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ServingError, RequestError, ArtifactError, ModelError, ArchitectureMismatch, WeightsMismatch:
            something cannot be served, and why.
    """
    folder = folder_of(model)
    steerings = {name: _absolute(path) for name, path in dict(settings.get("steerings", {})).items()}
    read = read_settings({KEY: {**settings, "steerings": steerings}})
    if read is None:
        raise ServingError("there are no settings")
    if not read.active:
        raise ServingError("nothing could be steered: give a --steering NAME=FOLDER, or --sites all")
    described = SimpleNamespace(model=folder, revision=revision)
    return Serving(
        model, folder, read, first_registry(read, checker(described, read.match)), options, revision
    )


def _absolute(path: str) -> str:
    """A folder's full path, for the engine's processes; a name on the Hub stays."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def take_admin_key(variable: str | None) -> bool:
    """Take the operator's key from another environment variable; whether there is one.

    Raises:
        ServingError: the variable is not set.
    """
    if variable is not None:
        if not os.environ.get(variable):
            raise ServingError(f"--admin-key-env {variable}: there is no such environment variable")
        os.environ[VARIABLE] = os.environ[variable]
    return bool(os.environ.get(VARIABLE))
