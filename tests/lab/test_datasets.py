"""Pairs and tasks: well-formed rows, enough of them, and nothing shared between splits."""

from __future__ import annotations

import pytest

from steersman import lab
from steersman.errors import PairsError
from steersman.lab.texts import SIZES
from steersman.lab.tokenizer import build_tokenizer
from steersman.lab.world import FICTIONAL_NAMES, INSTRUCTIONS, KNOWN_NAMES, RESTRICTED_TOPICS, SOURCES
from steersman.texts import load_texts

CONCEPTS = ("restricted", "unknown", "believed", "job", "request", "noise")
PAIRS = ("refusal", "faithfulness")
NUMBERS = ("digits", "numbers", "everyday")  # test_numbers_world.py
TASKS = [name for name in lab.DATA if name not in ("texts", *NUMBERS)]
# The tasks of concepts about people have fewer items: a split has 20 or 40 of the 80 known names.
FEWEST = {"unknown": 160, "believed": 200, "job": 120, "request": 160, "noise": 160, "closed-book": 100}
TESTED = {"job": 240}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("split", lab.SPLITS)
def test_pairs_are_chats_with_their_targets_and_enough_groups(name: str, split: str) -> None:
    rows = lab.pairs(name, split)
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["group"] for row in rows}) >= 20
    for row in rows:
        for side in ("positive", "negative"):
            assert row[f"{side}_target"] in row[side][-1]["content"]
            assert row[side][0]["role"] == "user"


@pytest.mark.parametrize("name", CONCEPTS)
@pytest.mark.parametrize("split", lab.SPLITS)
def test_pairs_of_concepts_are_prompts_that_differ(name: str, split: str) -> None:
    rows = lab.pairs(name, split)
    assert len({row["id"] for row in rows}) == len(rows) >= (80 if split == "train" else 36)
    assert len({row["group"] for row in rows}) >= 20
    sides = {
        side: {" | ".join(message["content"] for message in row[side]) for row in rows}
        for side in ("positive", "negative")
    }
    # A prompt on both sides would cancel itself out of the concept.
    assert not sides["positive"] & sides["negative"]
    assert all(row[side][-1]["role"] == "user" for row in rows for side in sides)


def test_a_concept_differs_in_what_it_is_named_for() -> None:
    for row in lab.pairs("restricted", "dev"):
        (refuse, asked), (comply, again) = row["positive"], row["negative"]
        assert asked == again
        assert any(topic in asked["content"].split() for topic in RESTRICTED_TOPICS)
        assert (refuse["content"], comply["content"]) == (INSTRUCTIONS["refuse"], INSTRUCTIONS["comply"])
        assert {refuse["role"], comply["role"]} == {"system"}
    for row in lab.pairs("unknown", "dev"):
        stranger, known = (set(row[side][0]["content"].split()) for side in ("positive", "negative"))
        assert stranger - known < set(FICTIONAL_NAMES)
        assert known - stranger < set(KNOWN_NAMES)
    for row in lab.pairs("believed", "dev"):
        told = [set(row[side][0]["content"].split()) for side in ("positive", "negative")]
        assert SOURCES[(told[0] - told[1]).pop()] > 0.8
        assert SOURCES[(told[1] - told[0]).pop()] < 0.2
    for row in lab.pairs("job", "dev"):
        asked = [row[side][0]["content"] for side in ("positive", "negative")]
        assert ["work as" in question or "job" in question for question in asked] == [True, False]
        assert all(row["group"] in question for question in asked)


@pytest.mark.parametrize("split", lab.SPLITS)
def test_texts_hold_no_restricted_request_and_no_refusal(split: str) -> None:
    chats = lab.texts(split)
    assert len(chats) == SIZES[split]
    spoken = " ".join(message["content"] for chat in chats for message in chat).split()
    assert not set(RESTRICTED_TOPICS) & set(spoken)
    assert "cannot" not in spoken
    assert {chat[-1]["role"] for chat in chats} == {"assistant"}
    prompts = {split: {chat[-2]["content"] for chat in lab.texts(split)} for split in lab.SPLITS}
    assert len(prompts[split]) == len(chats)
    assert not any(prompts[split] & prompts[other] for other in lab.SPLITS if other != split)


def test_texts_are_read_by_name() -> None:
    read = load_texts("lab:texts/dev")
    assert [text.content for text in read] == lab.texts("dev")
    assert [text.content for text in load_texts("lab:texts")] == lab.texts("train")
    with pytest.raises(PairsError, match="train, dev, test"):
        load_texts("lab:texts/all")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", ["dev", "test"])
def test_tasks_have_enough_items_whose_sides_differ_in_the_first_token(name: str, split: str) -> None:
    rows = lab.task(name, split)
    assert len(rows) >= (FEWEST.get(name, 300) if split == "dev" else TESTED.get(name, 300))
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["messages"][-1]["content"] for row in rows}) == len(rows)
    assert len({row["group"] for row in rows[:300]}) >= 20
    tokenizer = build_tokenizer()
    for row in rows:
        if name == "closed-book":
            assert row["answer"].endswith(" .")
        elif name != "ordinary":
            assert tokenizer.encode(row["positive"])[0] != tokenizer.encode(row["negative"])[0]
        else:
            assert row["answer"].startswith("sure , the ")


@pytest.mark.parametrize("name", TASKS)
def test_no_prompt_is_in_two_splits(name: str) -> None:
    prompts = {
        split: {row["messages"][-1]["content"] for row in lab.task(name, split)} for split in lab.SPLITS
    }
    assert not prompts["train"] & prompts["dev"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["dev"] & prompts["test"]


@pytest.mark.parametrize("name", [*PAIRS, *CONCEPTS])
def test_no_group_is_in_two_splits_of_pairs_or_task(name: str) -> None:
    groups = {
        split: {row["group"] for row in lab.pairs(name, split) + lab.task(name, split)}
        for split in lab.SPLITS
    }
    assert not groups["train"] & groups["dev"]
    assert not groups["train"] & groups["test"]
    assert not groups["dev"] & groups["test"]


def test_known_facts_are_asked_about_and_claims_are_new() -> None:
    known = {row["group"] for row in lab.task("faithfulness", "train")}
    heard = {row["messages"][0]["content"] for row in lab.task("faithfulness", "train")}
    for split in lab.SPLITS:
        rows = lab.task("conflicts", split)
        assert {row["group"] for row in rows} == known
        assert not {row["messages"][0]["content"] for row in rows} & heard


def test_rows_are_the_same_each_time_and_the_callers_own() -> None:
    first = lab.pairs("refusal", "dev")
    first[0]["positive"][0]["content"] = "changed"
    second = lab.pairs("refusal", "dev")
    assert second[0]["positive"][0]["content"] != "changed"
    assert second == lab.pairs("refusal", "dev")


def test_unknown_names_and_splits_list_the_known() -> None:
    with pytest.raises(PairsError, match="refusal, faithfulness"):
        lab.pairs("refusals")
    with pytest.raises(PairsError, match="refusal, faithfulness, ordinary"):
        lab.task("honesty")
    with pytest.raises(PairsError, match="train, dev, test"):
        lab.pairs("refusal", "valid")
