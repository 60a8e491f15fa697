"""describe: routers by true layer index, and dense models."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.command_line import run


def test_describe(tiny: Path) -> None:
    result = run("describe", tiny, "--json").json
    assert (result["layers"], result["hidden_size"], result["model_type"]) == (3, 32, "olmoe")
    assert len(result["architecture"]) == 64
    assert result["weights"].startswith("bytes-sha256:")
    assert result["dequantised"] is None
    assert result["routers"] == [
        {
            "layer": layer,
            "experts": 8,
            "top_k": 2,
            "rule": result["routers"][0]["rule"],
            "groups": None,
            "shared_experts": 0,
            "steerable": True,
            "reason": None,
        }
        for layer in range(3)
    ]
    words = run("describe", tiny).words
    assert "3 layers, width 32" in words
    row = ["0–2", "8", "2", result["routers"][0]["rule"], "–", "0", "yes"]
    assert row in [line.split() for line in words.splitlines()]


def test_a_dense_model_has_no_routers_to_steer(dense: Path) -> None:
    result = run("describe", dense, "--json").json
    assert (result["layers"], result["routers"]) == (2, [])
    assert "No routers" in run("describe", dense).words


def test_describe_the_lab() -> None:
    result = run("describe", "lab:moe", "--json").json
    assert [router["layer"] for router in result["routers"]] == list(range(result["layers"]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("lab:nothing", "moe, moe-plain, moe-prior"),
        ("lab:moe@first", "seed"),
        ("./absent", "./absent: no such folder"),
        ("nobody-has/such-a-model", "nobody-has/such-a-model"),
        ("no name at all", "no name at all"),
    ],
)
def test_models_that_are_none(model: str, message: str) -> None:
    assert message in run("describe", model).error


def test_a_folder_without_a_model_and_a_device_that_is_not_there(tmp_path: Path, tiny: Path) -> None:
    assert str(tmp_path) in run("describe", tmp_path).error
    assert "'abacus'" in run("describe", tiny, "--device", "abacus").error


def test_a_damaged_checkpoint(tmp_path: Path, tiny: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run("describe", tmp_path).error
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path) in run("describe", tmp_path).error
