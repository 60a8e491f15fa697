"""The demo at a small size: what it writes, what it refuses, and that nothing half written stays."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from steersman import cli
from steersman.cli.demo import in_words
from steersman.concepts.affine_map import AffineMap
from steersman.concepts.concept import ConceptVector
from steersman.errors import ArtifactError
from steersman.evaluation import demo, figures, lab_study, natural_study, transplant_study
from steersman.experts.causal import CausalScreen
from steersman.experts.contrast import RoutingContrast
from steersman.pairs import load_pairs
from steersman.steering import Steering
from steersman.texts import load_texts


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_study, "load_pairs", lambda source: load_pairs(source)[:60])
        patch.setattr(lab_study, "DEV_ITEMS", 12)
        patch.setattr(lab_study, "GRID", (4, 12))
        patch.setattr(demo, "CONTROL_ITEMS", 8)
        patch.setattr(lab_study, "load_texts", lambda source: load_texts(source)[:200])
        patch.setattr(transplant_study, "DOSES", (0.3, 0.5))
        patch.setattr(natural_study, "SCREEN_ITEMS", 80)
        patch.setattr(figures, "DOTS_PER_INCH", 40)
        yield


@pytest.fixture(scope="module")
def made(small: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, demo.DemoResult]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo.run_demo(out, draws=2, items=16, progress=False)


def test_everything_is_there_and_says_the_same(made: tuple[Path, demo.DemoResult]) -> None:
    out, result = made
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "result.json",
        "refusal",
        "faithfulness",
        "control",
        "transplant",
        "both",
        "natural",
    }
    assert result.report == out / "report.html"
    assert json.loads((out / "result.json").read_text()) == result.figures
    assert result.to_json() == {"report": str(out / "report.html"), "figures": result.figures}
    assert list(out.parent.iterdir()) == [out]  # no draft beside it


def test_artifacts_are_those_of_the_figures(made: tuple[Path, demo.DemoResult]) -> None:
    out, result = made
    for name, study in result.figures["studies"].items():
        for arm, plan in study["plans"].items():
            assert Steering.from_pretrained(out / name / arm).fingerprint == plan["fingerprint"]
        contrast = RoutingContrast.from_pretrained(out / name / "contrast")
        assert contrast.pairs == study["detection"]["pairs"]
        assert (out / name / "map.png").read_bytes().startswith(b"\x89PNG")
    transplant, both = result.figures["transplant"], result.figures["both"]
    assert Steering.from_pretrained(out / "transplant" / "plan").fingerprint == transplant["plan"]
    assert Steering.from_pretrained(out / "both" / "plan").fingerprint == both["plan"]
    concept = ConceptVector.from_pretrained(out / "transplant" / "concept")
    bridge = AffineMap.from_pretrained(out / "transplant" / "map")
    assert (concept.pairs, bridge.rows) == (transplant["concept"]["pairs"], transplant["map"]["rows"])
    assert (out / "transplant" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert set(transplant["controls"]) == {"random", "shuffled", "shuffled, as long"}
    natural = result.figures["natural"]
    assert CausalScreen.from_pretrained(out / "natural" / "screen").found == natural["found"]
    assert (out / "natural" / "toward").is_dir() == ("screened" in natural["plans"])
    assert (out / "natural/evaluation/report.html").is_file()
    first, control = (result.figures["studies"][name]["choice"]["count"] for name in ("refusal", "control"))
    assert first == control


def test_the_report_says_what_was_measured(made: tuple[Path, demo.DemoResult]) -> None:
    out, result = made
    page = (out / "report.html").read_text()
    assert "Planted on purpose" in page
    assert "lab:moe-prior" in page
    for study in result.figures["studies"].values():
        assert study["plans"]["toward"]["fingerprint"] in page
    assert result.figures["transplant"]["plan"] in page
    assert result.figures["both"]["plan"] in page
    for command in ("describe", "detect", "select", "generate", "refine", "map", "transplant", "compose"):
        assert f"steersman {command} " in page


CLAIMS = {"refusal": 6, "faithfulness": 6, "control": 4, "transplant": 2, "both": 3, "natural": 4}
"""How many claims each chapter makes, costs among them."""


def test_summary_page_and_figures_tell_the_same_claims(made: tuple[Path, demo.DemoResult]) -> None:
    """Every chapter's, with intervals and verdicts; at this size, hardly any can be told."""
    out, result = made
    page = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", (out / "report.html").read_text())))
    said = in_words(result.to_json())
    told = [line for line in said.splitlines() if line.startswith("  ")]
    number = 0
    for name, title in demo.CHAPTERS.items():
        assert title in said
        chapter = result.figures["studies"].get(name) or result.figures[name]
        found = chapter["findings"]
        assert len(found) == (CLAIMS[name] if name != "natural" or "screened" in chapter["plans"] else 1)
        for one in found:
            assert told[number] == f"  {one['verdict']}: {one['claim']}: {one['figures']}"
            assert f"{one['verdict'].capitalize()}: {one['claim']}: {one['figures']}." in page
            number += 1
            if len(found) > 1:
                assert "95% interval" in one["figures"]
            if "2 random plans" in one["figures"]:
                assert one["verdict"] != "shown"
    assert number == len(told)
    assert "no command of its own" not in page


