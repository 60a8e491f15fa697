"""What lies in a file in place of its content: a pointer of Git LFS, an error page, an archive."""

from __future__ import annotations

import os
from pathlib import Path

HEAD = 256
"""How many bytes of a file's beginning tell."""

_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html>", b"<html ")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def stand_in(head: bytes, *, zipped: bool = False) -> str | None:
    """What a file's first bytes show to lie there in place of its content, and what mends it; None for other
    content.

    Args:
        head: The first `HEAD` bytes of the file, or all.
        zipped: Whether a zip archive is content.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(_LFS):
        return "a Git LFS pointer and not the file itself; fetch it with: git lfs pull"
    if start.startswith(b"/annex/objects/"):
        return "a git-annex pointer and not the file itself; fetch it with: git annex get"
    if start[: max(map(len, _PAGES))].lower().startswith(_PAGES):
        return "a web page and not the file itself; download it again"
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic) and not (zipped and name == "zip"):
            return f"compressed with {name}; unpack it first"
    return None


def stand_in_at(path: Path, *, zipped: bool = False) -> str | None:
    """As `stand_in`, of the file at a path; also a link of git-annex to content that is not there, and a file
    with nothing in it. None where it cannot be read, which its reader says best.
    """
    try:
        if not path.is_file():  # a pipe would wait for who writes it
            return annex_link(path)
        with path.open("rb") as stream:
            head = stream.read(HEAD)
    except (OSError, ValueError):
        return None
    return stand_in(head, zipped=zipped) if head else "the file is empty"


def annex_link(path: Path) -> str | None:
    """What a missing file is where it is a link into git-annex; else None."""
    try:
        target = str(path.readlink())
    except (OSError, ValueError):
        return None
    if "annex/objects/" in target.replace(os.sep, "/"):
        return "a git-annex link to content that is not here; fetch it with: git annex get"
    return None
