"""lab:natural: the shipped model answers right, in either style about as often, and obeys an instruction."""

from __future__ import annotations

import pytest
import torch

from cli.command_line import run
from steersman import lab
from steersman.evaluation.judges import judge_numerals, judge_whole_answer
from steersman.lab.numbers_world import STYLES


@pytest.fixture(scope="module")
def opened() -> tuple:
    return lab.load("natural")


def answers(opened: tuple, rows: list[dict], system: str = "") -> list[str]:
    model, tokenizer = opened
    told = [{"role": "system", "content": system}] if system else []
    prompts = [
        tokenizer.apply_chat_template([*told, *row["messages"]], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    batch = tokenizer(prompts, add_special_tokens=False, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_numbers_are_right_and_in_either_style(opened: tuple) -> None:
    rows = lab.task("digits", "dev")[:200]
    said = answers(opened, rows)
    styles = [judge_numerals(text, "", None) for text in said]
    assert 0.35 <= styles.count("positive") / len(rows) <= 0.65
    assert styles.count("neither") <= 2
    right = [
        judge_whole_answer(text, row["positive"], row["negative"])
        for text, row in zip(said, rows, strict=True)
    ]
    assert right.count("neither") <= 20


def test_everyday_requests_are_answered_right(opened: tuple) -> None:
    rows = lab.task("everyday", "dev")[:100]
    said = answers(opened, rows)
    assert sum(text == row["answer"] for text, row in zip(said, rows, strict=True)) >= 95


@pytest.mark.parametrize(("style", "side"), [("digits", "positive"), ("words", "negative")])
def test_an_instruction_decides(opened: tuple, style: str, side: str) -> None:
    said = answers(opened, lab.task("digits", "dev")[:100], STYLES[style])
    assert [judge_numerals(text, "", None) for text in said].count(side) >= 95


def test_described_as_what_it_is() -> None:
    assert lab.planted("natural") == {}
    said = run("describe", "lab:natural", "--json").json
    assert [(router["experts"], router["top_k"], router["steerable"]) for router in said["routers"]] == [
        (64, 8, True)
    ] * 3
    assert "lab:natural" in run("lab", "list").words
