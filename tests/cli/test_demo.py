"""demo: its report and figures, and a folder that is whole or not there."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from cli.command_line import run
from steersman.evaluation import demo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same story with few items and draws: too few to prove anything, enough to run through."""
    monkeypatch.setattr(demo, "CONTROL_ITEMS", 8)
    monkeypatch.setattr(demo, "run_demo", partial(demo.run_demo, draws=1, items=12))


@pytest.mark.long
@pytest.mark.usefixtures("small")
def test_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run("demo", "-o", out, "--seed", 1, "--json").json
    assert set(result) == {"report", "figures"}
    report = Path(result["report"]).read_text()
    assert "<html" in report
    assert "lab:moe" in report
    assert "not empty" in run("demo", "-o", out).error
    assert str(result["report"]) in run("demo", "-o", out, "--force").words


def test_the_default_folder_and_the_demos_own_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def run_demo(out: Path, **options: object) -> demo.DemoResult:
        asked.update(options, out=out)
        figures = {"studies": {}, **{name: {"findings": []} for name in demo.CHAPTERS}}
        return demo.DemoResult(out / "report.html", figures)

    monkeypatch.setattr(demo, "run_demo", run_demo)
    monkeypatch.chdir(tmp_path)
    assert "steersman-demo/report.html" in run("demo").words
    assert asked == {"out": Path("steersman-demo"), "seed": 0, "progress": True, "force": False}


def test_others_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "not empty" in run("demo", "-o", tmp_path).error
    assert "holds other files" in run("demo", "-o", tmp_path, "--force").error
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
