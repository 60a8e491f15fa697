"""What an evaluation has so far: one line a finished batch, on disk as soon as it is there.

A folder with manifest.json (what is being run) and batches.jsonl. A line holds a batch's key, its content and
the sha256 of both; a line that a kill has torn is dropped, and its batch is run again. So whatever is
finished is never run twice, and what comes out at the end is the same with and without a kill.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steersman.errors import ArtifactError
from steersman.progress import differences
from steersman.steering import canonical_json, sha256_of

RUN, BATCHES = "manifest.json", "batches.jsonl"
FORMAT = "steersman-evaluation-progress"

Entry = dict[str, Any]


def key_of(*parts: str | int) -> str:
    """What a piece of work is kept under; no two lists of names give the same, whatever is in the names."""
    return json.dumps(parts, ensure_ascii=False)


class RunStore:
    """The finished batches of one run, in memory and, where there is a folder, on disk.

    Args:
        folder: Where; None keeps nothing on disk.
        run: What is being run, as plain data: batches of another run are refused. `more`
            names the one of its settings that may be larger than it was: what is finished stays.
        resume: Go on from what is there; otherwise anything there is an error.
        finished: Only read what is there, while the run may still be going on.

    Raises:
        ArtifactError: batches are there and not wanted, are of another run, or the folder is another's; none
            are there that could be read.
    """

    def __init__(
        self,
        folder: Path | None,
        run: Mapping[str, Any],
        *,
        resume: bool,
        more: str | None = None,
        finished: bool = False,
    ) -> None:
        self.folder = folder
        self.finished = finished
        self._more = more
        self.run: dict[str, Any] = json.loads(canonical_json(run))
        self.resumed = 0
        self._entries: dict[str, Entry] = {}
        if folder is None:
            return
        present = _present(folder)
        if finished and RUN not in present:
            raise ArtifactError(f"{folder}: no progress of a run is there that could be reported")
        if RUN in present and not (resume or finished):
            raise unwanted(folder)
        if RUN in present:
            self._check_run()
            self._entries = dict(_lines(folder / BATCHES, mend=not finished))
            self.resumed = len(self._entries)
        else:
            self._begin()

    def get(self, key: str) -> Entry | None:
        """A finished batch; None where it has not been run."""
        return self._entries.get(key)

    def put(self, key: str, content: Entry) -> Entry:
        """Keep a finished batch; returns it as it will be read again."""
        entry: Entry = json.loads(json.dumps(content, allow_nan=False))
        self._entries[key] = entry
        if self.folder is not None:
            append(self.folder / BATCHES, key, entry)
        return entry

    def _begin(self) -> None:
        folder = self.folder
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / BATCHES).write_bytes(b"")
        except OSError as error:
            raise ArtifactError(f"{folder}: cannot be written ({error.strerror})") from None
        self._write_run(folder)

    def _write_run(self, folder: Path) -> None:
        try:
            draft = folder / f"{RUN}.new"
            draft.write_text(json.dumps({"format": FORMAT, "run": self.run}, indent=1), encoding="utf-8")
            draft.replace(folder / RUN)
        except OSError as error:
            raise ArtifactError(f"{folder}: cannot be written ({error.strerror})") from None

    def _check_run(self) -> None:
        path = Path(str(self.folder)) / RUN
        try:
            saved = json.loads(path.read_bytes())
            run = dict(saved["run"])
            if saved["format"] != FORMAT:
                raise ValueError(f"its format is {saved['format']!r}")
            grown = self._grown(run)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"{path}: damaged ({reason}); --force discards it and starts again") from None
        if different := differences({**grown, "created": None}, {**self.run, "created": None}):
            fewer = self._more is not None and f"settings.{self._more} " in different
            more = ": right is as many, or more" if fewer else ""
            raise ArtifactError(
                f"{self.folder}: progress of another evaluation, which differs in {different}{more}; "
                "--force discards it and starts again"
            )
        self.run = grown
        if grown != run and not self.finished:
            self._write_run(path.parent)

    def _grown(self, run: dict[str, Any]) -> dict[str, Any]:
        """The saved run with as much as is asked for now of the setting that may grow."""
        there, here = (dict(of.get("settings") or {}) for of in (run, self.run))
        known = self._more in there and self._more in here
        if self._more is None or not known or here[self._more] < there[self._more]:
            return run
        return {**run, "settings": {**there, self._more: here[self._more]}}


def append(path: Path, key: str, entry: Entry) -> None:
    """Add a line and see to it that it is on disk. Raises ArtifactError where it cannot be written."""
    line = json.dumps({"key": key, "entry": entry, "sha256": sha256_of([key, entry])}, allow_nan=False)
    try:
        with path.open("ab") as stream:
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror})") from None


def _lines(path: Path, *, mend: bool = True) -> Iterator[tuple[str, Entry]]:
    """The whole lines of a file; what follows the first that is not is cut off (`mend`)."""
    whole = 0
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    for line in content.splitlines(keepends=True):
        read = _read(line)
        if read is None:
            break
        whole += len(line)
        yield read
    if mend and whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)


def read_entries(path: Path) -> dict[str, Entry]:
    """The whole lines of a file, by key."""
    return dict(_lines(path))


def _read(line: bytes) -> tuple[str, Entry] | None:
    try:
        found = json.loads(line)
        key, entry = found["key"], found["entry"]
        intact = line.endswith(b"\n") and found["sha256"] == sha256_of([key, entry])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return (str(key), dict(entry)) if intact else None


def discard(folder: Path) -> None:
    """Remove saved progress, if there is any. Raises ArtifactError where other files are there."""
    _present(folder)
    if folder.is_dir():
        shutil.rmtree(folder)


def unwanted(folder: Path) -> ArtifactError:
    """Progress is there that nobody asked for."""
    return ArtifactError(
        f"{folder}: progress of an earlier run is there: go on from it with --resume (in Python "
        "resume=True), or discard it with --force"
    )


def _present(folder: Path) -> set[str]:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ArtifactError(f"{folder}: is not a folder, and progress is to be saved there")
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if foreign := sorted(names - {RUN, f"{RUN}.new", BATCHES}):
        raise ArtifactError(f"{folder}: holds other files ({foreign[0]}), and progress is to be saved there")
    return names
