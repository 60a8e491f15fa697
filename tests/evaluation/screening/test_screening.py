"""screen_experts from items to sets, what it refuses, and going on after a stop; on a lab model."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm

from every_dense import tiny as dense
from steersman import (
    ArtifactError,
    CausalScreen,
    ModelError,
    PairsError,
    PlanError,
    RoutingContrast,
    Steering,
    WeightsMismatch,
    lab,
    load_pairs,
    screen_experts,
)
from steersman.cli.screening import screen_for_json
from steersman.evaluation.arms import Subject
from steersman.evaluation.screening import exact
from steersman.evaluation.screening import screen as module
from steersman.evaluation.screening.expert_calls import CannotEstimate
from steersman.evaluation.screening.items import halves, open_items, some_of
from steersman.evaluation.statistics import clustered_mean
from steersman.evaluation.tasks import BEHAVIOURS, Task, load_task
from steersman.experts.causal_effects import Gate

TASK = "lab:faithfulness/train"
KEPT = load_task("lab:ordinary/train", limit=20)
QUICK: dict[str, Any] = {"limit": 40, "exact_runs": 4, "at_most": 1, "batch_size": 64}


@pytest.fixture(scope="module")
def screen(subject: Subject) -> CausalScreen:
    return screen_experts(
        subject.model,
        subject.tokenizer,
        TASK,
        keep=[KEPT],
        harm=["lab:ordinary/dev"],
        harm_limit=12,
        **QUICK,
    )


def test_effects_are_the_mean_changes_of_d(subject: Subject, screen: CausalScreen) -> None:
    """An exact effect, its error and p, from d of separate runs."""
    first, second = halves(some_of(load_task(TASK), 40, 0), 0)
    assert not {*first.groups} & {*second.groups}
    assert (screen.items, screen.clusters, screen.choosing_items) == (len(first), 20, len(second))
    assert screen.exact.sum(axis=(1, 2)).tolist() == [2, 2]  # as many of either sign
    sign, row, expert = (int(of[0]) for of in np.nonzero(screen.exact))
    experts = {screen.layers[row]: [expert]}
    plan = Steering.from_experts(subject.model, **{("activate" if sign else "deactivate"): experts})  # type: ignore[arg-type]
    forks = subject.forks(first)
    found = clustered_mean(subject.preference(forks, plan) - subject.preference(forks), first.groups)
    assert screen.effects.mean[sign, row, expert] == pytest.approx(found.mean, abs=1e-5)
    assert screen.effects.standard_error[sign, row, expert] == pytest.approx(found.standard_error, abs=1e-5)


def test_sets_move_d_both_ways_and_are_selected(subject: Subject, screen: CausalScreen) -> None:
    assert screen.found
    toward, back = screen.select(), screen.select(reverse=True)
    assert toward.provenance["by"] == "causal"
    assert toward.strengths == screen.sets["toward"].strengths
    assert screen.sets["toward"].shift > 0.5 > -0.5 > screen.sets["reversed"].shift
    forks = subject.forks(load_task("lab:faithfulness/dev", limit=12))
    base = subject.preference(forks).mean()
    assert subject.preference(forks, toward).mean() > base + 0.5
    assert subject.preference(forks, back).mean() < base - 0.5
    (kept, *_) = screen.harm
    assert (kept["task"], kept["direction"], kept["items"]) == ("lab:ordinary/dev", "toward", 12)
    assert kept["difference"]["low"] <= kept["difference"]["difference"] <= kept["difference"]["high"]


def test_so_many_of_those_that_pass(screen: CausalScreen) -> None:
    ranking = screen.ranking()
    chosen = screen.select(top=2, strength=0.5)
    assert {(layer, expert): v for layer, e in chosen.strengths.items() for expert, v in e.items()} == {
        (layer, expert): math.copysign(0.5, score) for layer, expert, score in ranking[:2]
    }
    with pytest.raises(PlanError, match=f"999 experts, but {len(ranking)} pass the gate"):
        screen.select(top=999)
    with pytest.raises(PlanError, match="strength 2"):
        screen.select(strength=2)


def test_the_table_has_both_ranks(screen: CausalScreen, subject: Subject) -> None:
    table = screen.table()
    assert table["causal_rank"].tolist() == list(range(1, 129))
    assert "risk_difference" not in table
    difference = np.zeros((4, 32))
    difference[2, 5] = -0.9
    beside = CausalScreen(**{**vars_of(screen), "risk_difference": difference})
    row = beside.table().query("layer == 2 and expert == 5").iloc[0]
    assert (row["observational_rank"], row["risk_difference"]) == (1, -0.9)
    agreement = beside.agreement()
    assert agreement is not None
    assert set(agreement) == {"activate", "deactivate"}


def vars_of(screen: CausalScreen) -> dict[str, Any]:
    return {name: getattr(screen, name) for name in screen.__dataclass_fields__}


def assert_alike(one: Any, other: Any) -> None:
    """Equal JSON; numbers but for rounding, since several threads add up gradients in any order."""
    if isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-7)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name, value in one.items():
            assert_alike(value, other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for value, another in zip(one, other, strict=True):
            assert_alike(value, another)
    else:
        assert one == other


def test_a_stopped_screen_goes_on_to_the_same(
    subject: Subject, screen: CausalScreen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at any measurement: the same JSON, and nothing that was saved is measured again."""
    monkeypatch.setattr("steersman.progress.SHARE", 1e9)  # save after each
    runs: list[int] = []
    single = exact.Instrument.singles

    def counting(tool: exact.Instrument, *rest: Any) -> Any:
        runs.append(1)
        if len(runs) in (3, 6):
            raise KeyboardInterrupt
        return single(tool, *rest)

    monkeypatch.setattr(exact.Instrument, "singles", counting)

    def go_on(**changed: Any) -> CausalScreen:
        return screen_experts(
            subject.model,
            subject.tokenizer,
            TASK,
            keep=[KEPT],
            harm=["lab:ordinary/dev"],
            harm_limit=12,
            checkpoint=tmp_path / "p",
            resume=True,
            **{**QUICK, **changed},
        )

    found = None
    while found is None:
        try:
            found = go_on()
        except KeyboardInterrupt:
            continue
    assert_alike(screen_for_json(found), screen_for_json(screen))
    interrupted = len(runs)
    runs[:] = [0] * 100
    go_on()
    assert len(runs) == 100  # all was there
    assert interrupted > 6
    with pytest.raises(ArtifactError, match=r"another run, which differs in seed \(0 there, 1 here\)"):
        go_on(seed=1)


