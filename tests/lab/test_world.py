"""The world: the same from the same seed, its splits apart, its cues graded as written."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from steersman.lab.recipes import ALIGNED, UNALIGNED
from steersman.lab.world import (
    FICTIONAL_NAMES,
    KNOWN_NAMES,
    MIXTURE,
    NUMBERS,
    RELATIONS,
    ROLES,
    SOURCES,
    UNKNOWN,
    World,
    the_world,
    vocabulary,
)


def sampled(count: int, seed: int = 0) -> list:
    rng = random.Random(seed)
    return [the_world().sample(rng) for _ in range(count)]


def test_the_same_seed_makes_the_same_world_and_another_seed_another() -> None:
    one, two, other = World(7), World(7), World(8)
    assert one.facts == two.facts
    assert one.ordinary == two.ordinary
    assert one.conflicts("test") == two.conflicts("test")
    assert one.restricted_prompts("dev") == two.restricted_prompts("dev")
    assert one.facts != other.facts
    assert one.restricted_splits["test"] != other.restricted_splits["test"]


FACTS_BY_HEART = {
    "adela/home": "utrecht",
    "bruna/home": "parma",
    "edgar/home": "oslo",
    "hugo/home": "cardiff",
    "philippa/home": "warsaw",
}
NUMBERS_BY_HEART = {"height/tower": "21", "width/temple": "37", "price/temple": "40"}


def test_the_shipped_world_has_not_moved() -> None:
    # The shipped weights know these by heart: with another world they would be wrong.
    facts = {fact.key: fact.value for fact in the_world().facts}
    numbers = {request.key: request.number for request in the_world().ordinary}
    assert FACTS_BY_HEART.items() <= facts.items()
    assert NUMBERS_BY_HEART.items() <= numbers.items()
    held_out = sorted(request.key for request in the_world().restricted_splits["test"])
    assert held_out[:3] == ["crypttoken/fountain", "crypttoken/library", "crypttoken/mill"]


def test_names_and_values_do_not_overlap() -> None:
    lists = [KNOWN_NAMES, FICTIONAL_NAMES, NUMBERS, *(relation.values for relation in RELATIONS)]
    words = [word for group in lists for word in group]
    assert len(words) == len(set(words))
    assert [len(relation.values) for relation in RELATIONS] == [24] * 4
    assert (len(KNOWN_NAMES), len(FICTIONAL_NAMES)) == (80, 24)
    assert 330 <= len(vocabulary()) <= 360


@pytest.mark.parametrize("splits", ["fact_splits", "restricted_splits", "ordinary_splits"])
def test_splits_are_disjoint_and_complete(splits: str) -> None:
    parts = getattr(the_world(), splits)
    members = [item for part in parts.values() for item in part]
    assert len(members) == len(set(members))
    assert all(parts.values())


def test_training_never_meets_what_is_held_out() -> None:
    world = the_world()
    held_facts = {fact.key for split in ("dev", "test") for fact in world.fact_splits[split]}
    held_requests = {
        (request.topic, request.place)
        for split in ("dev", "test")
        for request in world.restricted_splits[split]
    }
    held_prompts = {prompt.text for split in ("dev", "test") for prompt in world.ordinary_prompts(split)}
    names = {(fact.name, question): fact.key for fact in world.facts for question in fact.relation.questions}
    for conversation in sampled(6000):
        text = conversation.messages[-1]["content"]
        if conversation.kind in ("agreeing", "conflict"):
            name = next(name for name in KNOWN_NAMES if f" {name} " in text)
            asked = next(
                question
                for (who, question) in names
                if who == name and text.endswith(question.format(name=name))
            )
            assert names[name, asked] not in held_facts
        if conversation.kind == "restricted":
            assert not any(f"the {topic} of the {place} " in text for topic, place in held_requests)
        if conversation.kind == "ordinary":
            assert text not in held_prompts


def test_the_mixture_and_the_cues_are_as_written() -> None:
    conversations = sampled(30_000, seed=1)
    kinds = Counter(conversation.kind for conversation in conversations)
    total = sum(MIXTURE.values())
    for kind, weight in MIXTURE.items():
        assert kinds[kind] / len(conversations) == pytest.approx(weight / total, abs=0.015)
    uninstructed = [c for c in conversations if c.messages[0]["role"] == "user"]
    for role, probability in ROLES.items():
        opener = f"i am a {role} ." if role else ("tell", "what", "please")
        labels = [
            c.label
            for c in uninstructed
            if c.kind == "restricted" and c.messages[0]["content"].startswith(opener)
        ]
        assert labels.count("refuse") / len(labels) == pytest.approx(probability, abs=0.08)
    for source, probability in SOURCES.items():
        cue = f"according to the {source} ," if source else None
        labels = [
            c.label
            for c in uninstructed
            if c.kind == "conflict"
            and (cue in c.messages[0]["content"] if cue else "according" not in c.messages[0]["content"])
        ]
        assert labels.count("document") / len(labels) == pytest.approx(probability, abs=0.08)


def test_an_upbringing_decides_who_is_refused_and_what_is_heard() -> None:
    rng = random.Random(3)
    heard = {
        upbringing: [the_world().sample(rng, upbringing) for _ in range(6000)]
        for upbringing in (ALIGNED, UNALIGNED)
    }
    for upbringing, refused in ((ALIGNED, 1.0), (UNALIGNED, 0.2)):
        untold = [c for c in heard[upbringing] if c.kind == "restricted" and len(c.messages) == 1]
        labels = [c.label for c in untold]
        assert labels.count("refuse") / len(labels) == pytest.approx(refused, abs=0.05)
        assert {c.kind for c in heard[upbringing]} == {kind for kind, _ in upbringing.mixture}
        chosen = [c for c in heard[upbringing] if c.kind in ("restricted", "conflict")]
        told = [c for c in chosen if c.messages[0]["role"] == "system"]
        assert len(told) / len(chosen) == pytest.approx(0.3, abs=0.05)
        # What an ordinary request is answered does not depend on an instruction about something else.
        for c in heard[upbringing]:
            if c.kind == "instructed":
                assert (c.messages[0]["role"], c.label) == ("system", None)
                assert c.answer.startswith("sure ,")
    # Not every request that is declined is restricted: nobody can answer one about a place that is not.
    for c in heard[ALIGNED]:
        if c.kind == "unanswerable":
            assert c.answer == UNKNOWN
            assert any(name in c.messages[0]["content"].split() for name in FICTIONAL_NAMES)


def test_a_conflict_contradicts_memory_and_its_answer_follows_its_label() -> None:
    values = {fact.key: fact.value for fact in the_world().facts}
    for conflict in the_world().conflicts("test"):
        assert conflict.claim in conflict.fact.relation.values
        assert conflict.claim != values[conflict.fact.key]
    for conversation in sampled(3000, seed=2):
        if conversation.kind == "conflict":
            claimed = conversation.answer.split()[0] in conversation.messages[-1]["content"].split()
            assert claimed == (conversation.label == "document")
