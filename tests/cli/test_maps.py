"""The map command end to end: from checkpoints and texts to a map, in parts, after a stop, drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.command_line import run
from concepts.mapped import WORDS, big, small, texts
from concepts.test_fitting import Stop
from steersman import AffineMap, fit_affine_map
from steersman.concepts.joint_moments import JointMoments


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two checkpoints and a file of texts and chats."""
    folder = tmp_path_factory.mktemp("given")
    for name, (model, read) in (("small", small()), ("big", big())):
        model.save_pretrained(folder / name)
        read.save_pretrained(folder / name)
    rows = [{"text": text} if isinstance(text, str) else {"messages": text} for text in texts(120)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "small", folder / "big", folder / "texts.jsonl"


@pytest.fixture(scope="module")
def whole(given: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "bridge"
    result = run("map", *given, "-o", output, "--json").json
    assert result["output"] == str(output)
    assert [(of["target"], of["rows"]) for of in result["maps"]] == [(0, result["rows"]), (1, result["rows"])]
    assert all(of["r2_control"] < 0.02 < of["r2"] < 1 for of in result["maps"])
    assert result["texts"] == 120
    assert result["held_out"]["texts"] > 10
    assert len(result["table"]["r2"]) == 3
    assert not output.with_name("bridge.partial").exists()
    return output


def test_words(given: tuple[Path, Path, Path], whole: Path, tmp_path: Path) -> None:
    words = run("map", *given, "-o", tmp_path / "m", "--rows", "last", "--target-layers", 1).words
    assert "120 rows (last) of 120 texts" in words
    assert "whether a concept arrives" in words
    shown = run("show", whole).words
    assert "an affine map" in shown
    assert "rank of source" in shown
    assert run("show", whole, "--json").json["manifest"]["kind"] == "affine_map"


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_heatmaps(given: tuple[Path, Path, Path], whole: Path, kind: str, tmp_path: Path) -> None:
    picture = tmp_path / f"r2.{kind}"
    made = run("map", *given, "-o", tmp_path / "m", "--heatmap", picture, "--json").json
    assert made["heatmap"] == str(picture)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    run("show", whole, "--heatmap", tmp_path / f"again.{kind}")
    assert (tmp_path / f"again.{kind}").read_bytes() == content
    assert "the file exists" in run("show", whole, "--heatmap", picture).error
    assert "written as .png or .svg" in run("show", whole, "--heatmap", tmp_path / "r2.pdf").error


def test_parts_and_one_after_the_other(given: tuple[Path, Path, Path], whole: Path, tmp_path: Path) -> None:
    options = ["--sequential", "--source-states", tmp_path / "states", "--device", "cpu"]
    for number in (1, 2):
        part = run("map", *given, "-o", tmp_path / f"p{number}", "--shard", f"{number}/2", *options, "--json")
        assert (part.json["shard"], part.json["maps"]) == (f"{number}/2", [])
    assert "merge all parts for the map" in run("show", tmp_path / "p1").words
    assert "parts are missing: 1/2" in run("merge", tmp_path / "p2", "-o", tmp_path / "m").error
    merged = run("merge", tmp_path / "p2", tmp_path / "p1", "-o", tmp_path / "m", "--json").json
    expected = AffineMap.from_pretrained(whole)
    for of in merged["maps"]:
        assert of["r2"] == pytest.approx(expected.maps[of["target"]].r2, abs=1e-6)
        assert of["source"] == expected.maps[of["target"]].source_layer
    assert "not of one map" not in run("merge", tmp_path / "p1", tmp_path / "p2", "-o", tmp_path / "n").words
    assert "a part has no R²" in run("show", tmp_path / "p1", "--heatmap", tmp_path / "r2.png").error


def test_going_on_after_a_stop(given: tuple[Path, Path, Path], whole: Path, tmp_path: Path) -> None:
    partial, calls, original = tmp_path / "bridge.partial", iter(range(100)), JointMoments.add
    with pytest.MonkeyPatch.context() as patched:

        def stop(*arguments: object, **options: object) -> None:
            if next(calls) == 2:
                raise Stop
            original(*arguments, **options)  # type: ignore[arg-type]

        patched.setattr(JointMoments, "add", stop)
        with pytest.raises(Stop):
            fit_affine_map(*map(str, given), checkpoint=partial)  # type: ignore[arg-type]
    assert "go on from it with --resume" in run("map", *given, "-o", tmp_path / "bridge").error
    found = run("map", *given, "-o", tmp_path / "bridge", "--resume", "--json").json
    expected = AffineMap.from_pretrained(whole)
    assert found["maps"][0]["r2"] == pytest.approx(expected.maps[0].r2, abs=1e-6)
    assert not partial.exists()
    assert "starting at the first text" in run("map", *given, "-o", tmp_path / "b", "--resume").stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source-layers", "7"], "layer 7 does not exist: the model has layers 0 to 2"),
        (["--source-layers", "x"], "names no layers; right is 3, 0,2-4 or all"),
        (["--rows", "first"], "'first' is not one of"),
        (["--shard", "4/3"], "right is I/N"),
        (["--concept", "nowhere/at/all"], "no artifact there"),
        (["--heatmap", "r2.gif"], "written as .png or .svg"),
        (["--shard", "1/2", "--heatmap", "r2.png"], "a part has no R² to draw"),
        (["--source-device", "nowhere"], "device 'nowhere' cannot be used here"),
    ],
)
def test_one_clear_line(
    given: tuple[Path, Path, Path], options: list[str], message: str, tmp_path: Path
) -> None:
    assert message in run("map", *given, "-o", tmp_path / "m", *options).error
    assert not (tmp_path / "m").exists()