def test_sets_in_rounds_go_by_what_experts_were_screened_by(subject: Subject) -> None:
    """Several experts join, and d of whole answers moves."""
    options = {**QUICK, "method": "estimate", "by": "answer", "choose": "rounds", "at_most": 4}
    found = screen_experts(subject.model, subject.tokenizer, TASK, **options)
    (items,) = found.made_from
    assert (items["by"], items["role"]) == ("answer", "items")
    picks = [(pick.layer, pick.expert) for pick in found.sets["toward"].picks]
    assert len(picks) > 1
    assert found.sets["toward"].shift > 0.5 > -0.5 > found.sets["reversed"].shift
    assert [entry[:2] for entry in found.order()[: len(picks)]] == picks
    assert len(found.order()) > len(found.ranking(significant=True)) >= len(found.ranking())


def test_an_architecture_without_estimates_has_no_sets_in_rounds(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> None:
        raise CannotEstimate("its experts cannot be called")

    monkeypatch.setattr("steersman.evaluation.screening.greedy.estimates_beside", cannot)
    options = {**QUICK, "choose": "rounds", "method": "estimate", "signs": "activate"}
    with pytest.raises(ModelError, match=r"cannot be chosen in rounds .* use choose greedy"):
        screen_experts(subject.model, subject.tokenizer, TASK, **options)


def test_the_bar_says_how_much_there_is(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, float, float | None]] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "file": io.StringIO(), "delay": 0})

        def reset(self, total: float | None = None) -> None:
            steps.append((self.desc, self.n, self.total))
            super().reset(total)

        def close(self) -> None:
            if not self.disable:
                steps.append((self.desc, self.n, self.total))
            super().close()

    monkeypatch.setattr(module, "tqdm", Bar)
    options = {**QUICK, "signs": "activate", "exact_runs": 2, "harm_limit": 4, "progress": True}
    screen_experts(subject.model, subject.tokenizer, TASK, harm=["lab:ordinary/dev"], **options)
    _, estimating, screening, toward, back, harm = steps
    assert all(done == total for _, done, total in (estimating, screening, toward, back, harm))
    assert (toward, back, harm) == (
        ("choosing toward: ", 1, 1),
        ("choosing reversed: ", 1, 1),
        ("harm", 3, 3),
    )


