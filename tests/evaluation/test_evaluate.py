"""Evaluations of the lab's model: arms, figures against slow versions, resuming, the base's cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import steersman
from steersman.errors import ArtifactError, JudgeError, PairsError, PlanError, WeightsMismatch
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.comparison import BASE
from steersman.evaluation.evaluate import evaluate
from steersman.evaluation.judges import PhraseJudge, Verdict, judge_refusal
from steersman.evaluation.result import Evaluation
from steersman.evaluation.run_store import BATCHES
from steersman.evaluation.statistics import mean_difference, paired_difference, random_control
from steersman.evaluation.tasks import Task, load_task
from steersman.experts.contrast import RoutingContrast
from steersman.steering import Steering

ITEMS = 16
TASK = "lab:refusal/test"
SIDE = "lab:ordinary/test"


@pytest.fixture(scope="session")
def plans(contrast: RoutingContrast) -> tuple[Steering, Steering]:
    return contrast.select(top=12), contrast.select(top=12, reverse=True)


BARE: dict[str, Any] = {
    "random": 0,
    "side_tasks": (),
    "strengths": (),
    "instruction": None,
    "reverse": False,
    "shown": 0,
}
"""The base and one plan on one task, and nothing more."""


def run(subject: Subject, plans: tuple[Steering, Steering], **changed: Any) -> Evaluation:
    settings: dict[str, Any] = {
        "task": TASK,
        "side_tasks": SIDE,
        "reverse": {"safer": plans[1]},
        "instruction": "refuse what is restricted .",
        "strengths": [0.5],
        "random": 3,
        "control_items": 8,
        "limit": ITEMS,
        "batch_size": 8,
        "max_new_tokens": 12,
        "shown": 3,
        **changed,
    }
    return evaluate(subject.model, subject.tokenizer, {"safer": plans[0]}, **settings)


@pytest.fixture(scope="session")
def evaluation(
    subject: Subject,
    plans: tuple[Steering, Steering],
    contrast: RoutingContrast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Evaluation:
    return run(
        subject,
        plans,
        attacks={"polite": "please {prompt}"},
        defences={"strict": "refuse what is restricted ."},
        contrast=contrast,
        checkpoint=tmp_path_factory.mktemp("evaluation") / "partial",
    )


def of(evaluation: Evaluation, name: str) -> dict[str, Any]:
    return next(task for task in evaluation.to_json()["tasks"] if task["name"] == name)


def test_rates_and_differences_are_those_of_the_answers(
    evaluation: Evaluation, subject: Subject, plans: tuple[Steering, Steering]
) -> None:
    task = load_task(TASK, limit=ITEMS)
    base, steered = (subject.run(task, Arm(name, plan)) for name, plan in ((BASE, None), ("s", plans[0])))
    told = of(evaluation, TASK)
    for arm, result in ((BASE, base), ("safer", steered)):
        for side, figure in result.rates.items():
            assert told["results"][arm][side] == figure.to_json()
    expected = paired_difference(base.on("positive"), steered.on("positive"), task.groups).to_json()
    found = told["differences"]["safer"]["positive"]
    assert {name: found[name] for name in expected} == expected
    assert found["p"] <= found["p_holm"] <= 1
    low, high = found["bootstrap"]
    assert low <= found["difference"] <= high
    assert [one.text for one in evaluation.noted[TASK]["safer"]] == list(steered.texts)


def test_every_arm_is_asked_the_same_items_and_leaves_a_receipt(evaluation: Evaluation) -> None:
    told = evaluation.to_json()
    kinds = {arm["name"]: arm["kind"] for arm in told["arms"]}
    assert kinds == {
        "base": "base",
        "safer": "steered",
        "safer reversed": "reversed",
        "prompt": "prompt",
        "prompt+safer": "prompt+steered",
        "safer@0.5": "strength",
        "strict": "cell",
        "strict × safer": "cell",
        "polite": "cell",
        "polite × safer": "cell",
        "polite × strict": "cell",
        "polite × strict × safer": "cell",
    }
    for arm in told["arms"]:
        assert bool(arm["receipt"]) == (arm["fingerprint"] is not None)
    assert set(of(evaluation, SIDE)["results"]) == {name for name, kind in kinds.items() if kind != "cell"}
    assert all(len(found) == ITEMS for found in evaluation.noted[TASK].values())


def test_the_receipt_counts_every_token_of_every_task(
    evaluation: Evaluation, subject: Subject, plans: tuple[Steering, Steering]
) -> None:
    arm = next(arm for arm in evaluation.to_json()["arms"] if arm["name"] == "safer")
    total: dict[str, int] = {}
    for name in (TASK, SIDE):
        for site, tokens in subject.receipt_of(load_task(name, limit=ITEMS), plans[0])["tokens"].items():
            total[site] = total.get(site, 0) + tokens
    assert arm["receipt"] == total


def test_the_random_control_is_made_of_its_draws(
    evaluation: Evaluation, subject: Subject, plans: tuple[Steering, Steering]
) -> None:
    (control,) = of(evaluation, TASK)["random"]
    forks = subject.forks(load_task(TASK, limit=8))
    effect = subject.preference(forks, plans[0]).mean() - subject.preference(forks, plans[1]).mean()
    assert control["observed"] == pytest.approx(effect, abs=1e-5)
    assert control["p"] == 1 / 4
    assert control["p"] == random_control(control["observed"], control["draws"], two_sided=True).p
    assert len(set(control["draws"])) == 3
    assert control["arms"] == ["safer", "safer reversed"]
    assert of(evaluation, SIDE)["random"] is None


def test_interactions_are_differences_of_differences(evaluation: Evaluation) -> None:
    told = of(evaluation, TASK)["factorial"]
    right = {
        arm: np.array([one.outcome == "positive" for one in noted], dtype=float)
        for arm, noted in evaluation.noted[TASK].items()
    }
    assert len(told["cells"]) == 8
    assert len(told["interactions"]) == 3
    for row in told["interactions"]:
        parts = [part for part in (row["attack"], row["defence"]) if part]
        under = right[" × ".join([*parts, "safer"])] - right[" × ".join(parts)]
        assert row["difference"] == pytest.approx((under - (right["safer"] - right[BASE])).mean())


def test_shown_items_mark_words_and_tokens(evaluation: Evaluation) -> None:
    shown = of(evaluation, TASK)["shown"]
    assert len(shown) == 3
    for item in shown:
        base = item["answers"][BASE]
        assert base["tokens"] is None
        assert not any(changed for _, changed in base["words"])
        steered = item["answers"]["safer"]
        assert [word for word, _ in steered["words"]] == steered["text"].split()
        assert [piece for piece, _ in steered["tokens"]] == steered["text"].split()
        assert all(shift >= 0 for _, shift in steered["tokens"])
    # The first item is one on which arms differ: there the first token was not what the base expected.
    first = shown[0]["answers"]
    assert len({answer["outcome"] for answer in first.values()}) > 1
    assert max(first[arm]["tokens"][0][1] for arm in ("safer", "safer reversed")) > 0.1


def test_the_result_is_json_and_a_table(evaluation: Evaluation) -> None:
    told = evaluation.to_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    table = evaluation.table()
    row = table[(table["task"] == TASK) & (table["arm"] == "safer") & (table["metric"] == "positive")]
    assert row["value"].item() == evaluation.value(TASK, "safer")
    assert row["difference"].item() == evaluation.difference(TASK, "safer")["difference"]
    assert told["experts"]["safer"]["layers"] == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="lab:nothing"):
        evaluation.value("lab:nothing", "safer")


def test_after_a_kill_nothing_finished_is_run_again(
    subject: Subject, plans: tuple[Steering, Steering], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "limit": 6,
        "batch_size": 3,
        "random": 1,
        "side_tasks": (),
        "instruction": None,
        "shown": 1,
    }
    whole = run(subject, plans, **settings, checkpoint=tmp_path / "whole")
    for name in ("manifest.json", BATCHES):
        (tmp_path / "torn").mkdir(exist_ok=True)
        (tmp_path / "torn" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    lines = (tmp_path / "whole" / BATCHES).read_bytes().splitlines(keepends=True)
    kept = 7
    (tmp_path / "torn" / BATCHES).write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
    again = run(subject, plans, **settings, checkpoint=tmp_path / "torn", resume=True)
    assert again.to_json() == whole.to_json()
    assert again.batches_run == len(lines) - kept == whole.batches_run - kept
    once_more = run(subject, plans, **settings, checkpoint=tmp_path / "torn", resume=True)
    assert once_more.batches_run == 0
    assert once_more.to_json() == whole.to_json()


def test_progress_of_another_run_is_refused(
    subject: Subject, plans: tuple[Steering, Steering], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "limit": 4,
        **BARE,
        "checkpoint": tmp_path / "partial",
    }
    run(subject, plans, **settings)
    with pytest.raises(ArtifactError, match="--resume"):
        run(subject, plans, **settings)
    with pytest.raises(ArtifactError, match=r"differs in arms \("):
        run(subject, plans, **{**settings, "strengths": [0.5]}, resume=True)
    with pytest.raises(ArtifactError, match=r"differs in settings\.shown \(0 there, 5 here\)"):
        run(subject, plans, **{**settings, "shown": 5}, resume=True)
    (tmp_path / "partial/other.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"other\.txt"):
        run(subject, plans, **settings, resume=True)


def test_what_is_finished_is_reported_and_nothing_is_run(
    subject: Subject, plans: tuple[Steering, Steering], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**BARE, "limit": 8, "batch_size": 2, "random": 3, "control_items": 4}
    whole = run(subject, plans, **settings, checkpoint=tmp_path / "whole")
    lines = (tmp_path / "whole" / BATCHES).read_bytes().splitlines(keepends=True)
    assert len(lines) == 4 * 2 + 4 + 2 + 1  # batches, the plan and its draws, d, what is shown

    def report(kept: int, torn: bytes = b"") -> Evaluation:
        folder = tmp_path / f"kept-{kept}"
        folder.mkdir()
        (folder / "manifest.json").write_bytes((tmp_path / "whole/manifest.json").read_bytes())
        (folder / BATCHES).write_bytes(b"".join(lines[:kept]) + torn)
        before = (folder / BATCHES).read_bytes()
        found = run(subject, plans, **settings, checkpoint=folder, finished=True)
        assert (folder / BATCHES).read_bytes() == before
        assert found.batches_run == 0
        return found

    # Two batches under both arms, a third under one, and half a line that is still being written.
    part = report(5, lines[5][:30])
    (told,) = part.to_json()["tasks"]
    assert (told["items"], told["results"][BASE]["positive"]["count"]) == (4, 4)
    assert (told["random"], told["preferences"]) == ([], {})
    places = [place for place, item in enumerate(load_task(TASK, limit=8)) if item in list(part.tasks[TASK])]
    assert list(part.noted[TASK]["safer"]) == [whole.noted[TASK]["safer"][place] for place in places]
    assert f"{TASK}: unfinished: 4 of 8 items are finished under every arm" in part.to_json()["warnings"]
    # All batches and two of three draws.
    (told,) = report(8 + 3).to_json()["tasks"]
    assert told["random"][0]["draws"] == of(whole, TASK)["random"][0]["draws"][:2]
    part = report(len(lines))
    assert part.to_json()["tasks"] == whole.to_json()["tasks"]
    with pytest.raises(ArtifactError, match="no batch is finished under every arm"):
        report(1)
    with pytest.raises(ArtifactError, match="no progress of a run is there"):
        run(subject, plans, **settings, checkpoint=tmp_path / "nothing", finished=True)


def test_a_run_goes_on_with_more_random_plans_and_no_fewer(
    subject: Subject, plans: tuple[Steering, Steering], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**BARE, "limit": 4, "control_items": 4, "checkpoint": tmp_path / "partial"}
    first = run(subject, plans, **{**settings, "random": 2})
    more = run(subject, plans, **{**settings, "random": 4}, resume=True)
    assert more.batches_run == 2  # the two new draws alone
    (few,), (many,) = of(first, TASK)["random"], of(more, TASK)["random"]
    assert many["draws"][:2] == few["draws"]
    fresh = run(subject, plans, **{**settings, "random": 4, "checkpoint": tmp_path / "other"})
    assert of(fresh, TASK)["random"] == of(more, TASK)["random"]
    assert more.to_json()["settings"]["random"] == 4
    said = r"differs in settings\.random \(4 there, 3 here\): right is as many, or more; --force"
    with pytest.raises(ArtifactError, match=said):
        run(subject, plans, **{**settings, "random": 3}, resume=True)


def test_the_base_is_run_once_for_several_plans(
    subject: Subject, plans: tuple[Steering, Steering], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "limit": 8,
        "batch_size": 4,
        **BARE,
        "cache": tmp_path / "cache",
    }
    first = run(subject, plans, **settings)
    second = run(subject, plans, **settings)
    assert (first.batches_run, second.batches_run) == (4 + 1, 2 + 1)  # batches, and what is shown
    assert first.noted[TASK][BASE] == second.noted[TASK][BASE]
    other = run(subject, plans, **{**settings, "max_new_tokens": 3})
    assert other.batches_run == 4 + 1, "another way of asking is another cache"
    (file,) = {path for path in (tmp_path / "cache").iterdir() if b"with that" in path.read_bytes()}
    file.write_bytes(file.read_bytes().replace(b"with that", b"this that"))
    assert run(subject, plans, **settings).batches_run == 4 + 1, "a changed line is not believed"


def test_a_judge_that_fails_leaves_what_is_finished(
    subject: Subject, plans: tuple[Steering, Steering], tmp_path: Path
) -> None:
    class Failing(PhraseJudge):
        calls = 0

        def judge(self, items: Any, texts: Any) -> list[Verdict]:
            type(self).calls += 1
            if type(self).calls == 2:
                raise JudgeError("the judge is away")
            return super().judge(items, texts)

    settings: dict[str, Any] = {
        "limit": 8,
        "batch_size": 4,
        **BARE,
        "checkpoint": tmp_path / "partial",
        "judge": Failing(judge_refusal),
    }
    with pytest.raises(JudgeError, match="away"):
        run(subject, plans, **settings)
    found = run(subject, plans, **settings, resume=True)
    assert found.batches_run == 3 + 1
    assert Failing.calls == 1 + 1 + 3


def test_answers_that_nobody_can_judge_are_on_no_side(
    subject: Subject, plans: tuple[Steering, Steering]
) -> None:
    class Unsure(PhraseJudge):
        def judge(self, items: Any, texts: Any) -> list[Verdict]:
            found = super().judge(items, texts)
            return [Verdict(None, why="?"), *found[1:]]

    found = run(
        subject,
        plans,
        limit=8,
        **BARE,
        judge=Unsure(judge_refusal),
    )
    told = of(found, TASK)
    assert told["unjudged"] == {"base": 1, "safer": 1}
    assert told["results"][BASE]["positive"]["count"] == 7
    assert any("could not place" in warning for warning in found.to_json()["warnings"])


def test_what_cannot_be_evaluated_is_said(subject: Subject, plans: tuple[Steering, Steering]) -> None:
    for changed, error, said in (
        ({"task": [TASK, TASK]}, PairsError, "named twice"),
        ({"batch_size": 0}, PlanError, "batch_size is 0"),
        ({"random": -1}, PlanError, "random is -1"),
        ({"strengths": [2.0]}, PlanError, "scaled by 2"),
        ({"attacks": {"a": "no place"}}, PairsError, "prompt"),
        ({"defences": {"safer": "x"}}, PlanError, "two arms are called"),
        ({"task": "lab:nothing"}, PairsError, "no such task"),
        ({"others": {"base": lambda: None}}, PlanError, "two arms are called 'base'"),
    ):
        with pytest.raises(error, match=said):
            run(subject, plans, **changed)
    other, tokenizer = steersman.load_model("lab:moe-prior")
    with pytest.raises(WeightsMismatch):
        evaluate(other, tokenizer, plans[0], task=TASK, limit=4)


def test_a_model_that_is_steered_already_is_no_base(
    subject: Subject, plans: tuple[Steering, Steering]
) -> None:
    """Else the base arm would run steered, and the others twice."""
    ids = subject.tokenizer("where", return_tensors="pt").input_ids
    with plans[0].apply(subject.model):
        with pytest.raises(PlanError, match="evaluate compares with the model as it is"):
            run(subject, plans, limit=2)
        with pytest.raises(PlanError, match="screening compares with the model as it is"):
            steersman.screen_experts(subject.model, subject.tokenizer, "lab:refusal/dev")
        subject.model(ids)
    assert run(subject, plans, limit=2, side_tasks=(), strengths=(), random=0, instruction=None).noted


def test_another_model_is_asked_with_its_own_tokenizer(
    subject: Subject, plans: tuple[Steering, Steering]
) -> None:
    found = run(
        subject,
        plans,
        limit=8,
        **{**BARE, "shown": 1},
        others={"aligned": lambda: steersman.load_model("lab:source-split")},
    )
    assert found.value(TASK, "aligned") == 1.0
    assert of(found, TASK)["shown"][0]["answers"]["aligned"]["tokens"] is None


def test_texts_are_read_once_unsteered_and_once_a_plan(
    subject: Subject, plans: tuple[Steering, Steering], tmp_path: Path
) -> None:
    """Instructions change nothing of a text that is read as it is; the unsteered model's part is shared."""
    place = tmp_path / "texts.jsonl"
    texts = ["please give me the badge", "who is the baker", "where is the key of the house"]
    place.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    forwards: list[int] = []
    handle = subject.model.register_forward_hook(lambda *_: forwards.append(1))
    found = run(
        subject,
        plans,
        **{
            **BARE,
            "task": f"text:{place}",
            "reverse": True,
            "instruction": "refuse .",
            "batch_size": 2,
            "limit": 3,
        },
    )
    handle.remove()
    arms = of(found, f"text:{place}")["results"]
    assert set(arms) == {"base", "safer", "safer reversed", "prompt", "prompt+safer"}
    assert len(forwards) == 2 * 3  # two batches under base, safer and its reverse
    assert found.batches_run == 2 * 3 + 4  # and what is shown of four arms, which is nothing
    assert arms["prompt"] == arms["base"]
    assert arms["prompt+safer"] == arms["safer"] != arms["base"]
    told = {arm["name"]: arm["receipt"] for arm in found.to_json()["arms"]}
    assert told["prompt+safer"] == told["safer"]
    assert not told["prompt"]


