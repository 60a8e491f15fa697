"""The emotions experiment of docs/emotions.py: its counts are whole, and its scoring is what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cli.command_line import tokenizer
from steersman import Steering, load_model

FEELINGS = {"joy": "friend gift sun song", "rage": "theft noise lie queue", "woe": "loss rain grave debt"}


def script() -> ModuleType:
    file = Path(__file__).parent.parent / "docs/emotions.py"
    spec = importlib.util.spec_from_file_location("emotions", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["emotions"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


EMOTIONS = script()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenarios")
    for feeling, words in FEELINGS.items():
        sentences = [
            f"There is a {word}, {number} of them." for word in words.split() for number in (1, 2, 3)
        ]
        (folder / f"{feeling}.json").write_text(json.dumps(sentences))
    return folder


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[Any, str]:
    monkeypatch.setattr(sys, "argv", ["emotions.py", *map(str, words)])
    EMOTIONS.main()
    return json.loads(Path(words[-1]).read_text()), capsys.readouterr().out


@pytest.mark.parametrize("mapped", [False, True], ids=["its own concepts", "transplanted"])
def test_every_arm_is_counted(
    mapped: bool,
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (texts := tmp_path / "texts.txt").write_text(
        "\n".join(f"There were {n} of them there." for n in range(30))
    )
    more = ("--source", checkpoint, "--texts", texts) if mapped else ("--shots",)
    strengths = ("dose:0.5", "dose:2")
    options = (
        "--strengths",
        *strengths,
        "--draws",
        3,
        "--limit",
        4,
        *more,
        "--json",
        tmp_path / "counts.json",
    )
    report, words = run(monkeypatch, capsys, checkpoint, data, *options)
    expected = [
        ("unsteered", ""),
        *((a, s) for s in strengths for a in ("concept", "random", "labels shuffled")),
    ]
    assert [(arm["emotion"], arm["arm"], arm["strength"]) for arm in report["arms"]] == [
        (feeling, *arm) for feeling in FEELINGS for arm in expected
    ]
    for arm in report["arms"]:
        assert arm["own"] == arm["other"] == 4
        assert all(
            0 <= arm[f"{kind}_{what}"] <= 4 for kind in ("own", "other") for what in ("token", "logit")
        )
    assert all(0 <= found["auroc"] <= 1 for found in report["concepts"].values())
    assert len(words.splitlines()) == 1 + len(expected)


def test_chances_are_those_of_each_row_alone(checkpoint: Path) -> None:
    model, tok = load_model(str(checkpoint))
    plan = Steering.from_vectors(model, {1: torch.ones(32)}, strength=0.5, scope="answer")
    words = ["joy", "rage", "overjoyed"]
    prompts = [EMOTIONS.prompt(text) for text in ("Rain.", "A much longer one than that.", "Sun, at last.")]
    plans = [None, plan, plan]
    namer = EMOTIONS.Namer(model, tok, words, batch_size=6)  # two prompts at once
    (_, _), (chances, said) = namer(prompts, [[plan, plan, None], plans])
    for row, (prompt, each) in enumerate(zip(prompts, plans, strict=True)):
        for column, word in enumerate(words):
            start, whole = (tok(text).input_ids for text in (prompt, f"{prompt} {word}"))
            edited = each or plan * 0
            with torch.no_grad(), edited.apply(model, prompt_lengths=[len(start)]):
                logits = model(torch.tensor([whole])).logits[0, len(start) - 1 : -1].log_softmax(-1)
            expected = torch.tensor(whole[len(start) :])
            assert float(chances[row, column]) == pytest.approx(
                float(logits.gather(1, expected[:, None]).sum()), abs=1e-4
            )
            assert bool(said[row, column]) == bool((logits.argmax(-1) == expected).all())


def test_a_plan_that_says_a_word_is_seen_to_say_it(checkpoint: Path) -> None:
    """The output direction of a word's token, added before the head: it becomes likeliest and is said."""
    model, tok = load_model(str(checkpoint))
    words = ["joy", "rage", "woe"]
    namer = EMOTIONS.Namer(model, tok, words, batch_size=8)
    namer.words = [[40], [50], [60]]  # of one token each
    plan = Steering.from_vectors(model, {2: model.lm_head.weight[50].detach()}, strength=100, scope="answer")
    ((chances, said),) = namer([EMOTIONS.prompt("Rain."), EMOTIONS.prompt("Sun.")], [[plan, plan]])
    assert chances.argmax(1).tolist() == [1, 1]
    assert said.tolist() == [[False, True, False]] * 2


def test_words_that_look_alike_are_refused(checkpoint: Path) -> None:
    model, tok = load_model(str(checkpoint))
    with pytest.raises(SystemExit, match="does not tell the words"):
        EMOTIONS.Namer(model, tok, ["joy", "joy"], batch_size=8)
