"""What commands put out: one JSON object or words on stdout; files and folders, whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from steersman.errors import ArtifactError
from steersman.showing import on_one_line


def put_out(result: dict[str, Any], as_json: bool, words: Callable[[], str]) -> None:
    """Print a command's result, as one JSON object or in words."""
    click.echo(json.dumps(result, allow_nan=False) if as_json else harmless(words()))


def harmless(text: str) -> str:
    """Text from files and models without what a terminal would obey."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text)


def number(value: float) -> float | None:
    """A number for JSON, which knows no NaN: what cannot be told is null."""
    return float(value) if value == value and abs(value) != float("inf") else None


def in_columns(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in aligned columns, numbers to the right."""
    cells = [[on_one_line(str(cell)) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(header), *cells]) for column in range(len(header))]
    right = [
        bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        for column in range(len(header))
    ]
    lines = []
    for line in [list(header), *cells]:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def next_steps(said: str, *commands: Sequence[object]) -> str:
    """What one may do next, in words: commands as they can be pasted into a shell."""
    lines = [f"  {shlex.join(['steersman', *map(str, command)])}" for command in commands]
    return "\n".join([f"\n\n{said}:", *lines])


def unused(name: str) -> str:
    """A name that nothing has here yet: the name itself, or with a number behind it."""
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(free for free in names if not os.path.lexists(free))


def require_free(folder: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise ArtifactError where an artifact's folder is occupied or an input: before the work."""
    from steersman.artifacts import MANIFEST, TENSORS, check_free

    if any(folder.resolve() == path.resolve() for path in inputs):
        raise ArtifactError(f"{folder}: this is what the command reads; write to another folder")
    check_free(folder, force=force, ours={MANIFEST, TENSORS})


def progress_beside(output: Path, resume: bool, force: bool, first: str) -> Path:
    """The folder beside an output that a run's progress is saved in; raises where some is there that is not
    wanted, and says where there is none to go on from.

    Args:
        output: Of the command.
        resume, force: As given.
        first: What a run begins with, in words.
    """
    from steersman.progress import is_saved, refuse_unwanted

    named = output if output.name not in ("", "..") else output.resolve()  # "." has no name to add to
    partial = named.with_name(f"{named.name}.partial")
    if not resume and not force:
        refuse_unwanted(partial)
    if resume and not is_saved(partial):
        click.echo(f"steersman: no progress in {partial} to go on from: starting at {first}", err=True)
    return partial


@contextmanager
def whole_file(path: Path, force: bool | None) -> Iterator[Path]:
    """A path to write to that becomes `path` when all went well, and is gone otherwise. `force` is None where
    there is no --force to be named.
    """
    from steersman.artifacts.folder import check_outside

    try:
        check_outside(path)
        if path.exists() and not force:
            or_force = "" if force is None else ", or --force to replace it"
            raise ArtifactError(f"{path}: the file exists; name another{or_force}")
        # What stands in for a long name is short.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:20]}.", suffix=path.suffix)
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:  # a name that no file system takes
        said = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path}: cannot be written ({said})") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner can read.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
