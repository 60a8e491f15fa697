"""demo: its report and figures, and a folder that is whole or not there."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cli.command_line import run, save_tiny, tokenizer
from steersman.evaluation import demo, model_demo


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


@pytest.fixture
def small_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny random chat model, and a demo of a few candidates, draws and tokens."""
    for name, value in (("CONTROLS", 2), ("SPOKEN", 4), ("TEXT_TOKENS", 24), ("CARVED_TOKENS", 4096)):
        monkeypatch.setattr(model_demo, name, value)
    monkeypatch.setattr(model_demo, "EXPERTS", 4)
    monkeypatch.setattr(model_demo, "TOP_K", 3)
    monkeypatch.setattr(model_demo, "DOSES", (0.2, 0.4))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_the_demo_on_a_model_of_ones_own(small_dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "real"
    found = run("demo", "--model", small_dense, "-o", out, "--json").json
    figures = found["figures"]
    assert {one["prompt"] for one in figures["conversation"]} == set(model_demo.CONVERSATION)
    assert all(one["verdict"] in ("not shown", "cannot tell") for one in figures["findings"])  # 2 draws
    assert json.loads((out / "result.json").read_text())["figures"] == figures
    page = (out / "report.html").read_text()
    assert "A conversation" in page
    assert "Planted on purpose" not in page
    assert {path.name for path in out.iterdir()} - {"plan"} == model_demo.OURS - {"plan"}
    assert run("describe", out / "moe", "--json").json["routers"][0]["experts"] == 4
    said = run("demo", "--model", small_dense, "-o", out).error
    assert "not empty" in said


def test_a_model_that_cannot_chat_has_no_conversation(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", chat=False)
    assert "has no chat template" in run("demo", "--model", plain, "-o", tmp_path / "out").error
    assert not (tmp_path / "out").exists()
