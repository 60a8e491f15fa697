"""Progress of a long run on disk: enough to go on after a kill as if there had been none.

A folder with manifest.json (what is being run, how far it is, sha256 of the tensors and of itself) and
one file of tensors. A save writes a new tensors file, then puts the manifest that names it in place, then
removes the old one: whenever the process dies, the folder holds one complete state. A run may keep a file of
states beside them (`concepts.state_file`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from steersman.chat_record import CHATS, rendered_otherwise
from steersman.errors import ArtifactError, valid_name
from steersman.steering import canonical_json, sha256_of

FORMAT, FORMAT_VERSION = "steersman-progress", 2
MANIFEST = "manifest.json"
_KEYS = {"format", "format_version", "run", "states", "tensors", "tensors_sha256", "manifest_sha256"}
KEPT_STATES = "states.bin"
"""A file of a run's own, which grows; what a save says of it holds."""
_TENSORS = re.compile(r"tensors-\d+\.safetensors")
_OURS = re.compile(rf"manifest\.json(\.new)?|{_TENSORS.pattern}|{re.escape(KEPT_STATES)}")

_DAMAGE = (RecursionError, SafetensorError)

SHARE = 0.02
"""Saving takes at most this share of the time."""

NAMED, LONGEST = 6, 40
"""Settings that a message names at most, and letters of their values."""

_NOTHING = object()
_SHA256 = re.compile("[0-9a-f]{64}")


Arrays = dict[str, np.ndarray[Any, Any]]


class State(Protocol):
    """What a run has so far."""

    def to_tensors(self) -> tuple[Arrays, dict[str, Any]]:
        """All of it, as arrays and as JSON, in which "done" says how much is behind it."""
        ...


S = TypeVar("S", bound=State)


class Progress(Generic[S]):
    """The folder that a run's progress is saved in.

    Args:
        folder: Where; made at the first save.
        run: What is being run: a saved state of another run is refused.
        read: Makes a state of its arrays and JSON again.
        resume: Go on from a saved state, if there is one. Otherwise one is an error.

    Raises:
        ArtifactError: progress is there and not wanted, damaged, or another run's; or other files are.
    """

    def __init__(
        self,
        folder: str | Path,
        run: Mapping[str, Any],
        read: Callable[[Arrays, dict[str, Any]], S],
        *,
        resume: bool,
    ) -> None:
        self._folder = Path(valid_name(folder, ArtifactError))
        self._read = read
        self._run = dict(run)
        self._number = 0
        self._rest_until = 0.0
        self._saved: dict[str, S] = {}
        present = _present(self._folder)
        if MANIFEST in present:
            if not resume:
                raise _unwanted(self._folder)
            self._saved = self._load()

    @property
    def saved(self) -> Mapping[str, S]:
        """What was done before, by name; empty where nothing was."""
        return self._saved

    def save(self, states: Mapping[str, S], *, at_once: bool = False) -> None:
        """Save, unless the last time is so recent that saving would take more than its share of the time.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        start = time.monotonic()
        if start < self._rest_until and not at_once:
            return
        try:
            self._write(states)
        except OSError as error:
            raise ArtifactError(f"{self._folder}: cannot be written ({error.strerror})") from None
        end = time.monotonic()
        self._rest_until = end + (end - start) / SHARE

    def _write(self, states: Mapping[str, S]) -> None:
        tensors: Arrays = {}
        facts: dict[str, Any] = {}
        for name, state in states.items():
            more, facts[name] = state.to_tensors()
            tensors |= {f"{name}.{key}": np.ascontiguousarray(value) for key, value in more.items()}
        content = save_tensors(tensors)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._number += 1
        file = self._folder / f"tensors-{self._number}.safetensors"
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "run": self._run,
            "states": facts,
            "tensors": file.name,
            "tensors_sha256": hashlib.sha256(content).hexdigest(),
        }
        manifest["manifest_sha256"] = sha256_of(manifest)
        _write_synced(file, content)
        _write_synced(self._folder / f"{MANIFEST}.new", json.dumps(manifest, indent=1).encode())
        (self._folder / f"{MANIFEST}.new").replace(self._folder / MANIFEST)
        for other in self._folder.iterdir():
            if other.name not in (MANIFEST, KEPT_STATES, file.name) and _OURS.fullmatch(other.name):
                other.unlink()

    def _load(self) -> dict[str, S]:
        path = self._folder / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
            if manifest.get("format") == FORMAT and manifest.get("format_version") != FORMAT_VERSION:
                raise ArtifactError(
                    f"{path}: saved by another version of steersman; --force discards it and starts again"
                )
            if manifest.get("format") != FORMAT or set(manifest) != _KEYS:
                raise ArtifactError(f"{path}: not the progress of a run; --force discards it")
            claimed = manifest.pop("manifest_sha256")
            if sha256_of(manifest) != claimed or not _TENSORS.fullmatch(manifest["tensors"]):
                raise ValueError("it does not match its own sha256")
            self._check_run(manifest["run"])
            content = (self._folder / manifest["tensors"]).read_bytes()
            if hashlib.sha256(content).hexdigest() != manifest["tensors_sha256"]:
                raise ValueError("its tensors do not match their sha256")
            self._number = int(manifest["tensors"].removeprefix("tensors-").partition(".")[0])
            return self._states(load_tensors(content), manifest["states"])
        except ArtifactError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, *_DAMAGE) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"{path}: damaged ({reason}); --force discards it and starts again") from None

    def _check_run(self, saved: Mapping[str, Any]) -> None:
        if different := differences(saved, json.loads(canonical_json(self._run))):
            raise ArtifactError(
                f"{self._folder}: progress of another run, which differs in {different}; "
                "--force discards it and starts again"
            )

    def _states(self, tensors: Arrays, facts: Mapping[str, Any]) -> dict[str, S]:
        def of(name: str) -> Arrays:
            start = f"{name}."
            return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}

        return {name: self._read(of(name), of_state) for name, of_state in facts.items()}


def differences(there: Any, here: Any, form: str = "{} there, {} here") -> str:
    """Which settings of two runs differ, each with both values: "settings.random (19 there, 49 here)".

    Args:
        there: The settings of what was made before, as plain data.
        here: Those of what is being made.
        form: How the two values of one are said.

    Returns:
        At most `NAMED` of them; empty where they are alike.
    """
    # Chats that were rendered otherwise differ in their tokens too: that is why.
    if told := rendered_otherwise(there.get(CHATS), here.get(CHATS), form):
        return f"{told[0]}: give {told[1]} to go on"
    found = [f"{name} ({form.format(old, new)})" for name, old, new in _different(there, here, "")]
    more = [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
    return ", ".join([*found[:NAMED], *more])


def _different(there: Any, here: Any, name: str) -> Iterator[tuple[str, str, str]]:
    """The name and both values of each innermost setting that differs."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted({*map(str, there), *map(str, here)}):
            below = f"{name}.{key}" if name else key
            yield from _different(there.get(key, _NOTHING), here.get(key, _NOTHING), below)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for place, (old, new) in enumerate(zip(there, here, strict=True)):
            yield from _different(old, new, f"{name}[{place}]")
    elif there != here or any(isinstance(there, of) != isinstance(here, of) for of in (bool, float)):
        # To Python 1 is true, and 1.0: as JSON they are three.
        yield name, _briefly(there), _briefly(here)


