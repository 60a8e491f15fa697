"""Make a virtual environment of this checkout: torch first, then what is locked, then the package.

torch comes first so that the machine decides its build: a Python that already has a torch with a working GPU
lends it to the environment; a machine without an NVIDIA GPU gets the CPU build; any other gets the plain one.
Everything else has the exact version of the lock file; with --newest, the newest that its range in
pyproject.toml allows today. What pip says goes to a log in the environment and is shown when a step fails.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH_INDEXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ()),
    (" from PyTorch's index", ("--index-url", PYTORCH_CPU_INDEX, "--retries", "1")),
)
"""Where CPU builds of torch are looked for, in words and as pip's options."""
NONE_TO_BE_HAD = ("No matching distribution found for torch", "ResolutionImpossible")
"""What pip says of one version that no index has; the latter where constraints of the user's name torch."""


class StepFailed(Exception):
    """A command of the installation failed; the message holds the end of what it said."""


def main() -> int:
    """Install as the command line says; 0 if everything is in place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements/test.lock")
    parser.add_argument("--torch-lock", type=Path, default=ROOT / "requirements/torch.lock")
    parser.add_argument(
        "--torch", help='instead of the locked one, for instance "torch==2.12.0" (options of pip may follow)'
    )
    parser.add_argument("--cpu", action="store_true", help="no other build of torch than the one for CPUs")
    parser.add_argument("--no-deps", action="store_true", help="install nothing that the lock does not name")
    parser.add_argument(
        "--newest", action="store_true", help="no lock: the newest versions of all ranges, now"
    )
    options = parser.parse_args()
    environment = Environment(options.venv)
    try:
        environment.create(may_borrow=not (options.torch or options.cpu or options.newest))
        if options.newest:
            environment.install_newest(options.torch)
        else:
            if not environment.borrows:
                torch = options.torch or read_torch_lock(options.torch_lock)
                environment.install_torch(torch, options.lock, only_cpu=options.cpu)
            alone = ["--no-deps"] if options.no_deps else []
            environment.install(f"the packages of {options.lock.name}", *alone, "-r", str(options.lock))
        environment.install("steersman", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    except StepFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


class Environment:
    """A virtual environment, and the log of what pip did to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / "install.log"

    @property
    def borrows(self) -> bool:
        """Whether torch is the base Python's own."""
        return "include-system-site-packages = true" in (self.folder / "pyvenv.cfg").read_text(
            encoding="utf-8"
        )

    def create(self, *, may_borrow: bool) -> None:
        """Make the environment if there is none that works; let it see a fit GPU torch of the base Python."""
        if self.python.exists() and succeeds(str(self.python), "-m", "pip", "--version"):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        torch = gpu_torch(sys.executable) if may_borrow else None
        if torch:
            self._venv("--system-site-packages")
            # Inside a virtual environment the "system" is the Python below it, which may have another torch.
            if gpu_torch(str(self.python)) == torch:
                say(f"keeping this Python's own torch {torch}")
                return
            shutil.rmtree(self.folder)
        self._venv()

    def _venv(self, *options: str) -> None:
        say(f"making {os.path.relpath(self.folder)} with Python {platform.python_version()}")
        made = subprocess.run(
            [sys.executable, "-m", "venv", *options, str(self.folder)], capture_output=True, text=True
        )
        if made.returncode:
            hint = "on Debian and Ubuntu: apt install python3-venv"
            raise StepFailed(f"python -m venv failed ({hint})\n{made.stdout}{made.stderr}")

    def install_torch(self, torch: str, lock: Path, *, only_cpu: bool = False) -> None:
        """The build of torch that suits the machine, with its own dependencies as the lock has them.

        `only_cpu`: the CPU build of one version, or StepFailed.
        """
        constrained = ("-c", str(lock))
        one_version = re.fullmatch(r"torch==[0-9.]+", torch)
        if not only_cpu and (not one_version or platform.system() != "Linux" or has_nvidia_gpu()):
            self.install(torch, *shlex.split(torch), *constrained)
            return
        cpu = f"{torch}+cpu"
        if self._install_cpu_build(cpu):
            self.install(f"what {cpu} depends on", cpu, *constrained)
        elif only_cpu:
            raise StepFailed(f"neither the configured package index nor {PYTORCH_CPU_INDEX} has {cpu}")
        else:
            say("no CPU build is to be had: taking the plain one, which is much bigger")
            self.install(torch, torch, *constrained)

    def install_newest(self, torch: str | None = None) -> None:
        """The newest versions that the ranges allow; of torch, if not `torch`, the build that fits here."""
        if torch is None and platform.system() == "Linux" and not has_nvidia_gpu():
            builds = self._cpu_builds()
            torch = next(
                (f"torch=={v}+cpu" for v in builds if self._install_cpu_build(f"torch=={v}+cpu")), None
            )
            if torch is None:
                say("no CPU build is to be had: taking the plain one, which is much bigger")
        needed, others = ranges("dev", "language")
        newest = ("--upgrade", "--upgrade-strategy", "eager")
        requirements = (*shlex.split(torch or needed["torch"]), *others)
        self.install("the newest that the ranges allow", *requirements, *newest)
        say(f"took {self.versions(needed)}")

    def _cpu_builds(self) -> list[str]:
        """The versions in the range of which an index has a CPU build, newest first."""
        listed = {version for _, options in TORCH_INDEXES for version in self.versions_of("torch", *options)}
        built = {version.removesuffix("+cpu") for version in listed if version.endswith("+cpu")}
        oldest = numbers(lower_ends()["torch"])
        return sorted((v for v in built if numbers(v) >= oldest), key=numbers, reverse=True)

    def versions(self, packages: Iterable[str]) -> str:
        """The versions of packages here, in words."""
        named = "(f'{name} {version(name)}' for name in sys.argv[1:])"
        code = f"import sys; from importlib.metadata import version; print(*{named}, sep=', ')"
        command = [str(self.python), "-c", code, *packages]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def versions_of(self, package: str, *options: str) -> list[str]:
        """What an index has of a package; nothing where it does not answer."""
        command = [str(self.python), "-m", "pip", "index", "versions", package, *options]
        listed = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"^Available versions: (.*)$", listed.stdout, re.MULTILINE)
        return found[1].split(", ") if found else []

    def _install_cpu_build(self, torch: str) -> bool:
        """From the configured index, else from PyTorch's, which is asked for nothing but torch."""
        for origin, options in TORCH_INDEXES:
            try:
                self.install(torch + origin, torch, "--no-deps", *options)
            except StepFailed as failure:
                if not any(words in str(failure) for words in NONE_TO_BE_HAD):
                    raise
                say("  there is none")
            else:
                return True
        return False

    def install(self, what: str, *arguments: str) -> None:
        """Run pip install; StepFailed carries the end of its log."""
        say(f"installing {what}")
        start = time.monotonic()
        pip_install = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        command = [str(self.python), *pip_install, *arguments]
        pip = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        with self.log.open("a", encoding="utf-8") as log:
            print("$", shlex.join(command), pip.stdout, sep="\n", file=log)
        if pip.returncode:
            end = "\n  ".join(pip.stdout.splitlines()[-12:])
            raise StepFailed(
                f"could not install {what}; all of pip's words are in {self.log}. Its last:\n  {end}"
            )
        say(f"  {time.monotonic() - start:.0f} s")


