"""The judge of instructions that a program can check: lm-eval's checkers of IFEval, strictly."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from steersman.errors import JudgeError, how_to_install
from steersman.evaluation.judges.verdict import Verdict
from steersman.evaluation.measures.measure import Metric

if TYPE_CHECKING:
    from steersman.evaluation.tasks.item import Item


@dataclass(frozen=True)
class InstructionJudge:
    """Positive: every instruction is followed. Negative: one is not.

    `instructions` is (instructions followed) / (mean number of instructions of an item): its mean over all
    items is the share of all instructions, as published. Raises JudgeError where lm-eval is not installed.
    """

    def __post_init__(self) -> None:
        _checkers()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("instructions", "instructions followed (strict)", "mean", "higher"),)

    def record(self) -> dict[str, Any]:
        return {"judge": "ifeval", "strict": True, "lm_eval": version("lm_eval")}

    def judge(self, items: Sequence[Item], texts: Sequence[str]) -> list[Verdict]:
        return [self._verdict(item, text) for item, text in zip(items, texts, strict=True)]

    def _verdict(self, item: Item, text: str) -> Verdict:
        checkers = _checkers()
        facts = item.facts
        if "instructions" not in facts:
            raise JudgeError(
                f"item {item.id}: has no instructions to check; right are the items of an ifeval task"
            )
        example = checkers.InputExample(
            item.id, list(facts["instructions"]), facts["prompt"], list(facts["kwargs"])
        )
        try:
            found = checkers.test_instruction_following_strict(example, text).follow_instruction_list
        except Exception as error:  # a checker of others' that fails on what a model has written
            return Verdict(None, why=f"lm-eval's checker failed: {type(error).__name__}: {error}")
        broken = [name for name, holds in zip(facts["instructions"], found, strict=True) if not holds]
        score = sum(found) / facts["mean_instructions"]
        return Verdict("negative" if broken else "positive", {"instructions": score}, _why(broken))


def _why(broken: Sequence[str]) -> str:
    return f"not followed: {', '.join(broken)}" if broken else ""


def _checkers() -> Any:
    try:
        # On import it may say on stdout that it has fetched something, and stdout is for results.
        with redirect_stdout(sys.stderr):
            from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise JudgeError(
            f"IFEval is checked by lm-eval, and {str(error.name).partition('.')[0]} is not installed; "
            f"{how_to_install('tasks')}"
        ) from None
    except (LookupError, OSError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise JudgeError(f"lm-eval's checkers of IFEval cannot be opened ({reason})") from None
    return utils
