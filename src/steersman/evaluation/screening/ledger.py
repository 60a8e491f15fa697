"""What has been measured so far, kept by name: so that a run that was stopped goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steersman.errors import ArtifactError
from steersman.progress import Arrays, Progress

UNIT = "screen"


class Finished:
    """Measurements by name. `done` counts them."""

    def __init__(self, values: Mapping[str, np.ndarray[Any, Any]] | None = None) -> None:
        self.values: dict[str, np.ndarray[Any, Any]] = dict(values or {})

    def to_tensors(self) -> tuple[Arrays, dict[str, Any]]:
        """Arrays under their places, and the names in that order."""
        arrays = {str(place): value for place, value in enumerate(self.values.values())}
        return arrays, {"done": len(self.values), "names": list(self.values)}

    @classmethod
    def read(cls, arrays: Arrays, facts: dict[str, Any]) -> Finished:
        """What `to_tensors` gave. Raises ArtifactError where it is not that."""
        names = facts["names"]
        if not isinstance(names, list) or sorted(arrays) != sorted(map(str, range(len(names)))):
            raise ArtifactError("the progress of a screen does not say what its numbers are")
        return cls({str(name): arrays[str(place)] for place, name in enumerate(names)})


class Ledger:
    """Gives each measurement once: made now, or taken from a saved run.

    Args:
        checkpoint: A folder to save in; None: nowhere.
        run: What is being run: another's progress is refused.
        resume: Go on from what is saved there; otherwise that is an error.

    Raises:
        ArtifactError: as of `steersman.progress.Progress`.
    """

    def __init__(self, checkpoint: str | Path | None, run: Mapping[str, Any], *, resume: bool) -> None:
        self._saved = None if checkpoint is None else Progress(checkpoint, run, Finished.read, resume=resume)
        before = {} if self._saved is None else self._saved.saved
        self._finished = before.get(UNIT, Finished())
        self.taken = 0
        """Measurements that were taken from a saved run."""

    def remember(self, name: str, work: Callable[[], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """The measurement of this name; `work` makes it where it is not there yet."""
        known = self._finished.values.get(name)
        if known is not None:
            self.taken += 1
            return known
        found = self._finished.values[name] = work()
        self.save()
        return found

    def save(self, *, at_once: bool = False) -> None:
        """Save what is there, unless the last time is too recent."""
        if self._saved is not None:
            self._saved.save({UNIT: self._finished}, at_once=at_once)
