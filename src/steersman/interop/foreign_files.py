"""Files of others, read and written whole: bounded in size, JSON strict, one clear line where that fails."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steersman.errors import ArtifactError, valid_name
from steersman.interop.inert_pickle import MOST_BYTES
from steersman.stand_ins import HEAD, annex_link, stand_in

_OLD_TORCH = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_NOT_READ: dict[str, Callable[[bytes], bool]] = {
    "an array of numpy (.npy)": lambda content: content.startswith(b"\x93NUMPY"),
    "a safetensors file": lambda content: content[8:9] == b"{" and content[2:8] == bytes(6),
    "a file of torch.save before PyTorch 1.6": lambda content: content[:24].find(_OLD_TORCH) > 0,
    "an HDF5 file": lambda content: content.startswith(b"\x89HDF\r\n\x1a\n"),
}
"""Files that hold vectors in forms that are not read, by how they begin."""


def read_bytes(path: Path, *, zipped: bool = False) -> bytes:
    """A file's content. Raises `ArtifactError` where it is missing, too large or empty, or another thing lies
    in its place (a pointer, a web page, an archive; a zip archive is content where one is expected).
    """
    try:
        if path.is_dir():
            raise ArtifactError(f"{path}: is a folder; a file is needed")
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: {annex_link(path) or 'no such file'}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
    if len(content) > MOST_BYTES:
        raise ArtifactError(f"{path}: larger than {MOST_BYTES >> 20} MiB, which no file of this kind is")
    if not content:
        raise ArtifactError(f"{path}: the file is empty")
    if (instead := stand_in(content[:HEAD], zipped=zipped)) is not None:
        raise ArtifactError(f"{path}: {instead}")
    return content


def format_of(path: Path) -> str:
    """Which of the formats that are read a file seems to have, by its first bytes (a pickle: by what it
    names). Raises `ArtifactError` as `read_bytes`.
    """
    content = read_bytes(path, zipped=True)
    for what, holds in _NOT_READ.items():
        if holds(content):
            raise ArtifactError(f"{path}: is {what}, which is not read; save its vectors with torch.save(…)")
    if content.startswith(b"GGUF"):
        return "easysteer" if b"controlvector.method" in content[:4096] else "gguf"
    if content.startswith(b"PK\x03\x04"):
        return "steering-vectors"  # what torch.save writes is a zip archive
    if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return "easysteer"
    return "repeng" if b"repeng" in content[:4096] and b"ControlVector" in content[:4096] else "steermoe"


def is_other_text(path: Path) -> bool:
    """Whether a file is text, but no JSON: prose, or JSON lines. Raises `ArtifactError` as `read_bytes`."""
    try:
        json.loads(read_bytes(path).decode("utf-8-sig"))
    except UnicodeDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return False


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises `ArtifactError` for what is not JSON, holds NaN, or gives a key twice."""
    try:
        return json.loads(
            read_bytes(path).decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({' '.join(str(error).split())[:200]})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def write_bytes(target: str | Path, content: bytes, *, force: bool = False) -> None:
    """Write a file that is there whole or not at all.

    Raises `ArtifactError` where one is there already (unless `force`) or it cannot be written.
    """
    path = Path(valid_name(target, ArtifactError))
    try:
        if path.exists() and (path.is_dir() or not force):
            remedy = "a folder" if path.is_dir() else "already there; name another, or --force to replace it"
            raise ArtifactError(f"{path}: is {remedy}")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror})") from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