def test_the_chapters_of_both_levers_and_of_nothing_planted_are_drawn(
    made: tuple[Path, demo.DemoResult],
) -> None:
    page = (made[0] / "report.html").read_text()
    for name, least in (("both", 3), ("natural", 2)):
        section = page[page.index(f'<section class="card" id="{name}"') :].partition("</section>")[0]
        assert section.count("<picture>") >= least


def test_the_commands_in_the_report_are_commands(made: tuple[Path, demo.DemoResult]) -> None:
    page = html.unescape((made[0] / "report.html").read_text())
    lines = [
        line
        for block in re.findall(r"<pre[^>]*><code>(.*?)</code>", page, re.S)
        for line in block.splitlines()
    ]
    assert len(lines) >= 7
    for line in lines:
        program, name, *arguments = shlex.split(line)
        assert program == "steersman"
        # Reads the arguments as the command would, and raises where one is unknown or missing.
        cli.steersman.commands[name].make_context(name, arguments)


def test_an_occupied_folder_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(demo, "Laboratory", None)  # would fail if it were used
    for force in (False, True):
        with pytest.raises(ArtifactError, match=str(tmp_path)):
            demo.run_demo(tmp_path, progress=False, force=force)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def made_plan(out: Path) -> Steering:
    return Steering.from_pretrained(out / "both" / "plan")


def test_a_failure_at_the_end_leaves_the_earlier_demo_alone(
    made: tuple[Path, demo.DemoResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = made

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the last step")

    monkeypatch.setattr(demo.Laboratory, "study", lambda *_: SimpleNamespace(choice=None))
    monkeypatch.setattr(demo, "_save", lambda _, folder: folder.mkdir())
    monkeypatch.setattr(demo, "same_number", lambda _: None)
    monkeypatch.setattr(demo.Laboratory, "transplant", lambda *_: None)
    monkeypatch.setattr(demo, "_save_transplant", lambda _, folder: folder.mkdir())
    monkeypatch.setattr(demo.Laboratory, "levers", lambda *_: SimpleNamespace(plan=made_plan(out)))
    monkeypatch.setattr(demo, "_result", fail)
    with pytest.raises(RuntimeError, match="the last step"):
        demo.run_demo(out, progress=False, force=True)
    assert json.loads((out / "result.json").read_text()) == result.figures
    assert list(out.parent.iterdir()) == [out]


def test_threads_are_given_back_after_an_error() -> None:
    def fail() -> None:
        with demo._one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError):
            fail()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
