"""Resolve the ranges of pyproject.toml anew into the lock files: the newest versions, the oldest allowed.

Each is resolved in a fresh environment and frozen, without torch (its build is the machine's choice: see
install.py) and without steersman itself. Run by `make lock`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from install import ROOT, Environment, StepFailed, lower_ends, read_torch_lock

HERE = ROOT / "requirements"
# Torch's build and what only that needs, in a version of its choice (setuptools); or not a dependency at all.
NOT_LOCKED = re.compile(r"(torch|triton|setuptools|pip|steersman|nvidia-.*|cuda-.*)==")
HEADER = """\
# {what}
# Written by `make lock`; torch is in {torch}. Python 3.11 {upper}.
"""


def main() -> int:
    """Write requirements/*.lock from the ranges."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [line for line in project["dependencies"] if not line.startswith("torch>")]
    oldest = [f"{name}=={version}" for name, version in lower_ends().items() if name != "torch"]
    development = project["optional-dependencies"]["dev"]
    harness = project["optional-dependencies"]["harness"]
    try:
        newest = resolve([*needed, *development])
        write("test.lock", newest, "Exact versions for `make test` and `make demo`.", "torch.lock", "to 3.13")
        write(
            "harness.lock",
            resolve([*needed, *development, *harness]),
            "Exact versions for `make test-harness`.",
            "torch.lock",
            "to 3.13",
        )
        write(
            "oldest.lock",
            resolve([*oldest, *development]),
            "The oldest ends of the ranges, for `make test-oldest`.",
            "torch-oldest.lock",
            "and 3.12",
        )
    except StepFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    (HERE / "torch-oldest.lock").write_text(f"torch=={lower_ends()['torch']}.0\n", encoding="utf-8")
    return 0


def resolve(requirements: list[str]) -> list[str]:
    """The frozen lines of a fresh environment with torch and these requirements."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(Path(folder) / "venv")
        environment.create(may_borrow=False)
        unconstrained = Path(folder) / "empty.txt"
        unconstrained.touch()
        environment.install_torch(read_torch_lock(HERE / "torch.lock"), unconstrained)
        environment.install("the ranges of pyproject.toml", *requirements)
        freeze = [str(environment.python), "-m", "pip", "freeze", "--all"]
        lines = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if "==" in line and not NOT_LOCKED.match(line)]


def write(name: str, lines: list[str], what: str, torch: str, upper: str) -> None:
    """A lock file, sorted as pip freeze sorts."""
    text = HEADER.format(what=what, torch=torch, upper=upper) + "\n".join(lines) + "\n"
    (HERE / name).write_text(text, encoding="utf-8")
    print(f"wrote requirements/{name}: {len(lines)} packages")


if __name__ == "__main__":
    sys.exit(main())
