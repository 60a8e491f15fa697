"""Folders of an artifact: filled beside their place and put there all at once, never over others' files."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steersman.errors import ArtifactError, valid_name

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"

_CANNOT_WRITE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "EIO", "EBUSY", "ENOTEMPTY")
}


def check_free(folder: str | Path, *, force: bool = False, ours: set[str]) -> None:
    """Raise `ArtifactError` where a folder cannot be written: occupied without `force`, or holding others'
    files.
    """
    target = Path(valid_name(folder, ArtifactError))
    try:
        check_outside(target)
        if target.is_symlink():
            raise ArtifactError(f"{target}: is a link; give the folder that it leads to")
        if not target.is_dir():
            if target.exists():
                raise ArtifactError(f"{target}: is not a folder")
            _check_above(target)
            return
        present = list(target.iterdir())
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written ({error.strerror})") from None
    if present and not force:
        raise ArtifactError(f"{target}: the folder is not empty; give another one, or --force to replace it")
    if foreign := sorted(entry.name for entry in present if not _is_ours(entry, ours)):
        raise ArtifactError(
            f"{target}: holds other files ({foreign[0]}); it is not replaced even with --force"
        )


def check_outside(target: Path) -> None:
    """Raise `ArtifactError` where a path lies inside an artifact."""
    for folder in target.resolve().parents:
        if all((folder / name).is_file() for name in (MANIFEST, TENSORS)):
            raise ArtifactError(f"{target}: lies inside the artifact {folder}, which holds nothing else")


def _check_above(target: Path) -> None:
    """Raise `ArtifactError` where a path goes on below what is not a folder."""
    above = next((path for path in target.absolute().parents if os.path.lexists(path)), None)
    if above is not None and not above.is_dir():
        raise ArtifactError(f"{target}: cannot be written ({above} is not a folder)")


def _is_ours(entry: Path, ours: set[str]) -> bool:
    """Whether a folder's entry is one that we wrote, by its name; a folder named as our files are is not."""
    return entry.name in ours and not (entry.is_dir() and entry.name in (MANIFEST, TENSORS))


@contextmanager
def new_folder(folder: str | Path, *, force: bool = False, ours: set[str]) -> Iterator[Path]:
    """A folder to fill, which takes its place all at once when the block ends well, and leaves nothing when
    it does not.

    Args:
        folder: Where it shall be. An occupied one is an error, unless `force`.
        force: Replace an occupied folder, if it holds nothing but `ours`.
        ours: Names of entries that such a folder has.

    Raises:
        ArtifactError: the place is occupied or cannot be written (no space, no permission).
    """
    target = Path(valid_name(folder, ArtifactError))
    if target.name in ("", ".."):
        target = target.resolve()  # "." has no name to put a folder beside
    check_free(target, force=force, ours=ours)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        yield place
        place.chmod(0o777 & ~_umask())
        _sync(place)
        check_free(target, force=force, ours=ours)
        _take_place(place, target)
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            raise ArtifactError(f"{target}: cannot be written ({error.strerror})") from None
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _take_place(place: Path, target: Path) -> None:
    if not target.exists():
        place.replace(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.replace(old)
        place.replace(target)
    finally:
        if not target.exists():  # whatever came in between, also Ctrl-C: the old one comes back
            old.replace(target)
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    """Make sure the files have reached the disk before they take their place."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
