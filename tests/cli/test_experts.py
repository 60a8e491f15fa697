"""detect, merge and select, and every input that they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import run, save_tiny, tokenizer, write_pairs
from steersman import RoutingContrast, Steering
from steersman.pairs import load_pairs
from steersman.rendering import encode


def test_detect_counts_the_targets_tokens(tiny: Path, pairs_file: Path, tmp_path: Path) -> None:
    result = run("detect", tiny, pairs_file, "-o", tmp_path / "c", "--json").json
    assert {
        key: result[key] for key in ("output", "layers", "pairs", "clusters", "skipped", "weighting")
    } == {
        "output": str(tmp_path / "c"),
        "layers": [0, 1, 2],
        "pairs": 30,
        "clusters": 30,
        "skipped": 0,
        "weighting": "token",
    }
    fast, read = tokenizer(), load_pairs(pairs_file)
    assert result["tokens"] == [
        sum(len(encode(fast, pair.positive, None, where="").target) for pair in read),
        sum(len(encode(fast, pair.negative, None, where="").target) for pair in read),
    ]
    saved = RoutingContrast.from_pretrained(tmp_path / "c")
    assert saved.tokens.tolist() == result["tokens"]
    first = saved.table().iloc[0]
    assert result["top"][0]["risk_difference"] == first["risk_difference"]
    assert "planting" not in result


def test_detect_in_words(tiny: Path, tmp_path: Path) -> None:
    few = write_pairs(tmp_path / "few.jsonl", range(5))
    words = run("detect", tiny, few, "-o", tmp_path / "c", "--weighting", "pair", "--batch-size", 3).words
    assert "5 pairs in 5 clusters, 3 layers" in words
    assert "weighted by pair" in words
    assert "fewer than 20 clusters" in words
    assert "wording alone can make them" in words
    assert len(words.splitlines()) == 3 + 1 + 1 + 12 + 1 + 1 + 1 + 3


def test_on_the_lab_the_planting_is_told(tmp_path: Path) -> None:
    result = run("detect", "lab:moe", "lab:refusal/dev", "-o", tmp_path / "refusal", "--json").json
    assert result["planting"]["top"] == 12
    assert result["planting"]["precision"] == result["planting"]["right"] / 12
    assert result["planting"]["precision"] >= 0.8
    words = run("show", tmp_path / "refusal").words
    assert "lab:refusal/dev" in words


def test_merged_shards_are_the_whole(tiny: Path, contrast: Path, tmp_path: Path) -> None:
    for name, numbers in (("a", range(12)), ("b", range(12, 30))):
        assert (
            run(
                "detect", tiny, write_pairs(tmp_path / f"{name}.jsonl", numbers), "-o", tmp_path / name
            ).status
            == 0
        )
    result = run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "whole", "--json").json
    whole, once = (RoutingContrast.from_pretrained(path) for path in (tmp_path / "whole", contrast))
    assert (result["pairs"], result["clusters"]) == (30, 30)
    assert whole.activations.tolist() == once.activations.tolist()
    assert whole.q_values.tolist() == once.q_values.tolist()
    assert "30 pairs" in run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "again").words
    assert "two shards" in run("merge", tmp_path / "a", tmp_path / "a", "-o", tmp_path / "twice").error
    assert not (tmp_path / "twice").exists()


def test_select(contrast: Path, tmp_path: Path) -> None:
    arguments = ["select", contrast, "-o", tmp_path / "s", "--activate", 2, "--deactivate", 3]
    result = run(*arguments, "--json").json
    assert (len(result["activated"]), len(result["deactivated"]), result["skipped"]) == (2, 3, [])
    saved = Steering.from_pretrained(tmp_path / "s")
    assert saved.fingerprint == result["fingerprint"]
    assert {entry["strength"] for entry in result["activated"]} == {1.0}
    words = run(*arguments, "--force").words
    assert "activated 2: " in words
    assert "deactivated 3: " in words


def test_select_takes_the_options_of_the_library(contrast: Path, tmp_path: Path) -> None:
    routing = RoutingContrast.from_pretrained(contrast)
    wanted = routing.select(top=5, reverse=True, by="lower_bound", scope="answer", strength=0.5)
    options = ["--top", 5, "--reverse", "--by", "lower_bound", "--scope", "answer", "--strength", 0.5]
    assert (
        run("select", contrast, "-o", tmp_path / "s", *options, "--json").json["fingerprint"]
        == wanted.fingerprint
    )


def test_what_breaks_a_limit_is_skipped_and_told(contrast: Path, tmp_path: Path) -> None:
    table = RoutingContrast.from_pretrained(contrast).table()
    usable = int((table["risk_difference"] > 0).sum())
    result = run("select", contrast, "-o", tmp_path / "s", "--activate", usable, "--json").json
    assert len(result["activated"]) == 6  # 3 layers that choose 2
    assert len(result["skipped"]) == usable - 6
    assert set(result["skipped"][0]) == {"layer", "expert", "reason"}
    assert "skipped " in run("select", contrast, "-o", tmp_path / "t", "--activate", usable).words
    assert "asked for" in run("select", contrast, "-o", tmp_path / "u", "--activate", usable + 1).error
    assert "strength" in run("select", contrast, "-o", tmp_path / "u", "--top", 1, "--strength", 1.5).error
    assert not (tmp_path / "u").exists()


def test_by_lower_bound_needs_clusters(tiny: Path, tmp_path: Path) -> None:
    few = write_pairs(tmp_path / "few.jsonl", range(5))
    assert run("detect", tiny, few, "-o", tmp_path / "c").status == 0
    message = run("select", tmp_path / "c", "-o", tmp_path / "s", "--top", 1, "--by", "lower_bound").error
    assert "20 clusters" in message


# ------------------------------------------------------------------------------------------------ bad input


def _pairs(path: Path, **row: Any) -> Path:
    path.write_text(json.dumps({"positive": "the river is old", "negative": "the book", **row}) + "\n")
    return path


def _refused(model: Path, pairs: object, output: Path, *options: object) -> str:
    message = run("detect", model, pairs, "-o", output, *options).error
    assert not output.exists()
    assert list(output.parent.glob(f".{output.name}*")) == []
    return message


def test_bad_pairs_name_file_and_line(tiny: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "c", tmp_path / "pairs.jsonl"
    message = _refused(tiny, _pairs(path, positive_target="the sea"), out)
    assert message.startswith(f"{path}:1")
    assert 'positive side: the target "the sea" is not in the text' in message
    assert f'{path}:1: "negative" is empty' in _refused(tiny, _pairs(path, negative=""), out)
    path.write_text("")
    assert "the file is empty" in _refused(tiny, path, out)
    path.write_text('{"positive": \n')
    assert f"{path}:1: not JSON" in _refused(tiny, path, out)
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in _refused(tiny, path, out)
    assert "absent.jsonl: no such file" in _refused(tiny, tmp_path / "absent.jsonl", out)
    assert "refusal, faithfulness" in _refused(tiny, "lab:nothing", out)
    assert "train, dev, test" in _refused(tiny, "lab:refusal/all", out)


def test_too_long_for_the_model(tmp_path: Path) -> None:
    model, out = save_tiny(tmp_path / "short", context=40), tmp_path / "c"
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"positive": "the river is old", "negative": "the book"},
        {"positive": "the town", "negative": "the book " * 30},
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = _refused(model, pairs, out)
    assert message.startswith(f"{pairs}:2, negative side: ")
    assert "at most 40" in message
    result = run("detect", model, pairs, "-o", out, "--truncate", "--json").json
    assert (result["pairs"], result["skipped"]) == (1, 1)
    assert "1 pair left out" in run("detect", model, pairs, "-o", out, "--truncate", "--force").words
    pairs.write_text(json.dumps(rows[1]) + "\n")
    assert "no pair is left" in _refused(model, pairs, tmp_path / "d", "--truncate")


def test_no_template_for_messages(tmp_path: Path, pairs_file: Path) -> None:
    model = save_tiny(tmp_path / "plain", chat=False)
    assert "has no chat template" in _refused(model, pairs_file, tmp_path / "c")
    texts = _pairs(tmp_path / "texts.jsonl")
    assert run("detect", model, texts, "-o", tmp_path / "c", "--json").json["pairs"] == 1


def test_no_offsets(without_offsets: Path, tmp_path: Path) -> None:
    message = _refused(without_offsets, _pairs(tmp_path / "pairs.jsonl"), tmp_path / "c")
    assert "gives no character offsets" in message


def test_dense_models_are_refused(dense: Path, pairs_file: Path, tmp_path: Path) -> None:
    assert "has no routers" in _refused(dense, pairs_file, tmp_path / "c")


def test_an_occupied_output_is_left_alone(
    tiny: Path, contrast: Path, pairs_file: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("mine")
    for command in (
        ["detect", tiny, pairs_file],
        ["merge", contrast],
        ["select", contrast, "--top", 2],
    ):
        assert "not empty" in run(*command, "-o", kept).error
        assert "holds other files" in run(*command, "-o", kept, "--force").error
        assert [file.read_text() for file in kept.iterdir()] == ["mine"]
    (tmp_path / "file").write_text("mine")
    assert "is not a folder" in run("select", contrast, "--top", 2, "-o", tmp_path / "file").error


def test_force_replaces_an_artifact(contrast: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    first = run("select", contrast, "-o", out, "--top", 2, "--json").json["fingerprint"]
    assert "--force" in run("select", contrast, "-o", out, "--top", 3).error
    assert Steering.from_pretrained(out).fingerprint == first
    second = run("select", contrast, "-o", out, "--top", 3, "--force", "--json").json["fingerprint"]
    assert Steering.from_pretrained(out).fingerprint == second != first


def test_a_disk_that_fills_up_leaves_nothing(
    contrast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(content[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in run("select", contrast, "-o", tmp_path / "s", "--top", 2).error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind", ["cut", "changed", "nan", "newer", "foreign", "unknown key", "no tensors", "empty"]
)
def test_damaged_contrasts_are_refused(kind: str, contrast: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in contrast.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    manifest, tensors = damaged / "manifest.json", damaged / "tensors.safetensors"
    content = json.loads(manifest.read_text())
    if kind == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-8])
    elif kind == "changed":
        content["pairs"] += 1
        manifest.write_text(json.dumps(content))
    elif kind == "nan":
        content["pairs"] = float("nan")
        manifest.write_text(json.dumps(content))
    elif kind == "newer":
        content["format_version"] += 1
        manifest.write_text(json.dumps(content))
    elif kind == "foreign":
        content["format"] = "other"
        manifest.write_text(json.dumps(content))
    elif kind == "unknown key":
        content["more"] = 1
        manifest.write_text(json.dumps(content))
    elif kind == "no tensors":
        tensors.unlink()
    else:
        manifest.unlink()
        tensors.unlink()
    for command in (
        ["select", damaged, "--top", 2, "-o", tmp_path / "s"],
        ["merge", damaged, "-o", tmp_path / "s"],
    ):
        assert str(damaged) in run(*command).error
        assert not (tmp_path / "s").exists()
    assert str(damaged) in run("show", damaged).error


def test_a_steering_is_not_a_contrast(steering: Path, tmp_path: Path) -> None:
    assert "this is a steering" in run("select", steering, "-o", tmp_path / "s", "--top", 1).error
    assert "this is a steering" in run("merge", steering, "-o", tmp_path / "s").error


def test_the_input_is_not_the_output(tiny: Path, contrast: Path) -> None:
    assert (
        "this is what the command reads"
        in run("select", contrast, "-o", contrast, "--top", 1, "--force").error
    )
    assert "this is what the command reads" in run("merge", contrast, "-o", contrast, "--force").error
