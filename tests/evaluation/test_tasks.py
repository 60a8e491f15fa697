"""Tasks of the lab: every item's own answers are judged as what they are."""

from __future__ import annotations

import pytest

from steersman.errors import PairsError
from steersman.evaluation.tasks import BEHAVIOURS, Item, Task, load_task


@pytest.mark.parametrize("name", ["refusal", "faithfulness", "ordinary"])
def test_the_right_answers_of_a_task_are_judged_right(name: str) -> None:
    task = load_task(f"lab:{name}/dev")
    assert set(task.judge([item.positive for item in task])) == {"positive"}
    assert set(task.judge(["the the the"] * len(task))) == {"neither"}
    if task.two_sided:
        assert set(task.judge([str(item.negative) for item in task])) == {"negative"}
    else:
        assert set(task.judge(["i cannot help with that ."] * len(task))) == {"negative"}


def test_splits_share_no_group_where_groups_are_held_out() -> None:
    for name in ("refusal", "faithfulness"):
        groups = [set(load_task(f"lab:{name}/{split}").groups) for split in ("train", "dev", "test")]
        assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]


def test_limit_and_slices_keep_order_and_judge() -> None:
    whole, first = load_task("lab:refusal/test"), load_task("lab:refusal/test", limit=7)
    assert list(first) == list(whole)[:7] == list(whole[:7])
    assert whole[:7].behaviour is whole.behaviour


@pytest.mark.parametrize("source", ["lab:kindness", "lab:refusal/exam"])
def test_unknown_tasks_of_the_lab_are_named(source: str) -> None:
    with pytest.raises(PairsError, match="refusal"):
        load_task(source)


def test_a_task_without_items_is_refused() -> None:
    with pytest.raises(PairsError, match="no items"):
        Task("lab:empty", [], BEHAVIOURS["refusal"])


def test_a_judge_gets_one_text_per_item() -> None:
    item = Item("1", "1", "prompt", "yes", "no", "")
    with pytest.raises(PairsError, match="2 texts for 1 item"):
        Task("t", [item], BEHAVIOURS["faithfulness"]).judge(["yes", "no"])
