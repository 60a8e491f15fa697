"""lab list and lab train."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from cli.command_line import run
from steersman import lab


def test_list() -> None:
    result = run("lab", "list", "--json").json
    assert [model["name"] for model in result["models"]] == [f"lab:{name}" for name in lab.MODELS]
    assert [model["planted"] for model in result["models"]] == [
        bool(lab.planted(name)) for name in lab.MODELS
    ]
    assert [data["name"] for data in result["data"]] == [f"lab:{name}" for name in lab.DATA]
    words = run("lab", "list").words
    assert all(
        name in words
        for name in ("lab:moe-prior", "lab:target", "lab:faithfulness", "lab:texts", "train|dev|test")
    )


def test_train_hands_over_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(lab, "train", lambda *arguments, **options: asked.append((*arguments, options)))
    monkeypatch.chdir(tmp_path)
    result = run("lab", "train", "moe", "--seed", 3, "-o", tmp_path / "out", "--json").json
    assert result == {"output": str(tmp_path / "out"), "model": "lab:moe", "seed": 3}
    assert "lab:moe-prior, trained with seed 2" in run("lab", "train", "moe-prior", "--seed", 2).words
    assert asked == [
        ("moe", 3, tmp_path / "out", {"progress": True}),
        ("moe-prior", 2, Path("moe-prior-2"), {"progress": True}),
    ]


def test_what_is_trained_opens_as_a_checkpoint_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "train", partial(lab.train, steps=2))
    assert run("lab", "train", "moe-plain", "--seed", 7, "-o", tmp_path / "m", "--json").json["seed"] == 7
    assert run("describe", tmp_path / "m", "--json").json["layers"] == 4


def test_bad_names_and_occupied_folders(tmp_path: Path) -> None:
    assert (
        "moe, moe-plain, moe-prior" in run("lab", "train", "nothing", "--seed", 0, "-o", tmp_path / "x").error
    )
    (tmp_path / "mine").write_text("mine")
    assert str(tmp_path) in run("lab", "train", "moe", "--seed", 0, "-o", tmp_path).error
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
