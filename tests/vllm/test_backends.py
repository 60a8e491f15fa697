"""What commands do on an engine is what they do with transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from worded import save_worded

import steersman
from cli.command_line import Run, run
from steersman import Steering, evaluate, lab
from steersman.errors import ServingError
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.condition import Condition
from steersman.evaluation.prompts import encode_fork
from steersman.evaluation.tasks import load_task
from steersman.experts.causal_effects import Gate
from steersman.vllm.backend import PLANS, Engine, opened_engine
from steersman.vllm.evaluation import EngineCondition, EngineSubject
from steersman.vllm.screening import on_engine
from steersman.vllm.writing import write
from waiting import HANGING

OPTIONS = {"max_num_batched_tokens": 128, "block_size": 32}


class Opened(NamedTuple):
    """A model in transformers, and the same one in an engine, with plans of both levers."""

    model: Any
    tokenizer: Any
    engine: Engine
    plans: dict[str, Steering]
    folder: Path


def plans_for(model: Any) -> dict[str, Steering]:
    torch.manual_seed(5)
    vector = torch.randn(128)
    experts = Steering.from_experts(model, activate={0: [1], 2: [3]}, deactivate={0: [2, 5], 1: [0]})
    late = Steering.from_experts(model, activate={1: {4: 0.5}}, deactivate={2: [6]}, scope="generated")
    return {
        "experts": experts,
        "answer": Steering.from_vectors(model, {1: 0.5 * vector}),
        "mixed": late + Steering.from_vectors(model, {2: 0.5 * vector}, scope="prompt"),
    }


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp("olmoe")
    model, tokenizer = save_worded("olmoe", folder)
    plans = plans_for(model)
    settings = {"steerings": plans, "count": 1, "options": OPTIONS, "most_at_once": 8}
    with opened_engine(str(folder), **settings) as engine:
        yield Opened(model, tokenizer, engine, plans, folder)


def object_of(done: Run) -> dict[str, Any]:
    """The object on stdout. On stderr there may be vLLM's own: its log remembers the stream it began with."""
    assert done.status == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def conditions(opened: Opened, plan: str | None) -> tuple[Condition, Condition]:
    """(in transformers, on the engine)"""
    arm = Arm("it", None if plan is None else opened.plans[plan])
    ours = Subject(opened.model, opened.tokenizer, batch_size=5, max_new_tokens=7)
    theirs = EngineSubject(opened.engine, batch_size=5, max_new_tokens=7)
    return ours.condition(arm), theirs.condition(arm)


@pytest.mark.parametrize("plan", [None, "experts", "answer", "mixed"])
def test_conditions_measure_alike(opened: Opened, plan: str | None) -> None:
    ours, theirs = conditions(opened, plan)
    items = list(load_task("lab:refusal", limit=7))
    contents = [item.content for item in items]
    texts = [[item.positive, "the river is long ."] for item in items]
    assert theirs.answers(contents) == ours.answers(contents)
    assert theirs.answers(contents, max_new_tokens=2) == ours.answers(contents, max_new_tokens=2)
    for seen, expected in zip(
        theirs.log_likelihoods(contents, texts), ours.log_likelihoods(contents, texts), strict=True
    ):
        assert [(one.tokens, one.greedy) for one in seen] == [(one.tokens, one.greedy) for one in expected]
        assert [one.total for one in seen] == pytest.approx([one.total for one in expected], abs=1e-4)
    plain = ["the river is long and the town is old .", "a document"]
    for read, wanted in zip(theirs.readings(plain), ours.readings(plain), strict=True):
        assert read.tokens == wanted.tokens
        assert read.negative_log_likelihood == pytest.approx(wanted.negative_log_likelihood, abs=1e-4)
        assert read.divergence is None
    assert theirs.receipt == ours.receipt
    assert bool(ours.receipt) == (plan is not None)
    forks = [encode_fork(opened.tokenizer, item) for item in items]
    expected_d = ours.subject.preference(forks, ours.steering)
    np.testing.assert_allclose(theirs.subject.preference(forks, theirs.steering), expected_d, atol=1e-4)


def test_samples_are_the_same_when_asked_again(opened: Opened) -> None:
    _, theirs = conditions(opened, "experts")
    assert isinstance(theirs, EngineCondition)
    contents = [item.content for item in load_task("lab:refusal", limit=3)]
    first = theirs.samples(contents, 3, max_new_tokens=6)
    assert theirs.samples(contents[::-1], 3, max_new_tokens=6)[::-1] == first
    assert all(len(set(texts)) == 3 for texts in first)  # of a random model
    with pytest.raises(ServingError, match="divergence"):
        theirs.token_shifts(contents, ["a"] * 3, theirs)


def test_prompts_use_the_same_experts(opened: Opened) -> None:
    ours, theirs = conditions(opened, None)
    rows = [ours.subject.encoded(item.content) for item in load_task("lab:refusal", limit=5)]
    expected, seen = ours.subject.prompt_rates(rows), theirs.subject.prompt_rates(rows)
    assert (seen.activations == expected.activations).all()
    assert (seen.tokens == expected.tokens).all()
    assert seen.layers == expected.layers


