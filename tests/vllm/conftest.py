"""Tests inside the engine: small, on the CPU, in this process. Where vLLM is not installed, none of them.

This folder has no `__init__.py`, and must not get one: pytest puts tests/ on the path, and `import vllm`
would then find this folder instead of the engine.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path

# Before vLLM is imported anywhere: its settings are read once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two engines beside each other
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
import torch

NOT_HERE = "vLLM is not installed here: `make test-engine`"
# Its packages by name: a search for the module `vllm` would find this folder.
INSTALLED = {name for name in ("vllm", "vllm-cpu") if any(importlib.metadata.distributions(name=name))}

if INSTALLED and not torch.cuda.is_available():
    # Where Triton is, our kernels are interpreted; it looks when it is imported, and vLLM imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

WITHOUT = ("test_device_kernels.py", "test_kernels_compile.py")
"""Files that need Triton instead, and say so themselves."""


class NotHere(pytest.Module):
    """A file of tests that is not even imported."""

    def collect(self) -> Iterable[pytest.Item]:
        pytest.skip(NOT_HERE, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip each file here as one, for a reason that tests/conftest.py counts."""
    return None if INSTALLED or module_path.name in WITHOUT else NotHere.from_parent(parent, path=module_path)
