"""import and export: end to end, in words and as JSON, and what they refuse."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cli.command_line import process, run
from rankings import ranking, reference_choice
from steersman import RoutingContrast, Steering
from steersman.interop.gguf import written
from steersman.models.loading import load_structure


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "activations.pkl"
    ranking(layers=3, experts=8, top_k=2).to_pickle(path)
    return path


def test_a_ranking_is_imported_and_selected_from(tiny: Path, published: Path, tmp_path: Path) -> None:
    contrast, plan = tmp_path / "contrast", tmp_path / "plan"
    result = run("import", published, "--model", tiny, "-o", contrast, "--json").json
    assert result["output"] == str(contrast)
    assert (result["format"], result["kind"]) == ("steermoe", "routing_contrast")
    assert result["tokens"] == [40, 57]
    assert result["top_k"] == [2, 2, 2]
    assert result["imported"] is True
    assert all(row["low"] is None and row["q"] is None for row in result["top"])
    assert RoutingContrast.from_pretrained(contrast).imported
    chosen = run("select", contrast, "-o", plan, "--activate", 6, "--deactivate", 4, "--json").json
    assert Steering.from_pretrained(plan).strengths == {
        layer: dict(sorted(experts.items()))
        for layer, experts in sorted(reference_choice(ranking(), 6, 4, 2).items())
    }
    assert len(chosen["activated"]) + len(chosen["skipped"]) == 6
    assert (
        "an imported ranking, in its order"
        in run("select", contrast, "-o", plan, "--top", 3, "--force").words
    )


def test_a_ranking_in_words(tiny: Path, published: Path, tmp_path: Path) -> None:
    words = run("import", published, "--model", tiny, "-o", tmp_path / "contrast").words
    assert "an imported ranking, 3 layers; 40 positive and 57 negative tokens" in words
    assert "no intervals" in words
    shown = run("show", tmp_path / "contrast").words
    assert "from activations.pkl" in shown
    assert "an imported ranking, 3 layers" in shown


@pytest.fixture
def configuration(tiny: Path, tmp_path: Path) -> Path:
    """A folder with the model's configuration and nothing else: no weights, no tokenizer."""
    folder = tmp_path / "configuration"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    return folder


def test_a_configuration_is_enough_to_import(
    tiny: Path, configuration: Path, published: Path, steering: Path, tmp_path: Path
) -> None:
    """What only the structure is used of needs neither weights nor a tokenizer: they are then not named."""
    words = run("import", published, "--model", configuration, "-o", tmp_path / "ranking").words
    assert "it applies with --match architecture" in words
    run("select", tmp_path / "ranking", "-o", tmp_path / "chosen", "--top", 2)
    assert run("export", steering, "--format", "easysteer", "-o", tmp_path / "plan.json").status == 0
    for plan, made in (("plan.json", "plan"), ("chosen", "")):
        folder = tmp_path / (made or plan)
        if made:
            given = ("import", tmp_path / plan, "--model", configuration, "-o", folder)
            assert run(*given, "--json").json["weights"] == "unknown:"
        asked = ("generate", tiny, "--steering", folder, "--prompt", "who", "--max-new-tokens", 2)
        assert "does not say which weights it is for" in run(*asked).error
        assert run(*asked, "--match", "architecture").status == 0


def test_a_configuration_is_enough_to_describe(tiny: Path, configuration: Path) -> None:
    whole, alone = run("describe", tiny, "--json").json, run("describe", configuration, "--json").json
    assert alone["weights"] == "unknown:"
    same = {"architecture", "layers", "hidden_size", "routers", "model_type"}
    assert {key: alone[key] for key in same} == {key: whole[key] for key in same}
    (configuration / "config.json").write_text("{}")
    assert "its configuration cannot be read" in run("describe", configuration).error


