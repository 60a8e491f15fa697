"""Commands give an engine options without asking for it."""

from __future__ import annotations

from pathlib import Path

from cli.command_line import run


def test_engine_options_need_an_engine(tiny: Path, pairs_file: Path, tmp_path: Path) -> None:
    done = run("detect", tiny, pairs_file, "-o", tmp_path / "out", "--engine-option", "max_model_len=64")
    assert done.status == 2
    assert "--engine-option goes with --backend vllm" in done.stderr
