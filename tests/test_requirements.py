"""The lock files, pyproject.toml's ranges and docs/dependencies.md say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
DEVELOPMENT = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
HARNESS = [Requirement(line) for line in PROJECT["optional-dependencies"]["harness"]]
LOCKS = {"test.lock": "torch.lock", "oldest.lock": "torch-oldest.lock", "harness.lock": "torch.lock"}


def locked(*names: str) -> dict[str, Version]:
    lines = [
        line
        for name in names
        for line in (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    ]
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pinned}


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_is_within_the_ranges(lock: str) -> None:
    versions = locked(lock, LOCKS[lock])
    wrong = [
        f"{r} but {versions[r.name]}"
        for r in [*NEEDED, *DEVELOPMENT, *(HARNESS if lock == "harness.lock" else [])]
        if not r.specifier.contains(versions[r.name])
    ]
    assert not wrong


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_leaves_the_build_of_torch_to_the_machine(lock: str) -> None:
    assert not [name for name in locked(lock) if re.match(r"torch$|triton|nvidia|cuda|steersman", name)]


def test_oldest_lock_is_the_lower_end_of_every_range() -> None:
    versions = locked("oldest.lock", "torch-oldest.lock")
    lower = {r.name: Version(s.version) for r in NEEDED for s in r.specifier if s.operator == ">="}
    assert {name: versions[name] for name in lower} == lower


def test_every_dependency_is_explained_with_its_range() -> None:
    rows = re.findall(
        r"^\| \[?([\w-]+)\]?[^|]*\| `([^`]+)` \|", (ROOT / "docs/dependencies.md").read_text("utf-8"), re.M
    )
    written = {name: Requirement(f"{name}{bounds}").specifier for name, bounds in rows}
    assert written == {r.name: r.specifier for r in [*NEEDED, *DEVELOPMENT]}
