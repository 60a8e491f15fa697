"""lab list, lab train and lab carve."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from cli.command_line import run, write_pairs
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


def test_carve_a_dense_checkpoint_and_find_its_experts(tmp_path: Path, dense: Path) -> None:
    texts, other = tmp_path / "texts.txt", tmp_path / "other.jsonl"
    texts.write_text("".join(f"The town number {n} has {n * n % 97} houses.\n" for n in range(600)))
    chats = [
        [{"role": "user", "content": f"How many towns are there beside number {n}?"}] for n in range(300)
    ]
    other.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    asked = ("lab", "carve", dense, "--texts", texts, "--texts", other, "--experts", 4, "--tokens", 4096)
    result = run(*asked, "--top-k", 2, "-o", tmp_path / "moe", "--json").json
    assert result == {
        "output": str(tmp_path / "moe"),
        **json.loads((tmp_path / "moe/carve.json").read_text()),
    }
    assert (result["class"], result["shared"], result["size"]) == ("qwen2_moe", 32, 8)
    assert [of["name"] for of in result["texts"]] == [str(texts), str(other)]
    routers = run("describe", tmp_path / "moe", "--json").json["routers"]
    assert [(router["experts"], router["top_k"], router["steerable"]) for router in routers] == [
        (4, 2, True)
    ] * 2
    pairs = write_pairs(tmp_path / "pairs.jsonl", range(30))
    contrast = run("detect", tmp_path / "moe", pairs, "-o", tmp_path / "contrast", "--json").json
    assert contrast["layers"] == [0, 1]
    words = run(*asked, "--top-k", 4, "--random", "--seed", 3, "-o", tmp_path / "control").words
    assert "top-4 of 4 experts of 8 neurons, shuffled between experts, 32 shared" in words
    assert f"steersman screen {tmp_path / 'control'} pairs.jsonl" in words


def test_carve_says_what_is_wrong(tmp_path: Path, tiny: Path, dense: Path) -> None:
    out = ("-o", tmp_path / "moe")
    assert "--texts" in run("lab", "carve", dense, *out).error
    missing = tmp_path / "nothing.txt"
    assert str(missing) in run("lab", "carve", dense, "--texts", missing, *out).error
    wrong = run("lab", "carve", tiny, "--texts", "lab:texts", *out).error
    assert f"{tiny}: no class of transformers with experts computes what olmoe does" in wrong
    assert (
        "top-24 of 8 experts"
        in run("lab", "carve", dense, "--texts", "lab:texts", "--experts", 8, *out).error
    )
    assert not (tmp_path / "moe").exists()
    occupied = run("lab", "carve", dense, "--texts", "lab:texts", "-o", dense).error
    assert f"{dense}: the folder is not empty" in occupied
