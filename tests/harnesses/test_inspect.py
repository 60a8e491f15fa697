"""Inspect AI's provider `steersman/…`: the evaluation's accuracies, batches in one thread, and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="inspect-ai is not installed (make test-harness)")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ContentImage, get_model
from inspect_ai.scorer import Score, Scorer, accuracy, scorer
from inspect_ai.solver import generate
from inspect_ai.tool import bash

from steersman import Steering
from steersman.errors import PlanError, WeightsMismatch
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.tasks import load_task

LIMIT = 90
MODEL = "steersman/lab:moe"


def lab_task(source: str, limit: int = LIMIT) -> Task:
    """A task of the lab as Inspect's: the same items, the same judge."""
    items = load_task(source, limit=limit)

    @scorer(metrics=[accuracy()])
    def judged() -> Scorer:
        async def score(state: Any, target: Any) -> Score:
            place = state.metadata["place"]
            (outcome,) = items[place : place + 1].judge([state.output.completion])
            return Score(value=float(outcome == "positive"))

        return score

    samples = [
        Sample(
            input=[ChatMessageUser(content=item.content[0]["content"])],
            target=item.positive,
            metadata={"place": place},
        )
        for place, item in enumerate(items)
    ]
    return Task(dataset=samples, solver=generate(), scorer=judged(), name=source.replace(":", "-"))


def run(task: Task, folder: Path, model: str = MODEL, arguments: Any = None, **options: Any) -> EvalLog:
    options = {"max_tokens": 16, "max_connections": 45, "log_dir": str(folder), "display": "none"} | options
    (log,) = eval(task, model=model, model_args=arguments or {}, **options)
    return log


@pytest.mark.parametrize(
    ("source", "plan"),
    [("lab:refusal/test", None), ("lab:refusal/test", "safer"), ("lab:faithfulness/test", "faithful")],
)
def test_accuracies_are_those_of_the_evaluation(
    lab_moe: Any, source: str, plan: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(plan) if plan else None
    log = run(lab_task(source), tmp_path, arguments={"steering": str(folder)} if folder else None)
    assert log.status == "success", log.error
    task, steering = load_task(source, limit=LIMIT), Steering.from_pretrained(folder) if folder else None
    expected = Subject(*lab_moe, max_new_tokens=16).run(task, Arm("it", steering))
    (score,) = log.results.scores
    assert score.metrics["accuracy"].value == pytest.approx(expected.rates["positive"].rate, abs=1e-12)
    samples = sorted(log.samples, key=lambda sample: sample.metadata["place"])
    assert [sample.output.completion.strip() for sample in samples] == list(expected.texts)
    assert {sample.output.stop_reason for sample in samples} == {"stop"}
    said = [(sample.output.metadata or {}).get("steersman") for sample in samples]
    if steering is None:
        assert set(said) == {None}
    else:
        assert {each["fingerprint"] for each in said} == {steering.fingerprint}
        assert 20 <= max(each["batch"] for each in said) <= 45
        assert all(tokens > each["batch"] for each in said for tokens in each["receipt"].values())


def test_from_the_command_line(by_hand: Path, lab_moe: Any, tmp_path: Path) -> None:
    """By the entry point alone, with the arguments that the pages show."""
    (tmp_path / "task.py").write_text(
        "from inspect_ai import Task, task\n"
        "from inspect_ai.dataset import Sample\n"
        "from inspect_ai.scorer import includes\n"
        "@task\n"
        "def depth():\n"
        "    samples = [Sample('what is the depth of the garden ?', target='35')]\n"
        "    return Task(dataset=samples, scorer=includes())\n"
    )
    command = [str(Path(sys.executable).parent / "inspect"), "eval", "task.py", "--model", MODEL]
    command += ["-M", f"steering={by_hand}", "--display", "none", "--log-dir", "logs", "--log-format", "json"]
    command += ["--logprobs", "--top-logprobs", "2", "--max-tokens", "12"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=os.environ)
    assert done.returncode == 0, done.stderr + done.stdout
    (file,) = (tmp_path / "logs").glob("*.json")
    (sample,) = json.loads(file.read_text())["samples"]
    plan = Steering.from_pretrained(by_hand)
    said = sample["output"]["metadata"]["steersman"]
    usage = sample["output"]["usage"]
    steered = usage["input_tokens"] + usage["output_tokens"] - 1
    assert said == {
        "fingerprint": plan.fingerprint,
        "match": "weights",
        "batch": 1,
        "receipt": {"router:1": steered, "router:3": steered},
    }
    logprobs = sample["output"]["choices"][0]["logprobs"]["content"]
    assert len(logprobs) == usage["output_tokens"]
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in logprobs)


def test_samples_follow_the_seed_and_stop_where_asked(tmp_path: Path) -> None:
    task = lab_task("lab:refusal/test", 6)
    first, again, other = (
        [sample.output.completion for sample in run(task, tmp_path, temperature=2.5, seed=seed).samples]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    stopped = run(task, tmp_path, stop_seqs=[" the", " with"])
    assert {sample.output.stop_reason for sample in stopped.samples} == {"stop"}
    assert not any(" the" in s.output.completion or " with" in s.output.completion for s in stopped.samples)
    short = run(task, tmp_path, max_tokens=2)
    assert {(s.output.stop_reason, s.output.usage.output_tokens) for s in short.samples} == {
        ("max_tokens", 2)
    }


def test_what_cannot_be_applied_is_an_error_not_an_unsteered_answer(lab_moe: Any, tmp_path: Path) -> None:
    Steering.from_experts(lab_moe[0], activate={1: [4]}, scope="generated").save_pretrained(tmp_path / "fed")
    task = lab_task("lab:refusal/test", 3)
    log = run(task, tmp_path, arguments={"steering": str(tmp_path / "fed")}, max_tokens=1)
    assert log.status == "error"
    assert "scope 'generated' selects nothing" in log.error.message


def test_a_wrong_plan_is_refused_before_the_first_sample(safer: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsMismatch):
        get_model("steersman/lab:moe-plain", steering=str(safer))
    with pytest.raises(PlanError, match="names no steering"):
        get_model(MODEL, steering="@2")
    assert get_model("steersman/lab:moe-plain", steering=str(safer), match="architecture")


@pytest.mark.parametrize(
    ("chat", "tools", "why"),
    [
        ([ChatMessageUser(content="hello"), ChatMessageAssistant(content="i")], [], "does not end with"),
        ([ChatMessageUser(content=[ContentImage(image="x.png")])], [], "more than text"),
        ([ChatMessageUser(content="hello")], [bash()], "no tools"),
    ],
    ids=["prefill", "picture", "tools"],
)
async def _asked(chat: Any, tools: Any) -> None:
    await get_model(MODEL).generate(chat, tools=tools)
