"""What a checkpoint's own generation settings do to commands: said where they act, refused for figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import run, write_pairs

ACTING = {"suppress_tokens": [5, 6], "repetition_penalty": 1.3}
PROMPTS = ["--prompt", "the river", "--max-new-tokens", 4]


def wishing(tiny: Path, folder: Path, **settings: Any) -> Path:
    """The checkpoint with these in its generation_config.json."""
    shutil.copytree(tiny, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_generate_says_what_acts_and_what_is_set_aside(tiny: Path, steering: Path, tmp_path: Path) -> None:
    asked = ["--steering", steering, *PROMPTS, "--json"]
    assert run("generate", tiny, *asked).json["generation"] == {"acting": {}, "set_aside": {}}
    model = wishing(tiny, tmp_path / "m", **ACTING, max_time=1e-9, num_beams=3, top_k=7, min_length=2)
    aside = {"max_time": 1e-9, "num_beams": 3, "min_length": 2}
    assert run("generate", model, *asked).json["generation"] == {"acting": ACTING, "set_aside": aside}
    sampled = run("generate", model, *asked, "--temperature", 1).json["generation"]
    assert sampled == {"acting": {**ACTING, "top_k": 7}, "set_aside": aside}
    words = run("generate", model, *asked[:-1]).words
    assert "settings the checkpoint's own settings acting: " in words
    assert "repetition_penalty 1.3" in words
    assert "; set aside: " in words
    assert "max_time 1e-09" in words


def test_a_clock_does_not_cut_answers(tiny: Path, steering: Path, tmp_path: Path) -> None:
    asked = ["--steering", steering, *PROMPTS, "--compare", "--json"]
    clocked = wishing(tiny, tmp_path / "m", max_time=1e-9)
    assert run("generate", clocked, *asked).json["items"] == run("generate", tiny, *asked).json["items"]


@pytest.mark.parametrize("name", ["max_time", "min_length"])
def test_figures_that_cannot_be_repeated_are_refused(
    name: str, tiny: Path, steering: Path, tmp_path: Path
) -> None:
    model = wishing(tiny, tmp_path / "m", **{name: 30})
    pairs = write_pairs(tmp_path / "pairs.jsonl", range(2))
    said = f"the model's generation_config.json sets {name} to 30, which "
    out = tmp_path / "out"
    assert run("detect", model, pairs, "-o", out, "--generate", 2).error.startswith(said)
    assert not out.exists()
    (tmp_path / "task.jsonl").write_text(
        '{"prompt": "who?", "positive": "the teacher", "negative": "a river"}\n'
    )
    asked = ["--task", tmp_path / "task.jsonl", "--steering", steering, "--no-cache", "-o", out]
    assert run("evaluate", model, *asked).error.startswith(said)
    assert not out.exists()
    assert run("detect", model, pairs, "-o", out).status == 0  # nothing is written there


@pytest.mark.parametrize(
    ("name", "value"),
    [("suppress_tokens", "abc"), ("begin_suppress_tokens", 5), ("bad_words_ids", 3)],
)
def test_what_cannot_be_carried_out_is_named(
    name: str, value: Any, tiny: Path, steering: Path, tmp_path: Path
) -> None:
    model = wishing(tiny, tmp_path / "m", **{name: value})
    pairs = write_pairs(tmp_path / "pairs.jsonl", range(2))
    (tmp_path / "task.jsonl").write_text('{"prompt": "who?", "positive": "one", "negative": "a river"}\n')
    evaluate = ["--task", tmp_path / "task.jsonl", "--random", 0, "--no-cache", "-o", tmp_path / "o"]
    for asked in (
        ["generate", model, *PROMPTS],
        ["detect", model, pairs, "-o", tmp_path / "o", "--generate", 2],
        ["evaluate", model, *evaluate],
    ):
        said = run(*asked).error
        assert said.startswith(f"the model cannot generate with what its generation_config.json sets: {name}")
    assert not (tmp_path / "o").exists()


def test_records_say_what_acted(tiny: Path, steering: Path, tmp_path: Path) -> None:
    model = wishing(tiny, tmp_path / "m", **ACTING, num_beams=3)
    pairs = write_pairs(tmp_path / "pairs.jsonl", range(2))
    detected = run("detect", model, pairs, "-o", tmp_path / "c", "--generate", 2, "--json").json
    assert detected["generation"] == ACTING
    assert "own settings acting: " in run("detect", model, pairs, "-o", tmp_path / "d", "--generate", 2).words
    assert (
        json.loads((tmp_path / "c/manifest.json").read_text())["made_from"]["from"][0]["generation"] == ACTING
    )
    (tmp_path / "task.jsonl").write_text(
        '{"prompt": "who?", "positive": "the teacher", "negative": "a river"}\n'
    )
    options = ["--random", 0, "--no-cache", "--max-new-tokens", 2, "--json"]
    asked = ["--task", tmp_path / "task.jsonl", "--match", "architecture", "--steering", steering, *options]
    found = run("evaluate", model, *asked, "-o", tmp_path / "e").json
    assert found["generation"] == {"acting": ACTING, "set_aside": {"num_beams": 3}}
    limit = next(one for one in found["limits"] if "own settings" in one)
    assert "repetition_penalty 1.3" in limit
    assert "repetition_penalty 1.3" in (tmp_path / "e/report.html").read_text()
    assert "generation" not in run("evaluate", tiny, *asked, "-o", tmp_path / "f").json
