"""The date that chats were rendered with is part of a run: kept, told when resumed, refused when merged."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steersman import (
    ArtifactError,
    ConceptVector,
    ModelError,
    PlanError,
    RoutingContrast,
    describe_experts,
    detect_experts,
    evaluate,
    fit_affine_map,
    load_model,
    load_pairs,
    merge_affine_maps,
    merge_contrasts,
    refine_concept,
    screen_experts,
)
from steersman.chat_record import ChatRecord, chats_behind
from steersman.chats.format import chat_format
from steersman.lab.tokenizer import CHAT_TEMPLATE

DATED = "{{ strftime_now('%d %B %Y') ~ ' ' }}" + CHAT_TEMPLATE
FIRST, SECOND = "2026-11-29", "2026-11-30"
PAIRS = load_pairs("lab:refusal/dev")[:24]
TEXTS = [
    [{"role": "user", "content": f"{word} {one} {more} ."}]
    for word in ("where", "who", "what")
    for one in "abcde"
    for more in "abcdefghijklm"
]


@functools.cache
def opened(day: str, name: str = "lab:moe") -> tuple[Any, Any]:
    return load_model(name, device="cpu", chat_template=DATED, chat_date=day)


def detected(day: str, **options: Any) -> RoutingContrast:
    return detect_experts(*opened(day), PAIRS, batch_size=24, **options)


def mapped(day: str, **options: Any) -> Any:
    sides = opened(day, "lab:source"), opened(SECOND, "lab:source")
    return fit_affine_map(*sides, TEXTS, source_layers=[1], target_layers=[1], **options)


def evaluated(day: str, **options: Any) -> Any:
    quiet = {"limit": 4, "max_new_tokens": 2, "random": 0, "shown": 0}
    return evaluate(*opened(day), task="lab:refusal/dev", **quiet, **options)


def screened(day: str, **options: Any) -> Any:
    few = {"limit": 40, "exact_runs": 1, "at_most": 0, "method": "estimate", "batch_size": 64}
    return screen_experts(*opened(day), "lab:faithfulness/train", **few, **options)


RUNS: dict[str, tuple[Callable[..., Any], str]] = {
    "detect": (detected, "--chat-date"),
    "map": (mapped, "--source-chat-date"),
    "evaluate": (evaluated, "--chat-date"),
    "screen": (screened, "--chat-date"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_another_day_says_which_and_how_to_go_on(name: str, tmp_path: Path) -> None:
    run, option = RUNS[name]
    run(FIRST, checkpoint=tmp_path / "partial")
    with pytest.raises(ArtifactError) as raised:
        run(SECOND, checkpoint=tmp_path / "partial", resume=True)
    line = str(raised.value)
    assert f"({FIRST} there, {SECOND} here): give {option} {FIRST} to go on" in line
    assert "tokenization" not in line
    run(FIRST, checkpoint=tmp_path / "partial", resume=True)


SELDOM = "{% if messages[0].role == 'system' %}{{ strftime_now('%Y ') }}{% endif %}" + CHAT_TEMPLATE
"""Asks for the date only where there is a system message."""


@pytest.mark.parametrize("name", ["evaluate", "screen"])
def test_a_date_is_part_of_a_run_where_a_chat_of_it_asks(name: str, tmp_path: Path) -> None:
    model, tokenizer = load_model("lab:moe", device="cpu", chat_template=SELDOM, chat_date=FIRST)
    few: dict[str, Any] = {"limit": 40, "exact_runs": 1, "at_most": 0, "method": "estimate"}
    run: Callable[..., Any] = functools.partial(
        screen_experts, model, tokenizer, "lab:faithfulness/dev", **few
    )
    if name == "evaluate":
        few = {"limit": 4, "max_new_tokens": 2, "random": 0, "shown": 0}
        run = functools.partial(evaluate, model, tokenizer, task="lab:refusal/dev", **few)
        assert run(instruction="be brief .").to_json()["chats"]["date"] == FIRST
    with pytest.raises(ModelError, match="asks for no date in these chats"):
        run()
    chat_format(tokenizer).dated = False
    made = run(checkpoint=tmp_path / "partial")
    assert (made.to_json()["chats"]["date"] if name == "evaluate" else made.chat.date) is None
    chat_format(tokenizer).date = datetime.date(2030, 1, 1)
    run(checkpoint=tmp_path / "partial", resume=True)


def test_kept_states_of_another_day_are_not_used(tmp_path: Path) -> None:
    mapped(FIRST, source_states=tmp_path / "states")
    with pytest.raises(ArtifactError, match=f"give --source-chat-date {FIRST}"):
        mapped(SECOND, source_states=tmp_path / "states")
    mapped(FIRST, source_states=tmp_path / "states")


def test_shards_of_two_days_are_not_merged(tmp_path: Path) -> None:
    parts = [detected(day, shard=f"{number}/2") for number, day in ((1, FIRST), (2, SECOND))]
    saved = []
    for number, part in enumerate(parts):
        part.save_pretrained(tmp_path / str(number))
        saved.append(RoutingContrast.from_pretrained(tmp_path / str(number)))
    for of in (parts, saved):
        with pytest.raises(PlanError) as raised:
            merge_contrasts(of)
        assert f"({FIRST} and {SECOND})" in str(raised.value)
        assert f"--chat-date {FIRST}" in str(raised.value)
    merged = merge_contrasts([parts[0], detected(FIRST, shard="2/2")])
    assert merged.chat == parts[0].chat == detected(FIRST).chat


def test_parts_of_a_map_of_two_days_are_not_merged() -> None:
    parts = [mapped(day, shard=f"{number}/2") for number, day in ((1, FIRST), (2, SECOND))]
    with pytest.raises(ArtifactError) as raised:
        merge_affine_maps(parts)
    assert f"({FIRST} and {SECOND})" in str(raised.value)
    assert f"--source-chat-date {FIRST}" in str(raised.value)
    merged = merge_affine_maps([parts[0], mapped(FIRST, shard="2/2")])
    assert (merged.source.chat.date, merged.target.chat.date) == (FIRST, SECOND)


def test_artifacts_and_plans_keep_how_chats_were_rendered(tmp_path: Path) -> None:
    contrast = detected(FIRST)
    expected = contrast.chat
    assert isinstance(expected, ChatRecord)
    assert (expected.date, dict(expected.arguments)) == (FIRST, {})
    concept = refine_concept(*opened(FIRST), PAIRS, layers=[1], batch_size=24)
    profile = describe_experts(*opened(FIRST), TEXTS)
    assert concept.chat == profile.chat == screened(FIRST).chat == expected
    assert evaluated(FIRST).to_json()["chats"] == expected.to_json()
    concept.save_pretrained(tmp_path / "concept")
    assert ConceptVector.from_pretrained(tmp_path / "concept").chat == expected
    assert contrast.select(top=2).provenance["chat"] == expected.to_json()
    assert concept.steering(1.0).provenance["concept"]["chat"] == expected.to_json()


def test_texts_alone_were_rendered_by_nothing() -> None:
    plain = [{"positive": f"{word} is here", "negative": f"{word} is not"} for word in "abcdefgh"]
    assert detect_experts(*opened(FIRST), plain).chat is None
    assert describe_experts(*opened(FIRST), ["a text", "another"]).chat is None
    assert refine_concept(*opened(FIRST), plain, layers=[1]).chat is None


def test_the_chats_behind_a_plan() -> None:
    """Each way of rendering once; of a transplant that of its own model; another tool's words are none."""
    one, other = ({"chat": ChatRecord(sign * 64, {"n": 1}).to_json()} for sign in "ab")
    concept = {"made": "concept", "concept": one}
    assert [of.template_sha256[0] for of in chats_behind({"from": [concept, other, one]})] == ["a", "b"]
    assert [of.template_sha256[0] for of in chats_behind({**concept, "map": other})] == ["b"]
    assert chats_behind({**concept, "map": {"source": "small"}}) == []
    for told in ("yes", {"template_sha256": 3}, ["a"], None):
        assert chats_behind({"chat": told}) == []
    assert chats_behind({"chat": {"template_sha256": "a", "arguments": "x", "date": 4}}) == [ChatRecord("a")]
