"""Help, exits and what stands on stdout and stderr, whatever the command."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest

from cli.command_line import process, run
from steersman import cli, lab
from steersman.cli.failures import Terminated, explain, reported
from steersman.errors import PlanError
from waiting import HANGING, wait_until

COMMANDS = ["demo", "describe", "detect", "merge", "select", "generate", "show", "lab list", "lab train"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    help_text = run(*command.split(), "--help").words
    assert f"  steersman {command}" in help_text
    assert "Example" in help_text
    assert "--json" in help_text
    assert all(len(line) <= 110 for line in help_text.splitlines())


def test_help_is_quick_because_it_does_not_load_torch() -> None:
    code = (
        "import sys; from steersman.cli import main; status = main(['detect', '--help']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGING)
    assert done.returncode == 0


def test_without_a_command_help_is_shown_and_the_version_is_told() -> None:
    assert "describe" in run().words
    assert run("--version").words.startswith("steersman ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command 'nothing'. (see steersman --help)"),
        (["lab", "nothing"], "No such command 'nothing'. (see steersman lab --help)"),
        (["describe"], "Missing argument 'MODEL'. (see steersman describe --help)"),
        (["describe", "a", "b"], "Got unexpected extra argument (b) (see steersman describe --help)"),
        (["describe", "a", "--nothing"], "No such option '--nothing'. (see steersman describe --help)"),
        (["describe", "a", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["detect", "a", "b"], "Missing option '-o' / '--output'."),
        (["detect", "a", "b", "-o", "c", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (
            ["select", "a", "-o", "b"],
            "name how many experts: either --top N, or --activate N and --deactivate M",
        ),
        (["select", "a", "-o", "b", "--top", "1", "--activate", "1"], "--preset NAME, not both"),
        (["select", "a", "-o", "b", "--top", "1", "--strength", "0"], "--strength is 0; right is above 0"),
        (["select", "a", "-o", "b", "--top", "1", "--strength", "nan"], "--strength is nan; right is"),
        (
            ["detect", "a", ".", "-o", "b-of-none"],
            ".: is a folder; PAIRS is a file or lab:NAME, and the",
        ),
        (["describe", "lab:moe", "--device", "gpu"], "right is cpu, cuda, cuda:1, mps, or auto"),
        (["describe", "no-such-model"], "nor is there such a folder"),
        (["generate", "a", "--steering", "b"], "give prompts: either --prompt TEXT, or --prompts FILE"),
        (["generate", "a", "--steering", "b", "--prompt", "c", "--prompts", "d"], "give prompts"),
        (["generate", "a", "--prompt", "c", "--compare"], "give --steering"),
        (["generate", "a", "--steering", "b@much", "--prompt", "c"], "'much' is no strength"),
        (["generate", "a", "--steering", "b@nan", "--prompt", "c"], "'nan' is no strength"),
        (["generate", "a", "--steering", "@1", "--prompt", "c"], "names no steering"),
        (["lab", "train", "moe"], "Missing option '--seed'."),
        (["lab", "train", "moe", "--seed", "-1"], "Invalid value for '--seed'"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str) -> None:
    assert message in run(*arguments).error


def test_as_installed_it_keeps_stdout_for_the_object(tiny: Path) -> None:
    done = process("describe", tiny, "--json")
    assert done.json["model"] == str(tiny)


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = process("--help", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.status == 2
    assert done.stderr == "steersman: error: the disk is full; nothing was left half written\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `steersman --help | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = process("--help", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.status, done.stderr) == (141, "")


def test_ctrl_c_while_training_leaves_nothing(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("steersman")
    command = [program, "lab", "train", "moe", "--seed", "5", "-o", "trained"]
    started = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell runs in the background ignores Ctrl-C, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    shown = started.stderr.fileno()  # type: ignore[union-attr]
    wait_until(lambda: b"\r" in os.read(shown, 4096), started)  # the progress bar: training is under way
    started.send_signal(signal.SIGINT)
    stdout, stderr = started.communicate(timeout=HANGING)
    assert started.returncode == 130
    assert stdout == ""
    assert "steersman: interrupted" in stderr
    assert "Traceback" not in stderr
    assert "ignored" not in stderr
    assert list(tmp_path.iterdir()) == []


DROPPED = {
    "destructor": "class Dropped:\n    def __del__(self): stop()\nDropped()",
    "weak reference": "import weakref\nof = set()\nseen = weakref.ref(of, lambda _: stop())\ndel of",
    "C library": "import ctypes\nctypes.CFUNCTYPE(None)(stop)()",
}


@pytest.mark.parametrize("place", DROPPED)
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stop_is_heard_wherever_it_comes(place: str, name: str, status: int) -> None:
    """Python prints what is raised in such places, "Exception ignored in …", and goes on."""
    code = (
        "import signal, sys, time\nfrom steersman import cli\n"
        # What a shell runs in the background ignores Ctrl-C, and its children with it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"stop = lambda *_: signal.raise_signal(signal.{name})\nplace = {DROPPED[place]!r}\n"
        f"def command(arguments):\n    exec(place, {{'stop': stop}})\n    time.sleep({HANGING})\n"
        "cli._run_command = command\nsys.exit(cli.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGING)
    assert (done.returncode, done.stderr) == (status, "steersman: interrupted\n")


def _raises(error: BaseException) -> None:
    raise error


def test_exits(capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(lambda: None) == 0
    assert reported(lambda: _raises(PlanError("two\n  lines"))) == 2
    assert capsys.readouterr().err == "steersman: error: two lines\n"
    for interruption in (KeyboardInterrupt(), click.Abort()):
        assert reported(lambda interruption=interruption: _raises(interruption)) == 130  # type: ignore[misc]
    assert reported(lambda: _raises(Terminated())) == 143
    assert capsys.readouterr().err == "steersman: interrupted\n" * 3
    for bug in (ValueError("oh"), KeyError("x"), AssertionError(), EOFError()):
        assert reported(lambda bug=bug: _raises(bug)) == 1  # type: ignore[misc]
        assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_what_the_user_can_mend() -> None:
    from huggingface_hub.errors import HFValidationError

    assert explain(OSError(errno.ENOSPC, "No space left on device", "plan")) == (
        "the disk is full: plan; nothing was left half written"
    )
    assert (
        explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "x"))
        == "x: No such file or directory"
    )
    assert explain(OSError("neither a folder nor a name")) == "neither a folder nor a name"
    assert explain(HFValidationError("no name of a repository")) == "no name of a repository"
    memory = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})("tried to allocate")
    assert "--batch-size" in str(explain(memory))
    assert explain(RuntimeError("a bug")) is None


def test_warnings_of_ours_are_shown_and_those_of_libraries_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_with_warnings() -> None:
        warnings.warn_explicit("of theirs", UserWarning, "/lib/transformers/x.py", 1)
        warnings.warn_explicit("for developers", DeprecationWarning, cli.__file__, 1)
        warnings.warn_explicit("of ours\nin two lines", UserWarning, cli.__file__, 1)

    assert reported(run_with_warnings) == 0
    assert capsys.readouterr().err == "steersman: warning: of ours in two lines\n"


def test_a_terminal_that_knows_few_letters_shows_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    monkeypatch.setattr(lab, "MODELS", {"moe": "planted – and known"})
    assert cli.main(["lab", "list"]) == 0
    assert b"planted \\u2013 and known" in raw.getvalue()