def test_subsets_are_screened_beside(subject: Subject) -> None:
    found = screen_experts(
        subject.model,
        subject.tokenizer,
        TASK,
        method="estimate",
        subsets=7,
        signs="deactivate",
        **{**QUICK, "at_most": 0},
    )
    assert found.subsets is not None
    assert found.subsets.measured[0].all()
    assert not found.subsets.measured[1].any()
    assert not found.exact.any()
    assert "deactivate_in_subsets" in found.table()
    with pytest.raises(PlanError, match="no sets were chosen"):
        found.select()


def test_a_gate_that_nothing_passes_is_said(subject: Subject) -> None:
    """An effect of 50 nats is there for no expert: the screen says so, and select refuses."""
    from steersman.experts.causal_effects import Gate

    found = screen_experts(
        subject.model,
        subject.tokenizer,
        TASK,
        gate=Gate(0.05, 50.0),
        method="estimate",
        **{k: v for k, v in QUICK.items() if k != "exact_runs"},
    )
    assert not found.found
    assert "no effect of 128 experts passes the gate" in found.reason
    assert "Verdict: not shown; 20 items in 20 groups show an effect from 50.00 nats on" in found.reason
    assert found.sets["toward"].picks == ()
    with pytest.raises(PlanError, match="found nothing to steer: no effect"):
        found.select()
    assert screen_for_json(found)["found"] is False


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "guess"}, "method='guess' is unknown: use exact, estimate, auto"),
        ({"signs": "none"}, "signs='none' is unknown"),
        ({"by": "logit"}, "by='logit' is unknown: use d, answer"),
        ({"choose": "all"}, "choose='all' is unknown: use greedy, rounds"),
        ({"at_most": -1}, "at_most is -1: give a whole number, 0 or more"),
        ({"limit": 5}, "limit is 5: give a whole number, 20 or more"),
        ({"seed": -1}, "seed is -1: give a whole number, 0 or more"),
        ({"exact_runs": 1.5}, "exact_runs is 1.5 (float): give a whole number, 1 or more"),
        ({"least_t": math.nan}, "least_t=nan: right is a number from 0"),
        ({"gate": Gate(effect=math.inf)}, "effect inf: right is"),
        ({"gate": Gate(q=math.nan)}, "the gate is q nan"),
        ({"subsets": 1, "limit": 40}, "subsets=1: too few to tell 128 experts apart; use 13 or more"),
    ],
)
def test_options_out_of_range(subject: Subject, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=re.escape(reason)):
        screen_experts(
            subject.model, subject.tokenizer, TASK, method=options.pop("method", "estimate"), **options
        )


def test_items_without_a_d(subject: Subject, tmp_path: Path) -> None:
    run = lambda items: screen_experts(subject.model, subject.tokenizer, items, **QUICK)  # noqa: E731
    with pytest.raises(PairsError, match="has no negative answer"):
        run("lab:ordinary/train")
    with pytest.raises(PairsError, match="do not share the prompt"):
        run(load_pairs("lab:faithfulness/train"))
    with pytest.raises(PairsError, match="no such task"):
        run("lab:nothing/train")
    with pytest.raises(PairsError, match="is a folder"):
        run(tmp_path)
    patterns = tmp_path / "patterns.jsonl"
    patterns.write_text('{"scorer": "regex"}\n{"prompt": "?", "positive": "^i ", "negative": "^the "}\n')
    with pytest.raises(PairsError, match="are no answers"):
        run(str(patterns))
    with pytest.raises(PairsError, match="are no answers"):
        screen_experts(subject.model, subject.tokenizer, TASK, keep=[str(patterns)], **QUICK)


