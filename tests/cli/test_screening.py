"""screen, and select and show of a screen, from the command line; a kill and what comes after it."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.command_line import run
from steersman import CausalScreen, Steering
from steersman.progress import units_done
from waiting import HANGING, wait_until

QUICK = ("lab:moe", "lab:faithfulness/train", "--limit", 40, "--at-most", 1, "--exact-runs", 4)
DETECT = ("detect", "lab:moe", "lab:faithfulness/dev", "--batch-size", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("screens")
    assert run(*DETECT, "-o", place / "counted").status == 0
    found = run("screen", *QUICK, "--contrast", place / "counted", "-o", place / "causes", "--json").json
    (place / "said.json").write_text(json.dumps(found))
    return place


def test_screen_says_what_it_found(folder: Path) -> None:
    said = json.loads((folder / "said.json").read_text())
    screen = CausalScreen.from_pretrained(folder / "causes")
    assert said["found"] is True
    assert (said["items"], said["clusters"], said["choosing_items"]) == (20, 20, 20)
    assert said["layers"] == [0, 1, 2, 3]
    assert said["signs"] == ["deactivate", "activate"]
    assert [source["kind"] for source in said["made_from"]] == ["items", "routing_contrast"]
    (pick,) = said["sets"]["toward"]["experts"]
    assert (pick["layer"], pick["expert"], pick["strength"]) in {
        (p.layer, p.expert, p.strength) for p in screen.sets["toward"].picks
    }
    assert set(said["agreement_with_risk_difference"]) == {"deactivate", "activate"}
    first = said["top"][0]
    assert first["causal_rank"] == 1
    sizes = [max(abs(row[f"{sign}_effect"]) for sign in said["signs"]) for row in said["top"]]
    assert sizes == sorted(sizes, reverse=True)
    assert {"risk_difference", "observational_rank", "deactivate_q", "passes"} <= first.keys()
    assert not (folder / "causes.partial").exists()


def test_show_has_both_ranks_side_by_side(folder: Path, tmp_path: Path) -> None:
    words = run("show", folder / "causes").words
    assert "a causal screen" in words
    assert "causal rank" in words
    assert "risk difference" in words
    assert "toward: " in words
    assert "then it stopped: as many as asked for: 1 expert" in words
    table = tmp_path / "t.csv"
    found = run("show", folder / "causes", "--table", table, "--json").json
    assert found["manifest"]["kind"] == "causal_screen"
    assert found["table"] == str(table)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 128
    assert [row["causal_rank"] for row in rows[:2]] == ["1", "2"]
    assert run("select", folder / "causes", "-o", tmp_path / "plan").status == 0
    picture = tmp_path / "m.png"
    said = run("show", folder / "causes", "--heatmap", picture, "--steering", tmp_path / "plan").words
    assert f"written: {picture}" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "written as .png" in run("show", folder / "causes", "--heatmap", tmp_path / "m.svg").error
    assert "--experts with a contrast" in run("show", folder / "causes", "--experts", tmp_path).error


def test_select_takes_the_chosen_set_or_so_many(folder: Path, tmp_path: Path) -> None:
    screen = CausalScreen.from_pretrained(folder / "causes")
    chosen = run("select", folder / "causes", "-o", tmp_path / "a", "--json").json
    assert chosen["by"] == "causal"
    assert len(chosen["activated"]) + len(chosen["deactivated"]) == 1
    assert Steering.from_pretrained(tmp_path / "a").strengths == screen.sets["toward"].strengths
    words = run(
        "select", folder / "causes", "-o", tmp_path / "b", "--by", "causal", "--reverse", "--top", 2
    ).words
    assert "steering" in words
    plan = Steering.from_pretrained(tmp_path / "b")
    assert plan.strengths == screen.select(top=2, reverse=True).strengths
    assert plan.provenance["from"][0]["kind"] == "causal_screen"


def test_select_refuses_what_does_not_go_together(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    assert (
        "needs a causal screen"
        in run("select", folder / "counted", "-o", out, "--by", "causal", "--top", 1).error
    )
    assert (
        "needs a contrast"
        in run("select", folder / "causes", "-o", out, "--by", "lower_bound", "--top", 1).error
    )
    assert "999 experts" in run("select", folder / "causes", "-o", out, "--top", 999).error
    assert "presets are sizes" in run("select", folder / "causes", "-o", out, "--preset", "a/b").error
    assert not out.exists()


def test_screen_refuses_what_it_cannot_read(tmp_path: Path, folder: Path) -> None:
    out = ("-o", tmp_path / "x")
    assert "no negative answer" in run("screen", "lab:moe", "lab:ordinary/train", *out).error
    assert "no such task" in run("screen", "lab:moe", "lab:nothing/train", *out).error
    assert "--at-most" in run("screen", *QUICK[:2], "--at-most", 0, *out).error
    assert "right is a q" in run("screen", *QUICK[:2], "--gate-q", 2, *out).error
    assert "no such task" in run("screen", *QUICK, "--keep", "lab:none", *out).error
    assert "not empty" in run("screen", *QUICK, "-o", folder / "causes").error
    assert not (tmp_path / "x").exists()


def test_sweep_measures_sets_by_their_number(tmp_path: Path, folder: Path) -> None:
    asked = ("sweep", "lab:moe", folder / "causes", "lab:faithfulness/dev", "--limit", 6, "--sizes", "1,3")
    asked = (*asked, "--random", 2, "--kind", "activated")
    files = ("--figure", tmp_path / "s.png", "--table", tmp_path / "s.csv")
    found = run(*asked, *files, "--json").json
    assert (found["items"], found["task"]) == (6, "lab:faithfulness/dev")
    assert [(row["direction"], row["experts"]) for row in found["sets"]] == [
        ("toward", 1),
        ("toward", 3),
        ("reversed", 1),
        ("reversed", 3),
    ]
    assert {row["verdict"] for row in found["sets"]} == {"cannot tell"}  # two draws show nothing
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 5
    words = run(*asked, "--by", "answer").words
    assert "95 % of random sets" in words
    assert "d unsteered" in words


def test_sweep_refuses_what_it_cannot_do(tmp_path: Path, folder: Path) -> None:
    asked = ("sweep", "lab:moe", folder / "causes", "lab:faithfulness/dev")
    assert "whole numbers from 1" in run(*asked, "--sizes", "1,many").error
    assert "whole numbers from 1" in run(*asked, "--sizes", "0").error
    assert "size 9999 is more experts than any ranking has" in run(*asked, "--sizes", "1,9999").error
    assert "written as .csv" in run(*asked, "--table", tmp_path / "t.txt").error
    assert "other weights" in run("sweep", "lab:moe-plain", *asked[2:]).error
    assert "another architecture" in run("sweep", "lab:natural", *asked[2:]).error
    assert "no negative answer" in run(*asked[:3], "lab:ordinary/dev", "--figure", tmp_path / "f.png").error
    assert not (tmp_path / "f.png").exists()


def test_a_gate_too_high_is_no_error_and_said(tmp_path: Path) -> None:
    out = tmp_path / "none"
    words = run(
        "screen", *QUICK[:-2], "--method", "estimate", "--signs", "activate", "--gate-effect", 60, "-o", out
    ).words
    assert "no effect of 128 experts passes the gate" in words
    assert "the screen found nothing to steer" in run("select", out, "-o", tmp_path / "p").error
    assert "no expert" in run("show", out).words


@pytest.mark.long
def test_a_kill_changes_nothing(tmp_path: Path) -> None:
    """kill -9 after anything was saved, again and again: the same JSON."""
    arguments = [
        "screen",
        *map(str, QUICK),
        "--keep",
        "lab:ordinary/dev",
        "--harm",
        "lab:ordinary/dev",
        "--json",
    ]
    whole = run(*arguments, "-o", tmp_path / "c").json
    (tmp_path / "other").mkdir()
    out, partial = tmp_path / "other" / "c", tmp_path / "other" / "c.partial"
    command = [str(Path(sys.executable).with_name("steersman")), *arguments, "-o", str(out)]
    for _ in range(3):
        before = units_done(partial)
        process = subprocess.Popen([*command, *(["--resume"] if before else [])], stdout=subprocess.PIPE)
        wait_until(lambda before=before: units_done(partial) > before, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=HANGING)
        assert process.returncode == -signal.SIGKILL, "it ended before the kill"
        assert units_done(partial) > before
    done = units_done(partial)
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    found = json.loads(again.stdout)
    assert found.pop("resumed_after") == done
    assert {**found, "output": ""} == {**whole, "output": ""}
    assert not partial.exists()