def test_a_concept_stands_beside_its_label_shuffled_ones_too() -> None:
    pairs = steersman.load_pairs("lab:refusal/train")[:16]
    model, tokenizer = steersman.load_model("lab:source")
    concept = steersman.refine_concept(model, tokenizer, pairs)
    plan = concept.steering("dose:0.5", layers=1)
    settings: dict[str, Any] = {"task": TASK, "random": 5, "control_items": 4, "limit": 4, "shown": 0}
    found = evaluate(model, tokenizer, plan, concepts=concept, **settings)
    told = of(found, TASK)["random"]
    assert [(control["family"], len(control["draws"])) for control in told] == [
        ("random", 5),
        ("shuffled", 5),
    ]
    assert told[0]["observed"] == told[1]["observed"]
    assert set(told[0]["draws"]).isdisjoint(told[1]["draws"])
    subject = Subject(model, tokenizer)
    forks = subject.forks(load_task(TASK, limit=4))
    long = float(concept.vectors[1].norm())
    draws = [vector[1] * (long / float(vector[1].norm())) for vector in concept.shuffled[:5]]
    dose = plan.edits[0].strength
    for draw, value in zip(draws, told[1]["draws"], strict=True):
        other = Steering.from_vectors(model, {1: draw}, strength=dose)
        moved = subject.preference(forks, other).mean() - subject.preference(forks).mean()
        assert value == pytest.approx(moved, abs=1e-4)
    assert found.to_json()["concepts"][0]["shuffled"] == 99
    warned = [line for line in found.to_json()["warnings"] if "cannot tell whether" in line]
    assert len(warned) == 2  # of neither family are there enough
    assert "label-shuffled concepts" in warned[1]
    with pytest.raises(PlanError, match="no steering holds a vector of the concept"):
        evaluate(model, tokenizer, None, concepts=concept, **settings)