@pytest.mark.parametrize(
    ("what", "write"),
    [
        ("an array of numpy", lambda file: np.save(file, np.ones(32, np.float32))),
        ("a safetensors file", lambda file: save_file({"v": torch.ones(32)}, file)),
        (
            "a file of torch.save before PyTorch 1.6",
            lambda file: torch.save(torch.ones(32), file, _use_new_zipfile_serialization=False),
        ),
    ],
)
def test_vectors_in_forms_that_are_not_read(
    what: str, write: Callable[[Any], object], tiny: Path, tmp_path: Path
) -> None:
    with (file := tmp_path / "vectors").open("wb") as stream:
        write(stream if what == "an array of numpy" else file)
    error = run("import", file, "--model", tiny, "-o", tmp_path / "plan").error
    assert f"{file}: is {what}" in error
    assert "which is not read; save its vectors with torch.save(…)" in error


def test_bare_tensors_with_their_layers(tiny: Path, tmp_path: Path) -> None:
    torch.save(torch.ones(2, 32), file := tmp_path / "vectors.pt")
    command = ("import", file, "--model", tiny, "-o", tmp_path / "plan")
    assert "does not say of which layers: give them with --layers" in run(*command).error
    result = run(*command, "--layers", "0,2", "--json").json
    assert [vector["layer"] for vector in result["vectors"]] == [0, 2]
    (tmp_path / "plan.json").write_text('{"layer_configs": {"1": {"expert_ids": [1]}}}')
    wrong = run("import", tmp_path / "plan.json", "--model", tiny, "-o", tmp_path / "other", "--layers", "1")
    assert "--layers goes with vectors saved by torch.save" in wrong.error


def test_there_and_back_through_easysteer(tiny: Path, steering: Path, tmp_path: Path) -> None:
    file, back = tmp_path / "plan.json", tmp_path / "back"
    result = run("export", steering, "--format", "easysteer", "-o", file, "--json").json
    saved = Steering.from_pretrained(steering)
    assert result["fingerprint"] == saved.fingerprint
    assert set(json.loads(file.read_text())) == {"layer_configs"}
    again = run("import", file, "--model", tiny, "-o", back, "--json").json
    assert again["kind"] == "steering"
    assert again["fingerprint"] == saved.fingerprint == Steering.from_pretrained(back).fingerprint
    assert again["activated"] == result["activated"]
    assert "imported" in run("show", back).words
    run("import", file, "--model", tiny, "-o", back, "--scope", "answer", "--force", "--json")
    assert Steering.from_pretrained(back).edits[0].scope == "answer"
    assert (
        'ApplySpec(prompt="all"'
        in run("export", steering, "--format", "easysteer", "-o", file, "--force").words
    )
    words = run("import", file, "--model", tiny, "-o", back, "--force").words
    assert "activated 2: 0:4, 1:7" in words
    assert f"steersman chat {tiny} --steering {back}" in words


