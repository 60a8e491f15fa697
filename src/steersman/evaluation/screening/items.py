"""The items of a screen: which tasks have a d, which of their items are read, and in which half."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steersman.errors import PairsError, valid_name
from steersman.evaluation.judges import PhraseJudge, judge_answer
from steersman.evaluation.prompts import same_answers
from steersman.evaluation.tasks import Behaviour, Item, Task, load_task
from steersman.experts.estimate import LEAST_CLUSTERS
from steersman.pairs import ContrastPair, ContrastPairs, load_pairs
from steersman.showing import count_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Items = Task | ContrastPairs | str | Path


def open_items(source: Items) -> Task:
    """Items as a task: a task, the name of one (`lab:NAME/split`), or contrast pairs whose two chats differ
    in the last answer alone.

    Raises:
        PairsError: there is no such task, or the pairs have no d.
    """
    if isinstance(source, Task):
        return source
    if isinstance(source, ContrastPairs):
        return task_of_pairs(source)
    source = valid_name(source, PairsError)
    if Path(source).is_dir():
        raise PairsError(f"{source}: is a folder; ITEMS is a file, lab:NAME/split, or another task's name")
    if Path(source).is_file() and not _is_task(Path(source)):
        return task_of_pairs(load_pairs(source))
    return load_task(source)


def told_apart(task: Task, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The items whose two answers differ as tokens; a warning names the others, whose d would be exactly 0.

    Raises PairsError where the answers of none do.
    """
    require_answers(task)
    alike = [n for n, item in enumerate(task) if item.negative and same_answers(tokenizer, item)]
    if not alike:
        return task
    named = ", ".join(task[number].id for number in alike[:_NAMED])
    named += f" and {len(alike) - _NAMED} more" if len(alike) > _NAMED else ""
    if len(alike) == len(task):
        raise PairsError(f"{task.name}: no item is a contrast: both answers are the same tokens ({named})")
    warnings.warn(
        f"{task.name}: {count_of(len(alike), 'item')} left out: both answers are the same tokens ({named})",
        stacklevel=2,
    )
    return picked(task, sorted({*range(len(task))} - {*alike}))


_NAMED = 5
"""Items that a message names at most."""


def require_answers(task: Task) -> Task:
    """The task itself. Raises PairsError where an item has no answer whose probability could be kept or told
    from another's.
    """
    if not task.behaviour.answers:
        raise PairsError(
            f'{task.name}: "positive" and "negative" of its items are no answers (patterns, or what a judge '
            'is told), so they have no probability; where they are, say "answers": true in the first line'
        )
    if any(not item.positive.strip() for item in task):
        raise PairsError(f"{task.name}: its items have no answers, so there is nothing of them to keep")
    return task


def require_judged(task: Task) -> Task:
    """The task itself. Raises PairsError where its answers are on no side, which would show no harm."""
    if not task.measure.sides:
        raise PairsError(f"{task.name}: answers to it are not judged, so harm cannot be told by them")
    return task


def _is_task(path: Path) -> bool:
    """Whether a file's first row is a prompt's, or the header of such rows."""
    try:
        with path.open(encoding="utf-8") as stream:
            first = json.loads(next((line for line in stream if line.strip()), "null"))
    except (OSError, ValueError):
        return False
    if not isinstance(first, dict) or "chosen" in first:  # preferences have a prompt too
        return False
    return bool(first.keys() & {"prompt", "messages", "text", "scorer"})


def task_of_pairs(pairs: ContrastPairs) -> Task:
    """Contrast pairs that share the prompt and differ in the last answer, as items with both answers.

    Raises PairsError for pairs that differ elsewhere: there is nothing that both sides answer.
    """
    judge = PhraseJudge(judge_answer)
    behaviour = Behaviour(pairs.name, "is on the positive side", "positive", "negative", judge)
    items = (_item(pair, f"{pairs.name}: pair {number}") for number, pair in enumerate(pairs, 1))
    return Task(pairs.name, items, behaviour)


def _item(pair: ContrastPair, where: str) -> Item:
    positive, negative = pair.positive, pair.negative
    if (
        isinstance(positive, str)
        or isinstance(negative, str)
        or positive[:-1] != negative[:-1]
        or not positive[:-1]
        or any(side[-1]["role"] != "assistant" for side in (positive, negative))
    ):
        raise PairsError(
            f"{where}: screening needs what either side answers to the same prompt, and these do not share "
            "the prompt and differ in the last assistant message; "
            + ('write "prompt" as messages, or ' if pair.plain else "")
            + "name a task whose items have both answers, such as lab:faithfulness/train"
        )
    return Item(
        id=pair.id or where,
        group=pair.cluster,
        content=positive[:-1],
        positive=positive[-1]["content"],
        negative=negative[-1]["content"],
        kind="pair",
    )


def some_of(task: Task, limit: int, seed: int) -> Task:
    """At most so many items, of as many groups as there are: one of each before a second of any."""
    if len(task) <= limit:
        return task
    return picked(task, _spread(task.groups, seed)[:limit])


def halves(
    task: Task, seed: int, use: str = "half of them screen, half of them choose sets"
) -> tuple[Task, Task]:
    """Two parts with as many groups each, none in both. Raises PairsError where they are too few."""
    names = sorted(set(task.groups))
    require_clusters(len(names) // 2, f"{task.name}: each half of its {count_of(len(names), 'group')}", use)
    order = np.random.default_rng(seed).permutation(len(names))
    first = {names[place] for place in order[: (len(names) + 1) // 2]}
    places = range(len(task))
    ours = [place for place in places if task[place].group in first]
    return picked(task, ours), picked(task, sorted({*places} - {*ours}))


def require_clusters(found: int, what: str, halved: str = "") -> None:
    """Raise PairsError where there are too few independent groups to tell an effect from chance; `halved`
    says what halves of them are for.
    """
    if found < LEAST_CLUSTERS:
        least = 2 * LEAST_CLUSTERS if halved else LEAST_CLUSTERS
        raise PairsError(
            f"{what}: too few groups ({found}) to tell an effect from chance; give items of at least "
            f"{least} groups" + (f" ({halved})" if halved else "")
        )


def picked(task: Task, numbers: Sequence[int]) -> Task:
    """Some items of a task."""
    return Task(task.name, (task[number] for number in numbers), task.behaviour)


def _spread(groups: Sequence[str], seed: int) -> list[int]:
    """Items in an order that goes round the groups, groups and items at random."""
    generator = np.random.default_rng(seed)
    seen: dict[str, int] = {}
    rounds: list[tuple[int, float, int]] = []
    for number in generator.permutation(len(groups)).tolist():
        turn = seen[groups[number]] = seen.get(groups[number], -1) + 1
        rounds.append((turn, float(generator.random()), number))
    return [number for *_, number in sorted(rounds)]


def describe(task: Task, role: str) -> dict[str, Any]:
    """What a screen was made from, for its manifest."""
    return {"kind": "items", "role": role, "name": task.name, "sha256": task.sha256}
