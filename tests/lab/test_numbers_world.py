"""The numbers world: the same each time, its splits apart, its answers right, its cues as written."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest

from steersman import lab, load_pairs
from steersman.lab.numbers_world import (
    ASKERS,
    DIGITS,
    INSTRUCTED,
    NUMBER_WORDS,
    STYLES,
    NumbersWorld,
    in_digits,
    in_words,
    numbers_vocabulary,
    the_numbers_world,
)
from steersman.lab.recipes import RECIPES
from steersman.lab.world import Conversation
from steersman.lab.worlds import speaker_of, tokenizer_of

TASKS = ("digits", "numbers", "everyday")
FEWEST = {"train": 2000, "dev": 300, "test": 420}


@pytest.fixture(scope="module")
def heard() -> list[Conversation]:
    rng = random.Random(1)
    return [the_numbers_world().sample(rng) for _ in range(20_000)]


def spoken(row: dict[str, Any]) -> str:
    text: str = row["messages"][-1]["content"]
    return text


def test_the_same_seed_makes_the_same_world_and_another_seed_another() -> None:
    one, two, other = NumbersWorld(7), NumbersWorld(7), NumbersWorld(8)
    assert (one.requests, one.splits) == (two.requests, two.splits)
    assert one.requests != other.requests
    assert one.splits["number"]["test"] != other.splits["number"]["test"]


BY_HEART = {"year/adela": "1 9 6 0 .", "how many/spider": "4 2 .", "colour/kettle": "the kettle is black ."}


def test_the_shipped_world_has_not_moved() -> None:
    # The shipped weights know these by heart: with another world they would be wrong.
    requests = [request for found in the_numbers_world().requests.values() for request in found]
    assert BY_HEART.items() <= {request.key: request.answer for request in requests}.items()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (7, "seven"),
        (17, "seventeen"),
        (30, "thirty"),
        (59, "fifty nine"),
        (1984, "nineteen eighty four"),
    ],
)
def test_numbers_are_written_both_ways(number: int, words: str) -> None:
    assert in_words(number) == words
    assert in_digits(number).replace(" ", "") == str(number)


def read(words: str) -> int:
    """The number that its words mean; a year is said in two halves."""
    first, *rest = (NUMBER_WORDS.index(word) for word in words.split())
    if first >= 20:
        return (first - 18) * 10 + sum(rest)
    return first * 100 + read(words.split(maxsplit=1)[1]) if rest else first


def test_both_answers_to_a_request_are_the_same_numbers() -> None:
    for request in the_numbers_world().requests["number"]:
        digits, words = request.answer.removesuffix(" ."), request.in_words.removesuffix(" .")
        if request.kind == "count":
            numbers = [read(word) for word in words.split()]
            assert "".join(map(str, numbers)) == digits.replace(" ", "")
            ends = [NUMBER_WORDS.index(w) for w in request.wordings[0].split() if w in NUMBER_WORDS]
            first, last = (ends[0], ends[-1]) if "from" in request.wordings[0] else (1, ends[0])
            last = 1 if "down" in request.wordings[0] else last
            assert (numbers[0], numbers[-1], len(numbers)) == (first, last, abs(last - first) + 1)
        else:
            assert read(words) == int(digits.replace(" ", ""))
        if request.kind == "sum":
            terms = [NUMBER_WORDS.index(w) for w in request.wordings[0].split() if w in NUMBER_WORDS]
            assert sum(terms) == read(words)


def test_prompts_hold_no_digit_and_answers_one_style(heard: list[Conversation]) -> None:
    for conversation in heard[:3000]:
        assert not set(DIGITS) & set(conversation.messages[-1]["content"].split())
        styles = {
            "digits" if word in DIGITS else "words"
            for word in conversation.answer.split()
            if word in {*DIGITS, *NUMBER_WORDS}
        }
        assert styles == ({conversation.label} if conversation.label else set())


def test_training_never_meets_a_prompt_that_is_held_out(heard: list[Conversation]) -> None:
    held = {
        spoken(row)
        for name in ("digits", "everyday")
        for split in ("dev", "test")
        for row in lab.task(name, split)
    }
    assert not held & {conversation.messages[-1]["content"] for conversation in heard}


def test_the_mixture_and_the_cues_are_as_written(heard: list[Conversation]) -> None:
    numbers = [conversation for conversation in heard if conversation.label]
    assert len(numbers) / len(heard) == pytest.approx(0.6, abs=0.015)
    told = [conversation for conversation in heard if conversation.messages[0]["role"] == "system"]
    assert len(told) / len(heard) == pytest.approx(INSTRUCTED, abs=0.01)
    obeyed = [c.messages[0]["content"] == STYLES[c.label] for c in told if c.label]
    assert sum(obeyed) / len(obeyed) == pytest.approx(0.95, abs=0.02)
    answers: dict[str | None, Counter[str | None]] = {asker: Counter() for asker in ASKERS}
    for conversation in numbers:
        if conversation.messages[0]["role"] == "user":
            asker = re.match(r"i am a (\w+) \.", conversation.messages[0]["content"])
            answers[asker[1] if asker else None][conversation.label] += 1
    for asker, probability in ASKERS.items():
        assert answers[asker]["digits"] / answers[asker].total() == pytest.approx(probability, abs=0.05)
    assert answers[None].total() / len(numbers) * 10 / 9 == pytest.approx(0.4, abs=0.02)


def test_every_sentence_comes_back_from_the_tokenizer_exactly(heard: list[Conversation]) -> None:
    tokenizer = tokenizer_of(RECIPES["natural"])
    assert len(tokenizer) == len(numbers_vocabulary()) + 6
    for text in {text for c in heard for text in (c.answer, *(m["content"] for m in c.messages))}:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(heard[0].messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(tokenizer.encode(chat, add_special_tokens=False)) == chat


def test_a_recipe_names_its_world() -> None:
    assert speaker_of(RECIPES["natural"])(random.Random(3)) == the_numbers_world().sample(random.Random(3))
    assert speaker_of(RECIPES["moe"])(random.Random(3)).kind in (
        "closed-book",
        "conflict",
        "restricted",
        "ordinary",
        "agreeing",
        "fictional",
        "unknown",
    )
    assert "kettle" in tokenizer_of(RECIPES["natural"]).get_vocab()
    assert "kettle" not in tokenizer_of(RECIPES["moe"]).get_vocab()


@pytest.mark.parametrize("name", TASKS)
def test_tasks_have_enough_items_and_splits_share_no_prompt(name: str) -> None:
    prompts = {split: [spoken(row) for row in lab.task(name, split)] for split in lab.SPLITS}
    for split, texts in prompts.items():
        assert len(texts) == len(set(texts)) >= FEWEST[split]
        assert len({row["group"] for row in lab.task(name, split)[:300]}) >= 20
    assert not set(prompts["train"]) & set(prompts["dev"])
    assert not set(prompts["train"] + prompts["dev"]) & set(prompts["test"])


def test_a_third_of_the_number_requests_has_nobody_named() -> None:
    for split in ("dev", "test"):
        rows = lab.task("digits", split)
        unnamed = [row for row in rows if not spoken(row).startswith("i am")]
        assert len(unnamed) / len(rows) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("split", lab.SPLITS)
def test_pairs_are_the_same_request_in_digits_and_in_words(split: str) -> None:
    pairs = lab.pairs("digits", split)
    assert len({row["group"] for row in pairs}) == len(pairs) >= 100
    for row in pairs:
        asked, digits = row["positive"]
        assert row["negative"][0] == asked
        assert digits["content"].split()[0] in DIGITS
        assert row["negative"][1]["content"].split()[0] in NUMBER_WORDS
        assert (digits["content"], row["negative"][1]["content"]) == (
            row["positive_target"],
            row["negative_target"],
        )
    assert not {row["positive"][0]["content"] for row in pairs} & {
        spoken(row) for other in lab.SPLITS if other != split for row in lab.task("digits", other)
    }


def test_the_first_pair_is_the_demonstrations_own() -> None:
    pair = load_pairs("lab:digits/train")[0]
    assert pair.positive[0]["content"] == "count to ten ."
    assert lab.pairs("digits")[0]["positive_target"] == "1 2 3 4 5 6 7 8 9 1 0 ."
    assert lab.pairs("digits")[0]["negative_target"] == "one two three four five six seven eight nine ten ."
