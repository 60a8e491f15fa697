"""The lab's data sets: pairs to detect experts with and tasks to measure behaviour with, in three splits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from steersman.errors import PairsError
from steersman.lab.concepts import BELIEVED, CONCEPTS
from steersman.lab.numbers_data import digits_pairs, digits_task, everyday_task
from steersman.lab.texts import SIZES
from steersman.lab.world import (
    REFUSAL,
    SPLITS,
    World,
    ask,
    the_world,
    with_document,
)

Row = dict[str, Any]

# Name → one line. docs/lab.md holds the cards.
DATA = {
    "refusal": "restricted requests, refused (positive) or answered (negative)",
    "faithfulness": "questions with a document or without (pairs); documents that contradict memory (task)",
    "ordinary": "requests that nobody has a reason to refuse, with their right answers (a task only)",
    "conflicts": "documents with new claims about facts that others were heard of in training (a task only)",
    "closed-book": "questions without a document, with what the models know by heart (a task only)",
    **{name: concept.about for name, concept in CONCEPTS.items()},
    "digits": "requests for a number, answered in digits (positive) or in words; for lab:natural",
    "numbers": "the same, where an answer counts only if it is right, too (a task only)",
    "everyday": "requests without a number, with their right answers; for lab:natural (a task only)",
    "texts": f"{SIZES['train']} conversations without a restricted request, to fit maps on (texts only)",
}
# Pairs a request: enough for every request to be heard, few enough to be read in seconds.
PROMPTS_PER_REQUEST = 6


def pairs(name: str, split: str = "train") -> list[Row]:
    """Contrast pairs as rows of the pairs format: chat messages, id, group, and targets where it is not the
    answer's first state that is compared. Raises PairsError.
    """
    return _rows(_PAIRS, "pairs", name, split)


def task(name: str, split: str = "test") -> list[Row]:
    """Prompts with the answers of the two sides, or with the right answer, in a fixed order.

    Rows: id, group (what is not independent), messages, kind, and `positive` and `negative`, or `answer`.
    Raises PairsError that lists the known names and splits.
    """
    return _rows(_TASKS, "task", name, split)


def _rows(known: dict[str, Callable[[str], list[Row]]], what: str, name: str, split: str) -> list[Row]:
    if name not in known:
        raise PairsError(f"the lab has no {what} {name!r}; it has {', '.join(known)}")
    if split not in SPLITS:
        raise PairsError(f"lab:{name} has no split {split!r}; it has {', '.join(SPLITS)}")
    rows = known[name](split)
    return [{"id": f"{name}/{split}/{number}", **row} for number, row in enumerate(rows)]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _refusal_pairs(world: World, split: str) -> list[Row]:
    rows: list[Row] = []
    taken: dict[str, int] = {}
    for prompt in world.restricted_prompts(split):
        request = prompt.request
        taken[request.key] = taken.get(request.key, 0) + 1
        if taken[request.key] > PROMPTS_PER_REQUEST:
            continue
        rows.append(
            {
                "group": request.key,
                "positive": [_user(prompt.text), _assistant(REFUSAL)],
                "negative": [_user(prompt.text), _assistant(request.answer)],
                "positive_target": REFUSAL,
                "negative_target": request.answer,
            }
        )
    return rows


def _faithfulness_pairs(world: World, split: str) -> list[Row]:
    """The paper's pairs: a question with and without a believable document; the question is compared."""
    rows: list[Row] = []
    for number, fact in enumerate(world.fact_splits[split]):
        for wording in range(2):
            question = fact.question(wording)
            source = BELIEVED[(2 * number + wording) % len(BELIEVED)]
            document = with_document(fact.name, fact.relation, fact.value, source, wording)
            rows.append(
                {
                    "group": fact.key,
                    "positive": [_user(document)],
                    "negative": [_user(ask(question))],
                    "positive_target": question,
                    "negative_target": question,
                }
            )
    return rows


def _refusal_task(world: World, split: str) -> list[Row]:
    return [
        {
            "group": prompt.request.key,
            "kind": "restricted",
            "messages": [_user(prompt.text)],
            "positive": REFUSAL,
            "negative": prompt.request.answer,
        }
        for prompt in world.restricted_prompts(split)
    ]


def _faithfulness_task(world: World, split: str) -> list[Row]:
    return [
        {
            "group": prompt.fact.key,
            "kind": "conflict",
            "messages": [_user(prompt.text)],
            "positive": f"{prompt.claim} .",
            "negative": f"{prompt.fact.value} .",
        }
        for prompt in world.conflicts(split)
    ]


def _conflicts_task(world: World, split: str) -> list[Row]:
    """Known facts: those of the training split, each source and wording with a claim for either split that
    lab:faithfulness/train does not make.
    """
    said = {(prompt.fact, prompt.wording, prompt.source): prompt.claim for prompt in world.conflicts("train")}
    rng = random.Random("conflicts over known facts")
    rows: list[Row] = []
    for (fact, wording, source), claim in said.items():
        others = [value for value in fact.relation.values if value not in (fact.value, claim)]
        new = rng.sample(others, len(SPLITS))[SPLITS.index(split)]
        text = with_document(fact.name, fact.relation, new, source, wording)
        rows.append(
            {
                "group": fact.key,
                "kind": "conflict",
                "messages": [_user(text)],
                "positive": f"{new} .",
                "negative": f"{fact.value} .",
            }
        )
    return rows


def _closed_book_task(world: World, split: str) -> list[Row]:
    prompts = [(fact, wording) for fact in world.facts for wording in range(2)]
    random.Random("closed-book").shuffle(prompts)
    part = {"test": prompts[:300], "dev": prompts[300:400], "train": prompts[400:]}[split]
    return [
        {
            "group": fact.key,
            "kind": "closed-book",
            "messages": [_user(ask(fact.question(wording)))],
            "answer": f"{fact.value} .",
        }
        for fact, wording in part
    ]


def _ordinary_task(world: World, split: str) -> list[Row]:
    return [
        {
            "group": prompt.request.key,
            "kind": "ordinary",
            "messages": [_user(prompt.text)],
            "answer": prompt.request.answer,
        }
        for prompt in world.ordinary_prompts(split)
    ]


def _of_town(rows: Callable[[World, str], list[Row]]) -> Callable[[str], list[Row]]:
    return lambda split: rows(the_world(), split)


_PAIRS: dict[str, Callable[[str], list[Row]]] = {
    "refusal": _of_town(_refusal_pairs),
    "faithfulness": _of_town(_faithfulness_pairs),
    **{name: _of_town(concept.pairs) for name, concept in CONCEPTS.items()},
    "digits": digits_pairs,
}
_TASKS: dict[str, Callable[[str], list[Row]]] = {
    "refusal": _of_town(_refusal_task),
    "faithfulness": _of_town(_faithfulness_task),
    "ordinary": _of_town(_ordinary_task),
    "conflicts": _of_town(_conflicts_task),
    "closed-book": _of_town(_closed_book_task),
    **{name: _of_town(concept.task) for name, concept in CONCEPTS.items()},
    "digits": digits_task,
    "numbers": digits_task,
    "everyday": everyday_task,
}
