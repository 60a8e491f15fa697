"""describe: routers by true layer index, and dense models."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.command_line import run, save_tiny


def test_describe(tiny: Path) -> None:
    result = run("describe", tiny, "--json").json
    assert (result["layers"], result["hidden_size"], result["model_type"]) == (3, 32, "olmoe")
    assert len(result["architecture"]) == 64
    assert result["weights"].startswith("bytes-sha256:")
    assert (result["dequantised"], result["chat_template"]) == (None, True)
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


def test_a_folder_without_a_tokenizer_is_described(tmp_path: Path, tiny: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    whole, result = (run("describe", folder, "--json").json for folder in (tiny, tmp_path))
    assert result == {**whole, "model": str(tmp_path), "chat_template": None}
    words = run("describe", tmp_path).words
    assert "no tokenizer in the folder, so no chat template" in words
    assert "Next" not in words
    assert "tokenizer" in run("describe", tmp_path, "--experts", "lab:refusal").error
    assert run("describe", tmp_path, "--chat-date", "2026-11-29").error
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    assert "cannot be opened as a model" in (said := run("describe", tmp_path).error)
    assert "tokenizer" not in said


def test_a_base_model_is_said_to_have_no_chat_template(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", chat=False)
    assert run("describe", plain, "--json").json["chat_template"] is False
    assert "no chat template" in run("describe", plain).words


def test_a_damaged_checkpoint(tmp_path: Path, tiny: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run("describe", tmp_path).error
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path) in run("describe", tmp_path).error
