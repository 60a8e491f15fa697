"""What went wrong and whose doing it was: one line and exit 2 for the user's, a traceback and 1 for ours."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import click

from steersman.cli.output import harmless
from steersman.errors import SteersmanError

PACKAGE = Path(__file__).parents[1]

BUG, USER_ERROR, INTERRUPTED, READER_GONE, TERMINATED = 1, 2, 130, 141, 143


class Terminated(BaseException):
    """SIGTERM was heard: ends the process as Ctrl-C does."""


@contextmanager
def resumable(partial: Path) -> Iterator[None]:
    """Let a stop say how to go on, where progress is saved in the folder."""
    from steersman.progress import is_saved

    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        if is_saved(partial):
            stop.add_note(f"go on with --resume (progress in {partial})")
        raise


def reported(run: Callable[[], object]) -> int:
    """Run, and turn whatever is raised into what the user reads and the exit status."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_own_warnings
            run()
            sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort, Terminated) as stop:
        print("; ".join(["steersman: interrupted", *getattr(stop, "__notes__", [])]), file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return READER_GONE
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            traceback.print_exception(error)
            return BUG
        print(f"steersman: error: {harmless(one_line(explanation))}", file=sys.stderr)
        if isinstance(error, OSError):
            _drop_stdout()
        return USER_ERROR
    return 0


def explain(error: Exception) -> str | None:
    """What the user can mend, in words; None where it is a bug of ours."""
    if isinstance(error, SteersmanError):
        return str(error)
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.format_message()} (see {error.ctx.command_path} --help)"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError):
        return _explain_os_error(error)
    library = type(error).__module__.partition(".")[0]
    # Both raise their own kinds for what they were given: names of repositories, damaged or unwritable files.
    if library in ("huggingface_hub", "safetensors", "safetensors_rust"):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError" and library == "torch":
        return "the device is out of memory; a smaller --batch-size or --dtype bfloat16 needs less"
    return None


def _explain_os_error(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        where = f": {error.filename}" if error.filename else ""
        return f"the disk is full{where}; nothing was left half written"
    if error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    # transformers raises OSError for names that are neither a folder nor on the Hub, and says so at length.
    return str(error) or type(error).__name__


def one_line(text: str) -> str:
    """A text of several lines in one."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _drop_stdout() -> None:
    """Let go of what stdout still holds and cannot write: Python would complain once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_own_warnings(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line for our own warnings; those of the libraries below are for developers."""
    for_developers = issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning)
    if str(PACKAGE) in filename and not for_developers:
        print(f"steersman: warning: {harmless(one_line(str(message)))}", file=sys.stderr)
