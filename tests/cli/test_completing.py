"""Tab completion: scripts of three shells, the words that bash is given, and a help by workflow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli.command_line import run
from steersman import lab
from steersman.cli import WORKFLOW, completing, steersman
from waiting import HANGING

ASKED_BY_BASH = r"""
source "$1"; shift
for line in "$@"; do
  COMP_LINE=$line; COMP_POINT=${#line}; COMPREPLY=()
  COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  compopt() { COMPREPLY=("<$2>"); }
  _steersman_completion steersman
  echo "${COMPREPLY[*]}"
done
"""


def completed(place: Path, *lines: str) -> list[list[str]]:
    """What bash offers for each line."""
    script = place / "script"
    script.write_text(run("completion", "bash").words)
    done = subprocess.run(
        ["bash", "--norc", "-c", ASKED_BY_BASH, "bash", script, *lines],
        cwd=place,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=HANGING,
        check=True,
    )
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_commands_names_of_the_lab_and_artifacts_by_kind(
    contrast: Path, steering: Path, tmp_path: Path
) -> None:
    shutil.copytree(contrast, tmp_path / "counts")
    shutil.copytree(steering, tmp_path / "plans" / "safer")
    shutil.copytree(steering, tmp_path / "calm")
    offered = completed(
        tmp_path,
        "steersman des",
        "steersman describe lab:moe-p",
        "steersman detect lab:moe lab:re",
        "steersman select c",
        "steersman generate m --steering c",
        "steersman compose plans/",
        "steersman generate m --compare --scop",
        "steersman refine m ",
    )
    assert offered == [
        ["describe"],
        ["moe-plain", "moe-prior"],  # bash ends a word at the colon, and has that part already
        ["refusal", "restricted", "request"],
        ["counts"],
        ["calm"],
        ["plans/safer"],
        [],
        ["<default>"],  # files
    ]


def test_the_lab_is_known_by_all_its_names() -> None:
    assert list(completing.LAB_MODELS) == list(lab.MODELS)
    assert list(completing.LAB_DATA) == list(lab.DATA)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str) -> None:
    words = run("completion", shell).words
    assert "_STEERSMAN_COMPLETE" in words
    assert run("completion", shell, "--json").json == {"shell": shell, "script": words}


def test_completing_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from steersman.cli import main; status = main([]); "
        "sys.exit('imported torch' if 'torch' in sys.modules else status)"
    )
    asked = {
        "_STEERSMAN_COMPLETE": "zsh_complete",
        "COMP_WORDS": "steersman describe lab:",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=HANGING,
    )
    assert done.returncode == 0, done.stderr
    assert "lab:natural" in done.stdout


def test_help_has_every_command_in_a_section() -> None:
    words = run("--help").words
    assert all(f"\n{step}:\n" in words for step in WORKFLOW)
    listed = [str(command.name) for commands in WORKFLOW.values() for command in commands]
    assert sorted(listed) == sorted(steersman.commands)
    assert all(f"\n  {name} " in words for name in listed)
