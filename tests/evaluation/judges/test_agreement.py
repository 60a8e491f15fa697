"""Cohen's kappa against statsmodels and a plain count, its interval, and labels that are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import cohens_kappa

from steersman.errors import PairsError
from steersman.evaluation.judges import OUTCOMES, Outcome
from steersman.evaluation.judges.agreement import agreement

SIDE = st.sampled_from(OUTCOMES)


def plain_kappa(pairs: list[tuple[Outcome, Outcome]]) -> float | None:
    observed = sum(a == b for a, b in pairs) / len(pairs)
    by_chance = (
        sum(sum(a == side for a, _ in pairs) * sum(b == side for _, b in pairs) for side in OUTCOMES)
        / len(pairs) ** 2
    )
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=30))
def test_kappa_is_that_of_its_definition(pairs: list[tuple[Outcome, Outcome]]) -> None:
    found = agreement([verdict for _, verdict in pairs], [label for label, _ in pairs])
    wanted = plain_kappa(pairs)
    assert found.kappa == (None if wanted is None else pytest.approx(wanted, abs=1e-12))
    assert np.array(found.table).sum() == found.count == len(pairs)
    assert found.share == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_the_interval_without_groups_is_that_of_statsmodels() -> None:
    labels: list[Outcome] = ["positive"] * 30 + ["negative"] * 20 + ["neither"] * 10
    judged: list[Outcome] = ["positive"] * 25 + ["negative"] * 22 + ["neither"] * 13
    found = agreement(judged, labels)
    wanted = cohens_kappa(np.array(found.table))
    assert (found.kappa, found.low, found.high) == pytest.approx(
        (wanted.kappa, wanted.kappa_low, wanted.kappa_upp)
    )
    assert found.method == "asymptotic"


def test_groups_of_like_items_widen_the_interval_as_they_should() -> None:
    rng = np.random.default_rng(0)
    labels: list[Outcome] = [OUTCOMES[place] for place in rng.integers(0, 2, 40)]
    judged: list[Outcome] = [
        side if right else "neither" for side, right in zip(labels, rng.random(40) < 0.7, strict=True)
    ]
    alone = agreement(judged, labels)
    fivefold = agreement(judged * 5, labels * 5, list(range(40)) * 5)
    assert fivefold.method == "bootstrap over groups"
    assert fivefold.kappa == pytest.approx(alone.kappa)
    widths = [
        float(one.high or 0) - float(one.low or 0)
        for one in (alone, fivefold, agreement(judged * 5, labels * 5))
    ]
    assert widths[1] == pytest.approx(widths[0], rel=0.15)
    assert widths[2] < 0.6 * widths[0]


def test_what_does_not_exist_is_none() -> None:
    same = agreement(["positive"] * 4, ["positive"] * 4)
    assert (same.kappa, same.low, same.high, same.share) == (None, None, None, 1.0)
    one_group = agreement(["positive", "negative"], ["positive", "negative"], ["g", "g"])
    assert (one_group.kappa, one_group.low, one_group.high) == (1.0, None, None)
    partly = agreement(["positive", None, "negative"], ["positive", "negative", "negative"])
    assert (partly.count, partly.unjudged, partly.kappa) == (2, 1, 1.0)
    with pytest.raises(PairsError, match="0 items have both"):
        agreement([None], ["positive"])