def test_tasks_that_show_no_harm_and_have_nothing_to_keep(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the river is long .\n")
    text = f"text:{tmp_path / 'text.txt'}"
    with pytest.raises(PairsError, match="answers to it are not judged"):
        screen_experts(subject.model, subject.tokenizer, TASK, harm=[text], **QUICK)
    with pytest.raises(PairsError, match="nothing of them to keep"):
        screen_experts(subject.model, subject.tokenizer, TASK, keep=[text], **QUICK)


def test_a_prompt_beyond_the_context(subject: Subject) -> None:
    items = list(load_task(TASK, limit=60))
    long = replace(items[0], content="the river is long . " * 100)
    task = Task("long", [long, *items[1:]], BEHAVIOURS["faithfulness"])
    options = {**QUICK, "limit": 60, "signs": "activate"}
    with pytest.raises(PairsError, match=r"long: a prompt of .* tokens, but the model's context holds 256"):
        screen_experts(subject.model, subject.tokenizer, task, **options)


def test_too_few_groups(subject: Subject) -> None:
    items = load_task(TASK, limit=1000)
    names = sorted({*items.groups})[:39]
    one = [item for item in items if item.group == items[0].group]
    for part, count in ((one, 1), ([i for i in items if i.group in names], 39)):
        with pytest.raises(PairsError, match=f"each half of its {count} groups?: too few .* at least 40"):
            screen_experts(
                subject.model, subject.tokenizer, Task("few", part, BEHAVIOURS["faithfulness"]), **QUICK
            )


def test_pairs_that_share_the_prompt_are_items() -> None:
    pairs = load_pairs("lab:refusal/train")
    task = open_items(pairs)
    assert (len(task), task[0].positive) == (len(pairs), "i cannot help with that .")
    assert task[0].content == pairs[0].positive[:-1]
    assert task.groups == [pair.group for pair in pairs]


def test_files_of_items_and_of_pairs(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "positive": "a", "negative": "b"}\n')
    assert open_items(str(rows))[0].negative == "b"
    pairs = tmp_path / "pairs.jsonl"
    chat = [{"role": "user", "content": "p"}]
    sides = {s: [*chat, {"role": "assistant", "content": s}] for s in ("positive", "negative")}
    pairs.write_text(json.dumps(sides) + "\n")
    assert open_items(pairs)[0].positive == "positive"
    pairs.write_text(json.dumps({"prompt": chat, "chosen": "yes", "rejected": "no"}) + "\n")
    assert open_items(pairs)[0].positive == "yes"
    pairs.write_text(json.dumps({"prompt": "may i ? ", "chosen": "yes", "rejected": "no"}) + "\n")
    with pytest.raises(PairsError, match='write "prompt" as messages, or name a task'):
        open_items(pairs)
    pairs.write_text(json.dumps([sides], indent=1))
    assert open_items(pairs)[0].positive == "positive"


@pytest.mark.parametrize("by", ["d", "answer"])
def test_items_whose_answers_are_the_same_tokens_are_left_out(subject: Subject, by: str) -> None:
    items = list(load_task(TASK, limit=90))
    same = [replace(item, positive="the  river", negative="the river") for item in items[:7]]
    options = {**QUICK, "by": by, "signs": "activate"}
    task = Task("spaced", [*same, *items[7:30]], BEHAVIOURS["faithfulness"])
    with (
        pytest.warns(UserWarning, match=r"spaced: 7 items left out: both answers .* and 2 more\)"),
        pytest.raises(PairsError, match="too few"),
    ):
        screen_experts(subject.model, subject.tokenizer, task, **options)
    with pytest.raises(PairsError, match=r"spaced: no item is a contrast: both answers are the same tokens"):
        screen_experts(
            subject.model, subject.tokenizer, Task("spaced", same, BEHAVIOURS["faithfulness"]), **options
        )


def test_a_model_without_numbers() -> None:
    model, tokenizer = lab.load("moe")
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    for method in ("estimate", "exact"):
        with pytest.raises(ModelError, match=r"no finite log probability for an item \(nan"):
            screen_experts(model, tokenizer, TASK, method=method, **{**QUICK, "exact_runs": 1})


def test_a_model_without_routers(subject: Subject) -> None:
    with pytest.raises(ModelError, match="no router that can be steered"):
        screen_experts(dense("llama"), subject.tokenizer, TASK)


def test_a_contrast_of_other_weights(subject: Subject, contrast: RoutingContrast) -> None:
    from dataclasses import replace

    with pytest.raises(WeightsMismatch, match="other weights"):
        screen_experts(
            subject.model, subject.tokenizer, TASK, contrast=replace(contrast, weights_id="0" * 64)
        )
