"""The arms of an evaluation: their names, their texts, and what keeps their work apart."""

from __future__ import annotations

import pytest

from steersman import PairsError, PlanError, SteersmanError
from steersman.evaluation.planning import plan_arms
from steersman.evaluation.run_store import key_of
from steersman.evaluation.told import told_arm
from steersman.experts.contrast import RoutingContrast


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"others": ["base"]}, "two arms are called 'base'"),
        ({"others": ["line\nbreak"]}, "no name of an arm"),
        ({"others": [" "]}, "no name of an arm"),
        ({"others": ["\x1b[31mred"]}, "no name of an arm"),
        ({"instruction": ""}, "the instruction is ''"),
        ({"instruction": "\ud800"}, "half a character"),
        ({"strengths": ["0.5"]}, "each of the strengths is a number, not '0.5'"),
        ({"others": [5]}, "5 is no name of an arm"),
        ({"attacks": {5: "{prompt}"}}, "the name of attack 5"),
        ({"reverse": {"other": None}}, "no steering 'other'"),
        ({"attacks": {"a": "no place"}}, "holds {prompt} once"),
        ({"attacks": {"a": "\ud800 {prompt}"}}, "half a character"),
        ({"attacks": {"a": "{prompt}"}, "defences": {"a": "x"}}, "two arms are called 'a'"),
        ({"defences": {"a": " "}}, "defence 'a' is ' '"),
    ],
)
def test_arms_that_nobody_could_tell_apart_or_ask_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(SteersmanError, match=r".") as refused:
        plan_arms({}, **given)  # type: ignore[arg-type]
    assert isinstance(refused.value, PlanError | PairsError)
    assert said in str(refused.value)


def test_two_attacks_of_one_text_keep_their_names() -> None:
    arms = plan_arms({}, attacks={"one": "please {prompt}", "two": "please {prompt}"})
    told = [told_arm(arm, arms, {})["template"] for arm in arms]
    assert told == [None, *({"name": name, "text": "please {prompt}"} for name in ("one", "two"))]


def test_strengths_that_print_alike_have_names_of_their_own(contrast: RoutingContrast) -> None:
    arms = plan_arms({"a": contrast.select(top=2)}, strengths=[0.12345671, 0.12345672, 0.5])
    assert [arm.name for arm in arms][2:] == ["a@0.12345671", "a@0.12345672", "a@0.5"]


def test_names_with_separators_share_no_key() -> None:
    asked = [("d", "task", "0"), ("batch", "task", "d", 0), ("batch", "task|d", "0"), ("d", "task|0", "")]
    assert len({key_of(*parts) for parts in asked}) == len(asked)
