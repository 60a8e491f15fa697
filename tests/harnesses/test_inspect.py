"""Inspect AI's provider `steersman/…`: the evaluation's accuracies, batches in one thread, and errors."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="inspect-ai is not installed (make test-harness)")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    GenerateConfig,
    ModelOutput,
    ResponseSchema,
    get_model,
)
from inspect_ai.scorer import Score, Scorer, accuracy, scorer
from inspect_ai.solver import generate
from inspect_ai.tool import ToolCall, ToolCallError, ToolInfo
from inspect_ai.util import JSONSchema

from steersman import Steering
from steersman.errors import ModelError, PairsError, PlanError, WeightsMismatch
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.tasks import load_task
from steersman.harnesses.inspect_model import CARRIED_OUT, OF_INSPECT, READ, UNREAD
from waiting import HANGING

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
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGING, env=os.environ
    )
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
        "chats": said["chats"],
    }
    assert set(said["chats"]) == {"template_sha256", "arguments", "date"}
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
    assert "selects nothing here: no generated token is fed back" in log.error.message


def test_a_wrong_plan_is_refused_before_the_first_sample(safer: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsMismatch):
        get_model("steersman/lab:moe-plain", steering=str(safer))
    with pytest.raises(PlanError, match="names no steering"):
        get_model(MODEL, steering="@2")
    assert get_model("steersman/lab:moe-plain", steering=str(safer), match="architecture")


# What is asked is carried out, or refused by name -----------------------------------------------------------


def answer(chat: Any, tools: Any = (), tool_choice: Any = None, **config: Any) -> ModelOutput:
    """What the provider itself answers: Inspect's own `Model` would retry errors."""
    provider = get_model(MODEL).api
    settings = GenerateConfig(**{"max_tokens": 8, **config})
    chat = [ChatMessageUser(content=chat)] if isinstance(chat, str) else chat
    return asyncio.run(provider.generate(chat, list(tools), tool_choice or "auto", settings))


HELLO = ChatMessageUser(content="what is the lockcipher of the garden ?")
CALL = ToolCall(id="1", function="bash", arguments={"cmd": "ls"})


@pytest.mark.parametrize(
    ("chat", "why"),
    [
        ([HELLO, ChatMessageAssistant(content="i")], "does not end with"),
        ([ChatMessageUser(content=[ContentImage(image="x.png")])], r"more than text \(image\)"),
        (
            [HELLO, ChatMessageAssistant(content="", tool_calls=[CALL]), HELLO],
            "assistant message has tool_calls",
        ),
        ([HELLO, ChatMessageAssistant(content=[ContentReasoning(reasoning="so")]), HELLO], r"\(reasoning\)"),
        (
            [HELLO, ChatMessageTool(content="a", error=ToolCallError("timeout", "late"))],
            "tool message has error",
        ),
        ([HELLO, ChatMessageAssistant(content=""), HELLO], 'message 2: "content" is empty'),
    ],
)
def test_messages_that_would_not_reach_the_model_are_refused(chat: Any, why: str) -> None:
    with pytest.raises(PairsError, match=why):
        answer(chat)


def test_tools_are_refused() -> None:
    with pytest.raises(PairsError, match="no tools"):
        answer([HELLO], tools=[ToolInfo(name="bash", description="runs")])
    with pytest.raises(PairsError, match="no tools"):
        answer([HELLO], tool_choice="any")


def test_every_field_of_a_message_is_decided() -> None:
    refused = {"tool_calls", "error"}
    for message in (ChatMessageSystem, ChatMessageUser, ChatMessageAssistant, ChatMessageTool):
        assert set(message.model_fields) <= READ | UNREAD | refused


REFUSED: dict[str, Any] = {
    "best_of": 2,
    "prompt_logprobs": 1,
    "verbosity": "low",
    "effort": "low",
    "reasoning_effort": "low",
    "reasoning_mode": "pro",
    "reasoning_tokens": 10,
    "reasoning_summary": "auto",
    "response_schema": ResponseSchema(name="a", json_schema=JSONSchema(type="object")),
    "extra_headers": {"a": "b"},
    "extra_body": {"a": 1},
    "modalities": ["image"],
    "fallback_models": ["other"],
}


def test_every_field_of_a_request_is_decided() -> None:
    assert set(GenerateConfig.model_fields) <= CARRIED_OUT | OF_INSPECT | set(REFUSED)
    assert not (CARRIED_OUT & OF_INSPECT)


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(GenerateConfig.model_fields)))
def test_what_cannot_be_carried_out_is_refused_by_name(name: str) -> None:
    with pytest.raises(PairsError, match=f"cannot carry out {name}: leave it out"):
        answer([HELLO], **{name: REFUSED[name]})


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"top_p": 0.5}, "top_p without a temperature"),
        ({"top_k": 5}, "top_k without a temperature"),
        ({"top_logprobs": 2}, "top_logprobs without logprobs"),
        ({"max_tokens": 0}, "max_tokens is 0: right is 1 or more"),
        ({"num_choices": 0}, "num_choices is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias: "),
    ],
)
def test_what_would_be_ignored_is_refused(asked: dict[str, Any], why: str) -> None:
    with pytest.raises((PairsError, ModelError), match=why):
        answer([HELLO], **asked)


def test_penalties_and_biases_and_choices(lab_moe: Any) -> None:
    plain = answer([HELLO])
    ids = lab_moe[1](plain.completion)["input_ids"]
    never = answer([HELLO], logit_bias={ids[0]: -100.0})
    assert never.completion.split()[0] != plain.completion.split()[0]
    always = answer([HELLO], logit_bias={ids[2]: 100.0}, max_tokens=6)
    word = plain.completion.split()[2]
    assert set(always.completion.split()) == {word}
    for penalty in ("frequency_penalty", "presence_penalty"):
        varied = answer([HELLO], logit_bias={ids[2]: 100.0}, max_tokens=6, **{penalty: 150.0})
        assert varied.completion.split().count(word) == 1
    twice = answer([HELLO], num_choices=3, temperature=3.0, seed=5)
    assert len({choice.message.text for choice in twice.choices}) > 1
    assert len(twice.choices) == 3
    assert twice.usage.output_tokens > plain.usage.output_tokens
    assert [choice.message.text for choice in answer([HELLO], num_choices=2).choices] == [
        plain.completion
    ] * 2


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ mood }} {{ m['content'] }} {% endfor %}{{ add_generation_prompt }}"
    )
    arguments = {"chat_template": str(tmp_path / "own.jinja"), "chat_template_args": {"mood": "a"}}
    long = get_model(MODEL, **arguments).api
    said = asyncio.run(long.generate([HELLO], [], "auto", GenerateConfig(max_tokens=2)))
    assert said.usage.input_tokens != answer([HELLO], max_tokens=2).usage.input_tokens
    with pytest.raises(ModelError, match='never uses the argument "moo"'):
        get_model(MODEL, **{**arguments, "chat_template_args": {"moo": 1}})


def test_a_checkpoints_own_settings_are_said_or_refused(checkpoint: str, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    path = folder / "generation_config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps({**own, "repetition_penalty": 1.1}))
    provider = get_model(f"steersman/{folder}").api
    said = asyncio.run(provider.generate([HELLO], [], "auto", GenerateConfig(max_tokens=2))).metadata
    assert said == {"steersman": {"generation": {"acting": {"repetition_penalty": 1.1}, "set_aside": {}}}}
    path.write_text(json.dumps({**own, "max_time": 3.0}))
    with pytest.raises(ModelError, match=r"sets max_time to 3(\.0)?, which ends answers by the clock"):
        get_model(f"steersman/{folder}", memoize=False)
