"""States in a file that only grows: a temporary one, or one beside saved progress, to go on from."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from steersman.errors import ArtifactError, ModelError
from steersman.progress import KEPT_STATES, is_saved


class StateFile:
    """Bytes that are appended, and read at any place.

    Args:
        folder: Where progress is saved; a temporary file, where nothing is given.
        saved: What `facts` gave at the last save: what was written after that is dropped.

    Raises:
        ArtifactError: the file is not as it was saved, or cannot be written.
    """

    def __init__(self, folder: str | Path | None = None, saved: Mapping[str, Any] | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._digest, self._length = hashlib.sha256(), 0
        self._file = self._open(saved)
        weakref.finalize(self, self._file.close)

    def _open(self, saved: Mapping[str, Any] | None) -> BinaryIO:
        if self._folder is None:
            return tempfile.TemporaryFile()
        path = self._folder / KEPT_STATES
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = path.open("w+b" if saved is None else "r+b")
            if saved is not None:
                self._check(file, saved, path)
            return file
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be used ({error.strerror})") from None

    def _check(self, file: BinaryIO, saved: Mapping[str, Any], path: Path) -> None:
        left = int(saved["length"])
        while left and (content := file.read(min(left, 1 << 24))):
            self._digest.update(content)
            left -= len(content)
        if left or self._digest.hexdigest() != saved["sha256"]:
            raise ArtifactError(
                f"{path}: damaged (it is not as it was saved); --force discards it and starts again"
            )
        self._length = int(saved["length"])
        file.truncate(self._length)

    def append(self, content: bytes | memoryview) -> int:
        """Add bytes at the end; where they begin. Raises ModelError for a full disk."""
        start = self._length
        try:
            self._file.seek(start)
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            hint = "" if self._folder else "; set TMPDIR to a folder with more room"
            raise ModelError(f"{where}: states cannot be kept there ({error.strerror}){hint}") from None
        if self._folder is not None:  # nobody goes on from a temporary one
            self._digest.update(content)
        self._length += memoryview(content).nbytes
        return start

    def read(self, start: int, size: int) -> bytearray:
        """Bytes from a place on."""
        content = bytearray(size)
        self._file.seek(start)
        if self._file.readinto(content) != size:  # type: ignore[attr-defined]
            raise ValueError(f"{size} bytes from {start} were not written")
        return content

    def facts(self) -> dict[str, Any]:
        """What there is by now, safely on disk."""
        if self._folder is not None:
            os.fsync(self._file.fileno())
        return {"length": self._length, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Let go of the file; of one that nothing was saved beside, wholly."""
        self._file.close()
        if self._folder is not None and not is_saved(self._folder):
            (self._folder / KEPT_STATES).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._folder.rmdir()