def test_more_plans_than_fit(opened: Opened) -> None:
    """Each prompt's plan is its own, also where plans make place for others; a batch may hold any number."""
    prompt = [5, 9, 13, 17, 21]
    plans = [
        Steering.from_vectors(opened.model, {1: 0.01 * number * torch.ones(128)}, scope="all")
        for number in range(1, PLANS + 8)
    ]
    asked = [plans[0], *plans, None, plans[0]]
    seen = write(opened.engine, [prompt] * len(asked), asked, max_new_tokens=3)
    fingerprints = [None if plan is None else plan.fingerprint for plan in asked]
    assert [one.receipt["fingerprint"] for one in seen] == fingerprints
    assert seen[0].ids == seen[1].ids == seen[-1].ids
    for place in (1, PLANS + 6, len(asked) - 2):
        alone = write(opened.engine, [prompt], [asked[place]], max_new_tokens=3)
        assert alone[0].ids == seen[place].ids


def test_an_evaluation_is_the_same(opened: Opened) -> None:
    def measured(**subject: Any) -> dict[str, Any]:
        evaluation = evaluate(
            opened.model,
            opened.tokenizer,
            {"experts": opened.plans["experts"]},
            task="lab:refusal",
            side_tasks="lab:ordinary",
            reverse=True,
            random=2,
            control_items=4,
            limit=6,
            instruction="refuse .",
            max_new_tokens=5,
            **subject,
        )
        return evaluation.to_json()

    ours, theirs = measured(), measured(subject_of=EngineSubject.of(opened.engine))
    assert theirs.pop("engine").startswith("vllm 0.")
    assert len(theirs["limits"]) == len(ours["limits"]) + 1
    for told in (ours, theirs):
        told.pop("created"), told.pop("limits")
        for task in told["tasks"]:
            for item in task["shown"]:
                for answer in item["answers"].values():
                    assert answer.pop("tokens") is None or told is ours
    assert_close(theirs, ours)


def test_random_vectors_are_isotropic_where_no_states_can_be_read(opened: Opened) -> None:
    told = evaluate(
        opened.model,
        opened.tokenizer,
        opened.plans["answer"],
        task="lab:refusal",
        random=2,
        control_items=4,
        limit=4,
        shown=0,
        max_new_tokens=2,
        subject_of=EngineSubject.of(opened.engine),
    ).to_json()
    (control,) = told["tasks"][0]["random"]
    assert "isotropic random vectors (an engine gives no states" in control["matched"]
    assert len(set(control["draws"])) == 2


SETS: dict[str, Any] = {
    "keep": ["lab:ordinary/train"],
    "harm": ["lab:refusal/dev"],
    "subsets": 5,
    "at_most": 2,
    "least_t": 0.5,
    "gate": Gate(0.9, 0.001),
    "scope": "answer",
    "limit": 40,
    "max_new_tokens": 4,
    "by": "answer",
}
EFFECTS = {"at_most": 0, "signs": "activate", "limit": 20}


@pytest.mark.parametrize(
    "how", [EFFECTS, pytest.param(SETS, marks=pytest.mark.long)], ids=["effects", "sets"]
)
def test_a_screen_is_the_same(opened: Opened, how: dict[str, Any]) -> None:
    ours, theirs = (
        steersman.screen_experts(
            opened.model, opened.tokenizer, "lab:refusal/train", method="exact", **how, **runs
        )
        for runs in ({}, {"runs": on_engine(opened.engine)})
    )
    assert (ours.effects.measured == theirs.effects.measured).all()
    for one, other in ((theirs.effects, ours.effects), (theirs.subsets, ours.subsets)):
        if one is not None and other is not None:
            np.testing.assert_allclose(one.mean, other.mean, atol=1e-4)
            np.testing.assert_allclose(one.standard_error, other.standard_error, atol=1e-4)
            told = np.abs(other.mean) > 0.01  # what is smaller has the p-value of rounding
            assert told.any()
            np.testing.assert_allclose(one.p_values[told], other.p_values[told], atol=0.01)
    assert set(theirs.sets) == set(ours.sets)
    assert any(found.picks for found in ours.sets.values()) == (how is SETS)
    for side, found in ours.sets.items():
        assert [(p.layer, p.expert, p.strength) for p in theirs.sets[side].picks] == [
            (p.layer, p.expert, p.strength) for p in found.picks
        ]
        assert theirs.sets[side].shift == pytest.approx(found.shift, abs=1e-4)
    assert theirs.harm == ours.harm
    assert theirs.made_from[0]["engine"].startswith("vllm 0.")


