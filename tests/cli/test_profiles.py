"""describe --experts, show of a profile, and its tooltips: end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.command_line import run, save_tiny
from steersman import ExpertProfile


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(
        "The river is long, and the town beside it is old.\nwho wrote the book? <b>the teacher</b>\n" * 4
    )
    return path


def test_described_kept_and_shown(tiny: Path, texts: Path, contrast: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    result = run("describe", tiny, "--experts", texts, "-o", profile, "--json").json
    assert set(result) == {"model", "output", "tokens", "texts", "experts"}
    assert result["texts"] == 8
    assert len(result["experts"]) == 3 * 8
    for layer in range(3):
        rates = [entry["rate"] for entry in result["experts"] if entry["layer"] == layer]
        assert sum(rates) == pytest.approx(2)
    saved = ExpertProfile.from_pretrained(profile)
    assert result["experts"] == json.loads(json.dumps([use.to_json() for use in saved.experts()]))
    shown = run("show", profile, "--json").json
    assert shown["experts"] == result["experts"]
    assert shown["manifest"]["kind"] == "expert_profile"
    words = run("show", profile, "--layer", 1).words
    assert "what experts are for" in words
    assert "largest mixture weights" in words
    assert run("describe", tiny, "--experts", texts, "--layer", 1, "--expert", 2, "--json").json[
        "experts"
    ] == [entry for entry in result["experts"] if (entry["layer"], entry["expert"]) == (1, 2)]
    svg = tmp_path / "map.svg"
    drawn = run("show", contrast, "--heatmap", svg, "--experts", profile, "--json").json
    assert drawn["heatmap"] == str(svg)
    text = svg.read_text()
    assert text.count("<title>") == 3 * 8
    assert "in the text: " in text
    assert "<b>" not in text


def test_describe_in_words(tiny: Path, texts: Path) -> None:
    words = run("describe", tiny, "--experts", texts).words
    assert "tokens of 8 texts" in words
    assert "Use, not effect" in words
    assert "layer  expert  used by" in words


def test_what_is_refused(
    tiny: Path, dense: Path, texts: Path, contrast: Path, steering: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "profile"
    assert "no such file" in run("describe", tiny, "--experts", tmp_path / "none").error
    assert "no routers" in run("describe", dense, "--experts", texts).error
    assert "go with --experts TEXTS" in run("describe", tiny, "--layer", 1).error
    assert (
        "layer 9 does not exist"
        in run("describe", tiny, "--experts", texts, "--layer", 9, "-o", profile).error
    )
    assert (
        "no expert 8 there" in run("describe", tiny, "--experts", texts, "--expert", 8, "-o", profile).error
    )
    assert not profile.exists()
    assert run("describe", tiny, "--experts", texts, "-o", profile).status == 0
    assert "not empty" in run("describe", tiny, "--experts", texts, "-o", profile).error
    assert "go with an expert profile; this is: steering" in run("show", steering, "--layer", 1).error
    assert "this is: expert profile" in run("show", profile, "--table", tmp_path / "t.csv").error
    png = run("show", contrast, "--heatmap", tmp_path / "m.png", "--experts", profile).error
    assert "add --heatmap FILE.svg" in png
    assert (
        "a routing contrast, an expert profile is needed"
        in run("show", contrast, "--heatmap", tmp_path / "m.svg", "--experts", contrast).error
    )


def test_profiles_of_other_models(texts: Path, contrast: Path, tmp_path: Path) -> None:
    for name, options, message in (
        ("weights", {"seed": 7}, "other weights than the contrast's"),
        ("architecture", {"experts": 4}, "experts of another architecture"),
    ):
        model, profile = save_tiny(tmp_path / name, **options), tmp_path / f"profile of {name}"
        assert run("describe", model, "--experts", texts, "-o", profile).status == 0
        assert message in run("show", contrast, "--heatmap", tmp_path / "m.svg", "--experts", profile).error


def test_a_table_and_a_map_come_both_or_not(contrast: Path, tmp_path: Path) -> None:
    table, drawing = tmp_path / "t.csv", tmp_path / "m.jpg"
    assert "as .png or .svg" in run("show", contrast, "--table", table, "--heatmap", drawing).error
    drawing = tmp_path / "m.svg"
    drawing.write_text("mine")
    assert "the file exists" in run("show", contrast, "--table", table, "--heatmap", drawing).error
    assert [path.name for path in tmp_path.iterdir()] == ["m.svg"]
    assert run("show", contrast, "--table", table, "--heatmap", drawing, "--force").status == 0
    assert drawing.read_text().startswith("<svg")
    assert table.read_text().startswith("layer,expert")