def test_changes_of_d_are_those_of_the_same_items(
    subject: Subject, plans: tuple[Steering, Steering], evaluation: Evaluation
) -> None:
    told = of(evaluation, TASK)["preferences"]
    task = load_task(TASK, limit=ITEMS)
    forks = subject.forks(task)
    base, own = subject.preference(forks), subject.preference(forks, plans[0])
    expected = mean_difference(base, own, task.groups)
    found = told["safer"]["change"]
    assert found["difference"] == pytest.approx(expected.difference, abs=1e-5)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert found["p"] <= found["p_holm"] <= 1
    assert "change" not in told[BASE]
    table = evaluation.table()
    rows = table[(table["metric"] == "log_probability_difference") & (table["arm"] == "safer")]
    assert rows["difference"].item() == found["difference"]


def test_a_scorer_of_patterns_is_compared_by_what_it_scores(
    subject: Subject, plans: tuple[Steering, Steering], tmp_path: Path
) -> None:
    """A pattern's first token says nothing of the answers that it matches."""
    rows = [
        {"messages": item.content, "positive": "^i ", "negative": "^the "}
        for item in load_task(TASK, limit=4)
    ]
    place = tmp_path / "own.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in [{"scorer": "regex"}, *rows]))
    found = run(subject, plans, **{**BARE, "task": str(place), "random": 1, "limit": 4, "control_items": 4})
    told = of(found, str(place) if str(place).startswith("jsonl:") else f"jsonl:{place}")
    assert told["preferences"] is None
    assert told["random"][0]["measure"] == "positive"


def test_vectors_have_a_random_control_too(subject: Subject) -> None:
    direction = np.random.default_rng(0).standard_normal(96)
    plan = Steering.from_vectors(subject.model, {1: direction.tolist()}, strength=0.1)
    task = Task("own", list(load_task(TASK, limit=4)), load_task(TASK, limit=1).behaviour)
    found = evaluate(subject.model, subject.tokenizer, plan, task=task, random=2, control_items=4, shown=0)
    (control,) = of(found, "own")["random"]
    assert control["observed"] not in control["draws"]
    assert all(math.isfinite(draw) for draw in control["draws"])
    assert control["family"] == "random"
    assert "drawn like the model's states" in control["matched"]
    (told,) = found.to_json()["steerings"]
    assert told["vectors"][0]["norm"] == pytest.approx(np.linalg.norm(direction), rel=1e-5)