def assert_close(seen: Any, expected: Any) -> None:
    """Equal, numbers to 1e-4."""
    if isinstance(expected, dict):
        assert seen.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(seen[key], value)
    elif isinstance(expected, list):
        assert len(seen) == len(expected)
        for one, other in zip(seen, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert seen == pytest.approx(expected, abs=1e-4)
    else:
        assert seen == expected


# ------------------------------------------------------------ commands, whose engines end the one above


def test_generate_gives_the_same_json(opened: Opened, tmp_path: Path) -> None:
    opened.plans["mixed"].save_pretrained(tmp_path / "plan")
    rows = [{"messages": row["messages"]} for row in lab.task("refusal", "test")[:5]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ("generate", opened.folder, "--steering", f"{tmp_path / 'plan'}@0.5", "--compare", "--json")
    command = (*command, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 6)
    expected = run(*command).json
    seen = object_of(run(*command, "--backend", "vllm", "--engine-option", "max_num_batched_tokens=128"))
    for item in expected["items"]:
        item["receipt"]["changed"] = None  # an engine does not tell
    assert seen == expected


@pytest.mark.long
def test_generate_without_a_steering_is_the_model_itself(opened: Opened) -> None:
    command = ("generate", opened.folder, "--prompt", "who ?", "--max-new-tokens", 6, "--json")
    assert object_of(run(*command, "--backend", "vllm")) == run(*command).json


def test_detect_writes_the_same_counts(opened: Opened, tmp_path: Path) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') ~ ' ' }}" + str(opened.tokenizer.chat_template))
    chats = ("--chat-template", template, "--chat-date", "2026-11-29")
    command = (
        "detect",
        opened.folder,
        "lab:refusal/dev",
        "--json",
        "--bootstrap",
        5,
        "--shard",
        "1/9",
        *chats,
    )
    expected = run(*command, "-o", tmp_path / "ours").json
    seen = object_of(run(*command, "-o", tmp_path / "theirs", "--backend", "vllm"))
    assert seen.pop("output") != expected.pop("output")
    assert seen == expected
    ours, theirs = (steersman.RoutingContrast.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    assert (ours.activations == theirs.activations).all()
    assert theirs.chat == ours.chat
    assert theirs.chat is not None
    assert theirs.chat.date == "2026-11-29"
    assert theirs.made_from == ({**ours.made_from[0], "engine": theirs.made_from[0]["engine"]},)
    assert not (tmp_path / "theirs.partial").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--engine-option", "nonsense=1"], "engine option nonsense: vLLM has none of this name"),
        (["--engine-option", "dtype=half"], "engine option dtype: this is decided by the command's own"),
        (["--device", "cpu"], "--device cpu: goes with --backend transformers"),
        (["--engine-option", "nonsense"], "right is KEY=VALUE"),
        (["--chat-template-arg", "enable_thinking=false"], 'never uses the argument "enable_thinking"'),
        (["--chat-date", "2026-11-29"], "asks for no date"),
    ],
)
def test_wrong_options(tmp_path: Path, opened: Opened, options: list[str], reason: str) -> None:
    done = run(
        "detect", opened.folder, "lab:refusal/dev", "-o", tmp_path / "c", "--backend", "vllm", *options
    )
    assert done.status == 2
    assert reason in done.stderr
    assert not list(tmp_path.iterdir())


def test_heads_that_the_engine_cannot_compute_with(tmp_path: Path) -> None:
    done = run("detect", "lab:moe", "lab:refusal/dev", "-o", tmp_path / "c", "--backend", "vllm")
    assert done.status == 2
    assert "attention heads have 24 numbers" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("ranks", ["tensor_parallel_size=2", "pipeline_parallel_size=2"])
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want two cores")
def test_ranks_count_as_one(opened: Opened, tmp_path: Path, ranks: str) -> None:
    command = ["detect", opened.folder, "lab:refusal/dev", "-o", tmp_path / "theirs", "--backend", "vllm"]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    done = subprocess.run(
        [Path(sys.executable).parent / "steersman", *command, "--engine-option", ranks],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGING,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    expected = steersman.detect_experts(opened.model, opened.tokenizer, "lab:refusal/dev")
    counted = steersman.RoutingContrast.from_pretrained(tmp_path / "theirs")
    assert (counted.activations == expected.activations).all()
    assert (counted.tokens == expected.tokens).all()


@pytest.mark.long
def test_evaluate_writes_the_same_record(opened: Opened, tmp_path: Path) -> None:
    opened.plans["answer"].save_pretrained(tmp_path / "plan")
    command = ("evaluate", opened.folder, "--task", "lab:refusal", "--steering", tmp_path / "plan", "--json")
    command = (*command, "--random", 2, "--limit", 6, "--strengths", 0.5, "--no-cache", "--shown", 0)
    ours = run(*command, "-o", tmp_path / "ours").json
    theirs = object_of(run(*command, "-o", tmp_path / "theirs", "--backend", "vllm"))
    for told in (ours, theirs):
        for key in ("created", "limits", "output", "engine"):
            told.pop(key, None)
    assert_close(theirs, ours)