def gpu_torch(python: str) -> str | None:
    """The version of a Python's torch, if it is in the package's range and sees a GPU."""
    if not has_nvidia_gpu():
        return None
    probe = "import torch; print(torch.__version__, torch.cuda.is_available())"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    version, _, available = found.stdout.strip().partition(" ")
    if found.returncode or available != "True":
        return None
    return version if numbers(version) >= numbers(lower_ends()["torch"]) else None


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi is there, works and lists a GPU."""
    return bool(shutil.which("nvidia-smi")) and succeeds("nvidia-smi", "-L")


def pyproject() -> dict[str, Any]:
    """What pyproject.toml says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def ranges(*extras: str) -> tuple[dict[str, str], list[str]]:
    """The requirements of the library by name; and all but torch, with those of extras."""
    project = pyproject()["project"]
    needed = {re.split(r"[^A-Za-z0-9_.-]", line)[0]: line for line in project["dependencies"]}
    more = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return needed, [*(line for name, line in needed.items() if name != "torch"), *more]


def lower_ends() -> dict[str, str]:
    """The oldest version that pyproject.toml allows of each package the library needs."""
    found = {name: re.search(r">=([0-9.]+)", line) for name, line in ranges()[0].items()}
    return {name: bound[1] for name, bound in found.items() if bound}


def read_torch_lock(path: Path) -> str:
    """The one requirement of a torch lock file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def succeeds(*command: str) -> bool:
    """Whether a command ends with 0."""
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def say(text: str) -> None:
    """A line of progress."""
    print(f"  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
