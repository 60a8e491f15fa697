"""Sweeps over size: each set against a plan of its own, random sets of its shape, and what is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from screened import sites_of
from steersman import PlanError, Steering
from steersman.certainty import CANNOT_TELL, SHOWN
from steersman.evaluation.arms import Subject
from steersman.evaluation.screening import sizes as module
from steersman.evaluation.screening.exact import Edit, Floats
from steersman.evaluation.screening.sizes import SizedSet, SizeSweep, sized_sets, sweep_sizes
from steersman.evaluation.tasks import load_task
from steersman.limits import Router

Plan = tuple[Edit, ...]
RANKING = [(0, 1, 2.0), (0, 3, -1.5), (2, 4, 1.0), (0, 2, -0.5), (1, 7, -0.4), (3, 6, 0.1)]
TASK = load_task("lab:faithfulness/train", limit=4)


@pytest.fixture(scope="module")
def sweep(subject: Subject) -> SizeSweep:
    rankings = {"toward": RANKING, "reversed": [(0, 3, 1.0)]}
    return sweep_sizes(subject.model, subject.tokenizer, TASK, rankings, sizes=[1, 2, 4], draws=2)


def test_each_set_moves_d_as_its_plan_alone_does(subject: Subject, sweep: SizeSweep) -> None:
    forks = subject.forks(TASK)
    base = subject.preference(forks)
    np.testing.assert_allclose(sweep.unsteered, base, atol=1e-5)
    found = {(one.direction, one.kind, one.size): n for n, one in enumerate(sweep.sets)}
    assert list(found) == [
        ("toward", "activated", 1),
        ("toward", "activated", 2),
        ("toward", "deactivated", 1),
        ("toward", "deactivated", 2),
        ("toward", "both", 1),
        ("toward", "both", 2),
        ("toward", "both", 4),
        ("reversed", "activated", 1),
    ]
    for key, activate, deactivate in (
        (("toward", "activated", 2), {0: [1], 2: [4]}, {}),
        (("toward", "deactivated", 2), {}, {0: [3, 2]}),
        (("toward", "both", 4), {0: [1], 2: [4]}, {0: [3, 2]}),
        (("reversed", "activated", 1), {0: [3]}, {}),
    ):
        plan = Steering.from_experts(subject.model, activate, deactivate)
        want = subject.preference(forks, plan) - base
        np.testing.assert_allclose(sweep.changes[found[key]], want, atol=1e-4)
        assert np.abs(want).max() > 1e-3


def test_random_sets_have_the_shape_of_theirs_and_grow(
    subject: Subject, sweep: SizeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Plan] = []

    def values(tool: object, reading: object, batches: object, plans: list[Plan], **_: object) -> Floats:
        tried[:] = plans
        return np.zeros((1 + len(plans), len(TASK)))

    monkeypatch.setattr(module, "values_of_sets", values)
    rankings = {"toward": RANKING, "reversed": [(0, 3, 1.0)]}
    sweep_sizes(subject.model, subject.tokenizer, TASK, rankings, sizes=[1, 2, 4], draws=3)
    sets, others = tried[: len(sweep.sets)], tried[len(sweep.sets) :]
    assert [one.edits for one in sweep.sets] == sets
    assert len(others) == 3 * len(sets)
    for number, other in enumerate(others):
        own = sets[number % len(sets)]
        assert Counter((layer, s) for layer, _, s in other) == Counter((layer, s) for layer, _, s in own)
    for draw in range(3):
        one, two, *_ = others[draw * len(sets) :]
        assert set(one) < set(two)  # so that a draw is a curve
    assert any(set(other) != set(sets[n % len(sets)]) for n, other in enumerate(others))


def test_what_is_beyond_all_random_sets_is_shown() -> None:
    edits = ((0, 1, 1.0),)
    sets = (SizedSet("toward", "activated", 1, edits), SizedSet("reversed", "activated", 1, edits))
    generator = np.random.default_rng(0)
    changes = generator.normal(1.0, 0.1, (2, 30))
    random = generator.normal(0.0, 0.1, (19, 2, 30))
    groups = tuple(map(str, range(30)))
    toward, back = SizeSweep(sets, changes, random, np.zeros(30), groups, "t").rows()
    assert (toward["verdict"], toward["p"], toward["as_far"]) == (SHOWN, 0.05, 0)
    assert toward["random_low"] < 0 < toward["random_high"] < toward["low"] < toward["change"] < 1.1
    # It went toward, and was to go back: as far as any random set from that.
    assert (back["verdict"], back["p"]) == (CANNOT_TELL, 1.0)
    few = SizeSweep(sets, changes, random[:18], np.zeros(30), groups, "t")
    assert few.rows()[0]["verdict"] == CANNOT_TELL
    assert few.table()["draws"].tolist() == [18, 18]


def test_what_breaks_a_limit_is_left_out_of_a_set() -> None:
    routers = {0: Router(0, 8, 2, "softmax-topk")}
    ranking = [(0, expert, 1.0) for expert in range(8)]
    (*_, largest) = sized_sets({"toward": ranking}, routers, [1, 8])
    assert (largest.size, len(largest.edits)) == (8, 2)


def test_what_cannot_be_swept_is_refused(subject: Subject) -> None:
    def swept(**changed: object) -> SizeSweep:
        given = {"rankings": {"toward": RANKING}, **changed}
        return sweep_sizes(subject.model, subject.tokenizer, TASK, **given)  # type: ignore[arg-type]

    with pytest.raises(PlanError, match="'up' is unknown: use toward, reversed"):
        swept(rankings={"up": RANKING})
    with pytest.raises(PlanError, match="'on' is unknown"):
        swept(kinds=["on"])
    with pytest.raises(PlanError, match="no ranking has experts"):
        swept(sizes=[100])
    with pytest.raises(PlanError, match="size"):
        swept(sizes=[0])


def test_usage_is_the_share_of_tokens(subject: Subject) -> None:
    from steersman.evaluation.screening.exact import instrument
    from steersman.evaluation.screening.texts import preferences

    with instrument(subject.model, subject.tokenizer, sites_of(subject.model), batch_size=2) as tool:
        used = module.usage(tool, tool.batches(preferences(TASK, subject.tokenizer)))
    for site in sites_of(subject.model):
        assert used[site.facts.layer].sum() == pytest.approx(site.facts.top_k)
        assert used[site.facts.layer].max() <= 1
