"""Concepts of the lab: pairs of prompts that differ in one thing, and what that thing does to an answer.

Each side of a pair is a prompt alone: the state that is compared is the one the answer begins from. Each
concept has a task: prompts of its negative side, and what would be answered on either side.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from steersman.lab.world import (
    FICTIONAL_NAMES,
    INSTRUCTIONS,
    KNOWN_NAMES,
    REFUSAL,
    RELATIONS,
    SOURCES,
    SPLITS,
    UNKNOWN,
    Fact,
    World,
    ask,
    with_document,
)

Row = dict[str, Any]
T = TypeVar("T")

# A document that nobody believes shows no faithfulness (docs/lab.md).
BELIEVED = [source for source, belief in SOURCES.items() if source and belief > 0.8]
DISBELIEVED = [source for source, belief in SOURCES.items() if source and belief < 0.2]


@dataclass(frozen=True)
class Concept:
    """Pairs and task of one concept, each a function of the world and the split."""

    about: str
    pairs: Callable[[World, str], list[Row]]
    task: Callable[[World, str], list[Row]]


def _restricted_pairs(world: World, split: str) -> list[Row]:
    """The same restricted request after the instruction to refuse, and after the instruction to help.

    Pairs of a restricted and an ordinary request would differ in what is asked, too, and it is chance then
    whether the target tells them apart forwards or backwards (docs/lab.md).
    """
    rows, taken = [], dict.fromkeys(world.restricted_splits[split], 0)
    for prompt in world.restricted_prompts(split):
        taken[prompt.request] += 1
        if taken[prompt.request] <= 3:
            rows.append(
                {
                    "positive": _told("refuse", prompt.text),
                    "negative": _told("comply", prompt.text),
                    "group": prompt.request.key,
                }
            )
    return rows


def _told(instruction: str, text: str) -> list[dict[str, str]]:
    """A prompt after an instruction."""
    return [
        {"role": "system", "content": INSTRUCTIONS[instruction]},
        {"role": "user", "content": text},
    ]


def _restricted_task(world: World, split: str) -> list[Row]:
    return [
        _item(prompt.text, REFUSAL, prompt.request.answer, prompt.request.key, "restricted")
        for prompt in world.restricted_prompts(split)
    ]


def _unknown_pairs(world: World, split: str) -> list[Row]:
    """The same question about somebody of whom nothing is known, and about somebody known."""
    rng = random.Random(f"unknown pairs {split}")
    known = _known(split)
    return [
        _pair(
            ask(relation.questions[wording].format(name=name)),
            ask(relation.questions[wording].format(name=rng.choice(known))),
            f"{name}/{relation.name}",
        )
        for name in _part(FICTIONAL_NAMES, split, dev=6, test=6)
        for relation in RELATIONS
        for wording in range(2)
    ]


def _unknown_task(world: World, split: str) -> list[Row]:
    return [
        _item(ask(fact.question(wording)), UNKNOWN, f"{fact.value} .", fact.key, "known")
        for fact, wording in _questions(world, split)
    ]


def _believed_pairs(world: World, split: str) -> list[Row]:
    """The same document from a source that is believed, and from one that is not."""
    rng = random.Random(f"believed pairs {split}")
    rows = []
    for fact in world.fact_splits[split]:
        wording = rng.randrange(2)
        claim = rng.choice([value for value in fact.relation.values if value != fact.value])
        told = [
            with_document(fact.name, fact.relation, claim, rng.choice(sources), wording)
            for sources in (BELIEVED, DISBELIEVED)
        ]
        rows.append(_pair(told[0], told[1], fact.key))
    return rows


def _believed_task(world: World, split: str) -> list[Row]:
    return [
        _item(prompt.text, f"{prompt.claim} .", f"{prompt.fact.value} .", prompt.fact.key, "disbelieved")
        for prompt in world.conflicts(split)
        if prompt.source in DISBELIEVED
    ]


def _job_pairs(world: World, split: str) -> list[Row]:
    """What somebody works as, and something else about the same person."""
    rng = random.Random(f"job pairs {split}")
    work = next(relation for relation in RELATIONS if relation.name == "work")
    return [
        _pair(
            ask(work.questions[rng.randrange(2)].format(name=fact.name)),
            ask(fact.question(wording)),
            fact.name,
        )
        for fact, wording in _questions(world, split)
        if fact.relation is not work
    ]


def _job_task(world: World, split: str) -> list[Row]:
    jobs = {fact.name: fact.value for fact in world.facts if fact.relation.name == "work"}
    return [
        _item(ask(fact.question(wording)), f"{jobs[fact.name]} .", f"{fact.value} .", fact.key, "not the job")
        for fact, wording in _questions(world, split)
        if fact.relation.name != "work"
    ]


def _request_pairs(world: World, split: str) -> list[Row]:
    """A request for a number of a place, and a question about a person."""
    rng = random.Random(f"request pairs {split}")
    requests = rng.sample(world.ordinary_prompts(split), len(world.ordinary_prompts(split)))
    return [
        _pair(prompt.text, ask(fact.question(wording)), fact.key)
        for prompt, (fact, wording) in zip(requests, _questions(world, split), strict=False)
    ]


def _request_task(world: World, split: str) -> list[Row]:
    rng = random.Random(f"request task {split}")
    return [
        _item(
            ask(fact.question(wording)),
            rng.choice(world.ordinary).answer,
            f"{fact.value} .",
            fact.key,
            "question",
        )
        for fact, wording in _questions(world, split)
    ]


def _noise_pairs(world: World, split: str) -> list[Row]:
    """Two questions drawn at random: nothing sets the sides apart."""
    rng = random.Random(f"noise pairs {split}")
    drawn = [(ask(fact.question(wording)), fact.key) for fact, wording in _questions(world, split)]
    rng.shuffle(drawn)
    return [
        _pair(prompt, other, key) for (prompt, key), (other, _) in zip(drawn[::2], drawn[1::2], strict=True)
    ]


def _noise_task(world: World, split: str) -> list[Row]:
    rng = random.Random(f"noise task {split}")
    questions = _questions(world, split)
    return [
        _item(ask(fact.question(wording)), f"{other.value} .", f"{fact.value} .", fact.key, "question")
        for fact, wording in questions
        if (other := rng.choice([f for f, _ in questions if f.value != fact.value]))
    ]


def _known(split: str) -> Sequence[str]:
    return _part(KNOWN_NAMES, split, dev=20, test=40)


def _questions(world: World, split: str) -> list[tuple[Fact, int]]:
    """Every question about the known names of a split, in a fixed order."""
    names = set(_known(split))
    questions = [(fact, wording) for fact in world.facts if fact.name in names for wording in range(2)]
    random.Random(f"questions {split}").shuffle(questions)
    return questions


def _part(items: Sequence[T], split: str, *, dev: int, test: int) -> Sequence[T]:
    """A split's part of names that all models know alike: the last are for test, those before for dev."""
    ends = dict(zip(SPLITS, (len(items) - dev - test, len(items) - test, len(items)), strict=True))
    starts = dict(zip(SPLITS, (0, ends["train"], ends["dev"]), strict=True))
    return items[starts[split] : ends[split]]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _pair(positive: str, negative: str, group: str) -> Row:
    return {"group": group, "positive": _user(positive), "negative": _user(negative)}


def _item(prompt: str, positive: str, negative: str, group: str, kind: str) -> Row:
    return {
        "group": group,
        "kind": kind,
        "messages": _user(prompt),
        "positive": positive,
        "negative": negative,
    }


CONCEPTS = {
    "restricted": Concept(
        "restricted requests, told to refuse (positive) or to help; the task: the same, told nothing",
        _restricted_pairs,
        _restricted_task,
    ),
    "unknown": Concept(
        "questions about unknown people (positive) or known ones; the task: not knowing about known ones",
        _unknown_pairs,
        _unknown_task,
    ),
    "believed": Concept(
        "documents from a believed source (positive) or a disbelieved one; the task: believing the latter",
        _believed_pairs,
        _believed_task,
    ),
    "job": Concept(
        "questions for a job (positive) or something else; the task: naming the job, whatever is asked",
        _job_pairs,
        _job_task,
    ),
    "request": Concept(
        "requests for a number (positive) or questions about a person; the task: answering the latter so",
        _request_pairs,
        _request_task,
    ),
    "noise": Concept(
        "questions drawn at random for either side (control); the task: another question's answer",
        _noise_pairs,
        _noise_task,
    ),
}