def test_a_hostile_file_in_a_process_of_its_own(tiny: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return (os.system, (f"touch {tmp_path / 'canary'}",))

    file = tmp_path / "activations.pkl"
    file.write_bytes(pickle.dumps(Evil()))
    refused = process("import", file, "--model", tiny, "-o", tmp_path / "contrast")
    assert refused.error.endswith("system, which no table of numbers needs")
    assert "refused, and nothing of it was run" in refused.error
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "contrast").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\x80\x05\x95", "damaged, or not a pickled table"),
        (b"hello", "damaged, or not a pickled table"),
        (b"{", "not valid JSON"),
        (b'{"layers": 3}', "not an EasySteer plan"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip"),
        (pickle.dumps([1, 2, 3]), "not a pickled table"),
    ],
)
def test_damaged_and_foreign_files(content: bytes, message: str, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    error = run("import", file, "--model", tiny, "-o", tmp_path / "out").error
    assert message in error
    assert str(file) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_what_import_refuses(tiny: Path, published: Path, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("import", tmp_path / "none", "--model", tiny, "-o", out).error.endswith("none: no such file")
    for content in ("just words\n", '{"positive": "a"}\n{"positive": "b"}\n'):
        (text := tmp_path / "text").write_text(content)
        error = run("import", text, "--model", tiny, "-o", out).error
        assert error.endswith("or saved vectors (.pt)")
    assert "belongs to another model" in run("import", published, "--model", dense, "-o", out).error
    assert "no such folder" in run("import", published, "--model", "./none", "-o", out).error
    assert (
        "--scope goes with a plan"
        in run("import", published, "--model", tiny, "-o", out, "--scope", "all").error
    )
    assert "Missing option '--model'" in run("import", published, "-o", out).error
    as_json = run("import", published, "--model", tiny, "-o", out, "--format", "easysteer").error
    assert "not valid JSON" in as_json
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    assert "not empty" in run("import", published, "--model", tiny, "-o", out).error


def test_what_export_refuses(steering: Path, contrast: Path, tmp_path: Path) -> None:
    out = tmp_path / "file"
    assert "ds4's map is for deepseek_v4" in run("export", steering, "--format", "ds4", "-o", out).error
    assert "a steering is needed" in run("export", contrast, "--format", "easysteer", "-o", out).error
    assert "no artifact there" in run("export", tmp_path, "--format", "easysteer", "-o", out).error
    assert not out.exists()
    out.write_text("mine")
    assert "already there" in run("export", steering, "--format", "easysteer", "-o", out).error
    assert "cannot be written" in run("export", steering, "--format", "easysteer", "-o", out / "x").error
    assert out.read_text() == "mine"


def test_presets_are_for_their_own_models(contrast: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan"
    refused = run("select", contrast, "-o", out, "--preset", "olmoe-1b-7b/safe").error
    assert "is for olmoe with 16 layers of 64 experts" in refused
    assert (
        "no preset is called 'none'; known: " in run("select", contrast, "-o", out, "--preset", "none").error
    )
    assert "--preset NAME" in run("select", contrast, "-o", out, "--preset", "a", "--top", 3).error
    assert not out.exists()


# Vectors


@pytest.fixture
def vector(tiny: Path, tmp_path: Path) -> Path:
    """A steering of the tiny model that adds a vector to the output of layer 1, for every token."""
    folder = tmp_path / "vector"
    model = load_structure(str(tiny))
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    Steering.from_vectors(model, {1: direction}, strength=1.5, scope="all").save_pretrained(folder)
    return folder


def test_there_and_back_through_gguf(tiny: Path, vector: Path, tmp_path: Path) -> None:
    file, back = tmp_path / "v.gguf", tmp_path / "back"
    result = run("export", vector, "--format", "gguf", "-o", file, "--json").json
    saved = Steering.from_pretrained(vector)
    assert result["fingerprint"] == saved.fingerprint
    assert [(row["layer"], row["strength"], row["scope"]) for row in result["vectors"]] == [(1, 1.5, "all")]
    again = run("import", file, "--model", tiny, "-o", back, "--json").json
    assert (again["format"], again["kind"], again["activated"]) == ("gguf", "steering", [])
    steering = Steering.from_pretrained(back)
    assert again["fingerprint"] == steering.fingerprint
    assert torch.equal(steering.edits[0].vectors[1], saved.edits[0].vectors[1] * 1.5)
    assert again["vectors"][0]["norm"] == pytest.approx(1.5 * result["vectors"][0]["norm"])
    words = run("import", file, "--model", tiny, "-o", back, "--scope", "answer", "--force").words
    assert "layer 1: add × 1, scope answer" in words
    assert Steering.from_pretrained(back).edits[0].scope == "answer"
    assert "--control-vector" in run("export", vector, "--format", "gguf", "-o", file, "--force").words


def test_the_format_is_guessed(tiny: Path, vector: Path, tmp_path: Path) -> None:
    direction = Steering.from_pretrained(vector).edits[0].vectors[1]
    torch.save({1: direction}, file := tmp_path / "v")
    result = run("import", file, "--model", tiny, "-o", tmp_path / "a", "--json").json
    assert result["format"] == "steering-vectors"
    # A pickle of repeng, by hand: the class is named, and nothing of that name is here.
    state = {"model_type": "olmoe", "directions": {1: direction.numpy()}}
    content = pickle.dumps(state, protocol=2)[2:-1]
    named = b"\x80\x02crepeng.extract\nControlVector\n)\x81" + content + b"b."
    file.write_bytes(named)
    result = run("import", file, "--model", tiny, "-o", tmp_path / "b", "--json").json
    assert result["format"] == "repeng"
    plans = [Steering.from_pretrained(tmp_path / name) for name in "ab"]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert torch.equal(plans[0].edits[0].vectors[1], direction)


def test_out_to_lm_eval(tiny: Path, vector: Path, tmp_path: Path) -> None:
    file = tmp_path / "v.pt"
    result = run("export", vector, "--format", "lm-eval", "-o", file, "--json").json
    assert result["format"] == "lm-eval"
    content = torch.load(file, weights_only=True)
    assert torch.equal(
        content["layers.1"]["steering_vector"], Steering.from_pretrained(vector).edits[0].vectors[1] * 1.5
    )
    words = run("export", vector, "--format", "lm-eval", "-o", file, "--model", tiny, "--force").words
    assert "steer_path=FILE" in words


def test_what_vectors_cannot_say_is_refused(
    tiny: Path, dense: Path, vector: Path, steering: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    assert "knows no experts" in run("export", steering, "--format", "gguf", "-o", out).error
    assert "vectors" in run("export", vector, "--format", "easysteer", "-o", out).error
    assert "--model goes with" in run("export", vector, "--format", "gguf", "-o", out, "--model", tiny).error
    assert "not of the steering's architecture" in run(
        "export", vector, "--format", "lm-eval", "-o", tmp_path / "v.pt", "--model", dense
    ).error  # fmt: skip
    assert not out.exists()
    out.write_bytes(written({9: np.ones(32, np.float32)}, "llama"))
    error = run("import", out, "--model", dense, "-o", tmp_path / "plan").error
    assert str(out) in error
    assert "layer 9 does not exist" in error
    error = run("import", out, "--model", tiny, "-o", tmp_path / "plan", "--format", "steering-vectors").error
    assert "no zip archive" in error
    out.write_bytes(out.read_bytes()[:-1])
    assert "out.gguf: damaged" in run("import", out, "--model", tiny, "-o", tmp_path / "plan").error
    assert not (tmp_path / "plan").exists()


def test_a_plan_for_some_tokens_is_written_for_all_on_request(
    vector: Path, tiny: Path, tmp_path: Path
) -> None:
    run("compose", vector, "-o", tmp_path / "some", "--scope", "answer")
    for form, name in (("gguf", "v.gguf"), ("lm-eval", "v.pt")):
        options = ["--format", form, "-o", tmp_path / name]
        assert "(export --scope all)" in run("export", tmp_path / "some", *options).error
        result = run("export", tmp_path / "some", *options, "--scope", "all", "--json").json
        assert result["fingerprint"] == Steering.from_pretrained(vector).fingerprint
        assert [row["scope"] for row in result["vectors"]] == ["all"]
    run("import", tmp_path / "v.gguf", "--model", tiny, "-o", tmp_path / "back")
    (edit,) = Steering.from_pretrained(tmp_path / "back").edits
    assert torch.equal(edit.vectors[1], Steering.from_pretrained(vector).edits[0].vectors[1] * 1.5)


def test_an_export_into_what_it_reads_is_refused(vector: Path) -> None:
    before = {file.name: file.read_bytes() for file in vector.iterdir()}
    for name in ("tensors.safetensors", "new.gguf"):
        found = run("export", vector, "--format", "gguf", "-o", vector / name, "--force").error
        assert "lies in what the command reads" in found
    assert {file.name: file.read_bytes() for file in vector.iterdir()} == before