def test_texts_that_will_not_do(given: tuple[Path, Path, Path], whole: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("\n".join(WORDS))
    message = run("map", *given[:2], tmp_path / "short.txt", "-o", tmp_path / "m").error
    assert "no text has a place, after its first token, at which both tokenizers end one" in message
    assert "is a folder; TEXTS is a file" in run("map", *given[:2], tmp_path, "-o", tmp_path / "m").error
    assert "no such file" in run("map", *given[:2], tmp_path / "none", "-o", tmp_path / "m").error
    assert "is not empty" in run("map", *given, "-o", whole).error


def test_pictures_where_none_can_be(given: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "r2.png").mkdir()
    options = ("-o", tmp_path / "m", "--force", "--heatmap")
    assert "r2.png: is a folder; a plot is a file" in run("map", *given, *options, tmp_path / "r2.png").error
    (tmp_path / "m").mkdir()
    inside = run("map", *given, *options, tmp_path / "m/r2.png").error
    assert "an artifact's folder holds nothing else" in inside
    assert [entry.name for entry in tmp_path.iterdir() if any(entry.iterdir())] == []


def test_too_few_texts_leave_nothing_behind(given: tuple[Path, Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text('"ban bar bas bat"\n"kin kir"\n')
    assert f"{file}: 1 row to fit" in run("map", *given[:2], file, "-o", tmp_path / "m").error
    assert list(tmp_path.iterdir()) == [file]


def test_concepts_and_exact_pairs(given: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"positive": f"{a} {b} ban", "negative": f"{a} {b} tor", "group": a}
        for a in WORDS[8:16]
        for b in WORDS[20:22]
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for layer in (0, 2):
        run("refine", given[0], pairs, "-o", tmp_path / f"c{layer}", "--layers", layer)
    both = ["--concept", tmp_path / "c0", "--concept", tmp_path / "c2"]
    found = run("map", *given, "-o", tmp_path / "m", *both, "--json").json
    assert [(of["source"], of["target"]) for of in found["maps"]] == [(0, 0), (2, 0), (0, 1), (2, 1)]
    assert found["texts"] == 120 + 4 * 2 * 2  # half of the groups, two pairs in each, both sides
    assert "half" in run("map", "--help").words
    without = run(
        "map", *given, "-o", tmp_path / "w", *both[:2], "--without-prompts", "--exact", "--json"
    ).json
    assert without["texts"] == 120
    assert without["table"]["rows"] is None
    check = run("transplant", "--check", tmp_path / "c2", tmp_path / "m", "--json").json
    (of_concept,) = check["concepts"].values() if isinstance(check["concepts"], dict) else check["concepts"]
    assert of_concept["clusters"] == 4
    pairs.unlink()
    message = run("map", *given, "-o", tmp_path / "n", *both[:2]).error
    assert "the concept's pairs cannot be read again" in message
    assert "--without-prompts" in message
