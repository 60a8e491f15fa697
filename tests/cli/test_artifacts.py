"""show: artifacts in words and as JSON, tables and maps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest

from artifacts.test_causal_screen import screen_of
from cli.command_line import run
from steersman import RoutingContrast, Steering


def test_show_a_steering(steering: Path) -> None:
    saved = Steering.from_pretrained(steering)
    result = run("show", steering, "--json").json
    assert set(result) == {"manifest", "strengths"}
    assert result["manifest"]["kind"] == "steering"
    assert {
        int(layer): {int(expert): strength for expert, strength in experts.items()}
        for layer, experts in result["strengths"].items()
    } == saved.strengths
    words = run("show", steering).words
    assert "2 experts activated, 3 deactivated" in words
    assert saved.fingerprint in words


def test_show_a_contrast_with_table_and_map(contrast: Path, steering: Path, tmp_path: Path) -> None:
    csv, parquet, png = (tmp_path / name for name in ("t.csv", "t.parquet", "m.png"))
    result = run("show", contrast, "--table", csv, "--heatmap", png, "--steering", steering, "--json").json
    assert result["manifest"]["kind"] == "routing_contrast"
    assert (result["table"], result["heatmap"], len(result["top"])) == (str(csv), str(png), 12)
    assert f"written: {parquet}" in run("show", contrast, "--table", parquet).words
    table = RoutingContrast.from_pretrained(contrast).table()
    pandas.testing.assert_frame_equal(pandas.read_parquet(parquet), table)
    read = pandas.read_csv(csv, float_precision="round_trip")
    pandas.testing.assert_frame_equal(read, table, check_dtype=False)
    assert np.isclose(table["risk_difference"].iloc[0], result["top"][0]["risk_difference"])
    assert png.read_bytes().startswith(b"\x89PNG")
    plain = tmp_path / "plain.png"
    assert run("show", contrast, "--heatmap", plain).status == 0
    assert plain.read_bytes() != png.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.png", "plain.png", "t.csv", "t.parquet"]


def test_files_are_not_overwritten_unasked(contrast: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("mine")
    assert "the file exists" in run("show", contrast, "--table", table).error
    assert table.read_text() == "mine"
    assert run("show", contrast, "--table", table, "--force").status == 0
    assert table.read_text().startswith("layer,expert,")


def test_what_cannot_be_written_leaves_nothing(
    contrast: Path, steering: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ".csv or .parquet" in run("show", contrast, "--table", tmp_path / "t.xlsx").error
    assert "as .png" in run("show", contrast, "--heatmap", tmp_path / "m.jpg").error
    assert "absent" in run("show", contrast, "--table", tmp_path / "absent" / "t.csv").error
    assert "with a contrast" in run("show", steering, "--table", tmp_path / "t.csv").error

    def full(frame: pandas.DataFrame, path: Path, **_: object) -> None:
        path.write_text("layer")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pandas.DataFrame, "to_csv", full)
    assert "the disk is full" in run("show", contrast, "--table", tmp_path / "t.csv").error
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_artifact(tmp_path: Path, contrast: Path) -> None:
    assert str(tmp_path) in run("show", tmp_path).error
    assert "absent" in run("show", tmp_path / "absent").error
    assert (
        "a steering is needed"
        in run("show", contrast, "--heatmap", tmp_path / "m.png", "--steering", contrast).error
    )


def test_no_artifact_forges_a_line(steering: Path, contrast: Path, tmp_path: Path) -> None:
    forged = "x\nfingerprint forged\r\x1b[2J\u2028\x85"
    shown = r"x\nfingerprint forged\r\x1b[2J\u2028\x85"
    plan = Steering.from_pretrained(steering)
    made = {
        "made": forged,
        "from": [{"name": forged, "sha256": "0" * 64}],
        "skipped": [{"layer": 0, "expert": 1, "reason": forged}],
    }
    task = {"task": forged, "sha256": "0" * 64, "role": "effect", "items": 3, "metric": forged}
    task |= {"kind": "rate", "arm": forged, "arm_kind": "steered", "strength": 1.0, "difference": 0.1}
    task |= dict.fromkeys(("low", "high", "p", "p_holm", "random_p"))
    found = {"kind": "evaluation", "sha256": "1" * 64, "created": forged, "steersman": "1", "tasks": [task]}
    replace(plan, provenance=made, evidence=(found,), model=forged, revision=forged).save_pretrained(
        tmp_path / "plan"
    )
    words = run("show", tmp_path / "plan").words
    assert words.count(shown) == 9
    counts = RoutingContrast.from_pretrained(contrast)
    source = {**counts.made_from[0], "name": forged, "shard": "1/2"}
    replace(counts, made_from=(source,), model=forged).save_pretrained(tmp_path / "counts")
    both = words + run("show", tmp_path / "counts").words
    assert f"1/2 of {shown}" in both
    assert not {line for line in both.split("\n") if line.startswith("fingerprint forged")}
    assert all(sign.isprintable() for sign in both.replace("\n", ""))
    assert "\ufffd" not in both
    assert repr(replace(plan, model=forged)).isprintable()


def test_no_screen_forges_a_line(tmp_path: Path) -> None:
    forged = "x\nfingerprint forged\x1b[2J"
    made = screen_of()
    sets = {way: replace(chosen, reason=forged) for way, chosen in made.sets.items()}
    saved = replace(made, notes=(forged,), sets=sets, harm=(), model=forged)
    saved.save_pretrained(tmp_path / "screen")
    words = run("show", tmp_path / "screen").words
    assert words.count(r"x\nfingerprint forged\x1b[2J") == 4
    assert "\nfingerprint forged" not in words
