"""A task's development and test items: its own splits, or halves by group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steersman.errors import PairsError
from steersman.evaluation.screening.items import halves, some_of
from steersman.evaluation.tasks import Task, load_task

TaskLike = str | Path | Task


@dataclass(frozen=True)
class Split:
    """What chooses, and what confirms.

    Attributes:
        dev, test: Items of different groups.
        pool: sha256 of all items that test items are taken from: how few are taken, and by which seed, makes
            no other test of them.
    """

    dev: Task
    test: Task
    pool: str

    def first(self, dev_items: int | None, test_items: int | None, seed: int) -> Split:
        """At most so many items of each, of as many groups as there are; None: all."""
        return Split(_some(self.dev, dev_items, seed), _some(self.test, test_items, seed), self.pool)

    @property
    def halves(self) -> tuple[Task, Task]:
        """Both, development items first."""
        return self.dev, self.test


def split_of(task: TaskLike, test: TaskLike | None, *, seed: int, chats: bool) -> Split:
    """Development and test items.

    Args:
        task: A lab task's name without a split stands for its own dev and test; else halves of what is
            named, by group.
        test: Test items, where `task` are the development ones.
        seed: Of the halves.
        chats: Whether the model takes chats; prompts are texts otherwise.

    Raises:
        PairsError: there is no such task, a group is in both parts, or there are too few for halves.
    """
    if test is not None:
        dev, held = _opened(task, chats), _opened(test, chats)
        if both := {*dev.groups} & {*held.groups}:
            raise PairsError(
                f"{held.name}: the group {min(both)!r} is among the development items of {dev.name} too; "
                "right is a test of other groups"
            )
        return Split(dev, held, held.sha256)
    if isinstance(task, str) and task.startswith("lab:") and "/" not in task:
        dev, held = _opened(f"{task}/dev", chats), _opened(f"{task}/test", chats)
        return Split(dev, held, held.sha256)
    whole = _opened(task, chats)
    return Split(*halves(whole, seed, "half of them choose, half of them confirm"), whole.sha256)


def _opened(source: TaskLike, chats: bool) -> Task:
    task = source if isinstance(source, Task) else load_task(source)
    return task if chats else task.as_texts()


def _some(task: Task, limit: int | None, seed: int) -> Task:
    return task if limit is None else some_of(task, limit, seed)