def _briefly(value: Any) -> str:
    if value is _NOTHING or value is None:
        return "none"
    if isinstance(value, list | tuple | Mapping):
        text = json.dumps(value, ensure_ascii=False, default=str)
        return text if len(text) <= LONGEST else f"{len(value)} entries"
    text = str(value)
    if _SHA256.fullmatch(text):
        return f"{text[:12]}…"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def is_saved(folder: str | Path) -> bool:
    """Whether progress is there to go on from."""
    return (Path(folder) / MANIFEST).is_file()


def units_done(folder: str | Path) -> int:
    """How many pairs, or texts, saved progress has behind it; 0 where there is none, or none that can be
    read.
    """
    if not (Path(folder) / MANIFEST).is_file():
        return 0
    try:
        states = json.loads((Path(folder) / MANIFEST).read_bytes())["states"]
        return sum(int(state["done"]) for state in states.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, *_DAMAGE):
        return 0  # whoever resumes from it hears what is wrong


def refuse_unwanted(folder: str | Path) -> None:
    """Raise ArtifactError where progress is saved already: before any work.

    Raises:
        ArtifactError: progress, or another's files, are there.
    """
    if MANIFEST in _present(Path(folder)):
        raise _unwanted(Path(folder))


def discard(folder: str | Path) -> None:
    """Remove saved progress, if there is any.

    Raises:
        ArtifactError: the folder holds other files, or cannot be removed.
    """
    place = Path(folder)
    if not _present(place) and not place.is_dir():
        return
    try:
        shutil.rmtree(place)
    except OSError as error:
        raise ArtifactError(f"{place}: cannot be removed ({error.strerror})") from None


def _unwanted(folder: Path) -> ArtifactError:
    return ArtifactError(
        f"{folder}: progress of an earlier run is there: go on from it with --resume (in Python "
        "resume=True), or discard it with --force"
    )


def _present(folder: Path) -> set[str]:
    """Names of the files in the folder. Raises ArtifactError where some are not ours."""
    try:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise ArtifactError(f"{folder}: is not a folder, and progress is to be saved there")
        entries = list(folder.iterdir()) if folder.is_dir() else []
        if special := sorted(entry.name for entry in entries if not entry.is_file()):
            raise ArtifactError(f"{folder}: {special[0]} is not a file, and progress is to be saved there")
        names = {entry.name for entry in entries}
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be read ({error.strerror})") from None
    if foreign := sorted(name for name in names if not _OURS.fullmatch(name)):
        raise ArtifactError(f"{folder}: holds other files ({foreign[0]}), and progress is to be saved there")
    return names


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
