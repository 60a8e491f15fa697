"""What follows from counts: derived numbers, tables, merging shards into the very result of one run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import contrasts
from contrasts import PAIR_UNIT, assert_same, made
from steersman import PlanError, Router, RoutingContrast, merge_contrasts

COLUMNS = [
    "layer",
    "expert",
    "activations_positive",
    "activations_negative",
    "rate_positive",
    "rate_negative",
    "risk_difference",
    "standard_error",
    "low",
    "high",
    "p",
    "q",
]

# Numbers ----------------------------------------------------------------------------------------------------


def test_shapes_and_layers() -> None:
    contrast = made()
    assert contrast.layers == [1, 2, 4]
    assert contrast.top_k == [2, 2, 3]
    assert contrast.clusters == contrast.pairs == 24
    assert contrast.rates.shape == (2, 3, 8)
    for array in (contrast.risk_difference, contrast.standard_error, contrast.p_values, *contrast.interval()):
        assert array.shape == (3, 8)
        assert array.dtype == np.float64


@pytest.mark.parametrize("pairs", [3, 24])
def test_a_layer_with_fewer_experts_has_minus_one_and_nan(pairs: int) -> None:
    contrast = made(pairs)
    lacking = np.zeros((3, 8), bool)
    lacking[2, 6:] = True
    assert (contrast.activations[:, lacking] == -1).all()
    assert (contrast.activations[:, ~lacking] >= 0).all()
    everything = [*contrast.rates, contrast.risk_difference, contrast.standard_error, *contrast.interval()]
    for array in [*everything, contrast.p_values, contrast.q_values]:
        assert np.isnan(array[lacking]).all()
    for array in [*contrast.rates, contrast.risk_difference]:
        assert np.isfinite(array[~lacking]).all()
    for array in (contrast.standard_error, contrast.p_values, contrast.q_values, *contrast.interval()):
        assert np.isfinite(array[~lacking]).all() == (pairs >= 20)
        assert np.isnan(array[~lacking]).all() == (pairs < 20)


def test_rates_are_activations_over_tokens() -> None:
    contrast = made()
    for side in (0, 1):
        for row, router in enumerate(contrast.routers):
            for expert in range(router.experts):
                expected = int(contrast.activations[side, row, expert]) / int(contrast.tokens[side])
                assert contrast.rates[side, row, expert] == expected
            assert contrast.rates[side, row, : router.experts].sum() == pytest.approx(router.top_k)


def test_rates_by_pair_are_means_over_pairs() -> None:
    """Each pair counts the same: 1 of 10 tokens and 9 of 10 of a longer answer are not 10 of 20."""
    contrast, by_pair = made(weighting="token"), made(weighting="pair")
    np.testing.assert_array_equal(contrast.activations, by_pair.activations)
    np.testing.assert_array_equal(contrast.tokens, by_pair.tokens)
    assert by_pair.sums.n1 == by_pair.sums.n2 == 24 * PAIR_UNIT
    assert not np.allclose(contrast.rates[:, :2], by_pair.rates[:, :2])
    for row, router in enumerate(by_pair.routers):
        sums = by_pair.rates[:, row, : router.experts].sum(axis=1)
        np.testing.assert_allclose(sums, router.top_k, atol=1e-11)


def test_intervals_and_levels() -> None:
    contrast = made()
    low, high = contrast.interval()
    delta, error = contrast.risk_difference, contrast.standard_error
    np.testing.assert_allclose(high - delta, stats.t.ppf(0.975, 23) * error, rtol=1e-9)
    np.testing.assert_allclose(delta - low, high - delta, rtol=1e-9, atol=1e-15)
    wide = contrast.interval(0.99)
    valid = contrast.valid
    assert (wide[0][valid] < low[valid]).all()
    assert (wide[1][valid] > high[valid]).all()


def test_q_values_leave_out_the_experts_that_are_not_there() -> None:
    contrast = made()
    p = contrast.p_values[contrast.valid]
    np.testing.assert_array_equal(
        contrast.q_values[contrast.valid], stats.false_discovery_control(p, method="bh")
    )
    assert len(p) == 8 + 8 + 6


# Tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [4, 24])
def test_table_has_every_expert_once_in_order_of_effect(pairs: int) -> None:
    contrast = made(pairs)
    table = contrast.table()
    assert list(table.columns) == COLUMNS
    assert list(table.index) == list(range(22))
    places = list(zip(table["layer"], table["expert"], strict=True))
    assert sorted(places) == [(r.layer, e) for r in contrast.routers for e in range(r.experts)]
    keys = [(-abs(delta), *place) for delta, place in zip(table["risk_difference"], places, strict=True)]
    assert keys == sorted(keys)
    low, high = contrast.interval()
    for row in table.itertuples():
        at = (contrast.layers.index(row.layer), row.expert)
        assert row.activations_positive == contrast.activations[(0, *at)]
        assert row.activations_negative == contrast.activations[(1, *at)]
        expected = [
            contrast.rates[(0, *at)],
            contrast.rates[(1, *at)],
            contrast.risk_difference[at],
            contrast.standard_error[at],
            low[at],
            high[at],
            contrast.p_values[at],
            contrast.q_values[at],
        ]
        np.testing.assert_array_equal(list(row)[5:], expected)


def test_table_and_ranking_agree_on_ties() -> None:
    contrast = made(4)
    counts = np.full((2, 3, 8), 7, np.int64)
    counts[0, :, ::2] += 3
    sums = replace(contrast.sums, a1=counts[0], a2=counts[1], n1=50, n2=50)
    counts[:, 2, 6:] = -1
    tied = replace(contrast, activations=counts, sums=sums)
    table = tied.table()
    places = list(zip(table["layer"], table["expert"], strict=True))
    assert places[:11] == [(layer, expert) for layer, expert, _ in tied.ranking()]
    assert places[:11] == [(layer, e) for layer, n in ((1, 8), (2, 8), (4, 6)) for e in range(0, n, 2)]


@pytest.mark.parametrize("pairs", [4, 24])
def test_table_survives_csv_and_parquet(tmp_path: Path, pairs: int) -> None:
    table = made(pairs).table()
    table.to_csv(tmp_path / "table.csv", index=False)
    table.to_parquet(tmp_path / "table.parquet", index=False)
    written = pd.read_csv(tmp_path / "table.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(written, table, check_exact=True)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table, check_exact=True)


# Merging ----------------------------------------------------------------------------------------------------


def shards(cuts: list[int], total: int, **options: object) -> list[RoutingContrast]:
    pieces = itertools.pairwise([0, *sorted(cuts), total])
    return [made(end - start, first=start, **options) for start, end in pieces if end > start]


@pytest.mark.parametrize("scale", [1, 10**9])
@pytest.mark.parametrize("weighting", ["token", "pair"])
def test_shards_are_one_run_also_after_saving(tmp_path: Path, weighting: str, scale: int) -> None:
    whole = made(24, weighting=weighting, scale=scale)
    parts = shards([5, 6, 15], 24, weighting=weighting, scale=scale)
    merged = merge_contrasts(parts)
    expected = replace(whole, skipped=len(parts))
    assert_same(merged, expected, made_from=False)
    for number, part in enumerate(parts):
        part.save_pretrained(tmp_path / str(number))
    again = merge_contrasts(RoutingContrast.from_pretrained(tmp_path / str(n)) for n in range(len(parts)))
    assert_same(again, merged)
    again.save_pretrained(tmp_path / "merged")
    assert_same(RoutingContrast.from_pretrained(tmp_path / "merged"), merged)
    pd.testing.assert_frame_equal(again.table(), whole.table(), check_exact=True)


@given(st.lists(st.integers(1, 21), max_size=4), st.randoms(use_true_random=False), st.booleans())
def test_any_shards_in_any_order(cuts: list[int], dice: object, nested: bool) -> None:
    parts = shards(cuts, 22)
    dice.shuffle(parts)  # type: ignore[attr-defined]
    if nested and len(parts) > 2:
        parts = [parts[0], merge_contrasts(parts[1:])]
    merged = merge_contrasts(parts)
    assert_same(merged, replace(made(22), skipped=merged.skipped), made_from=False)


def test_merging_says_what_it_was_made_from_and_adds_the_skipped() -> None:
    one, two = made(3), replace(made(4, first=3), skipped=5)
    merged = merge_contrasts([one, two])
    assert [source["name"] for source in merged.made_from] == ["0.jsonl", "3.jsonl"]
    assert merged.skipped == 6
    assert (one.pairs, two.pairs, merged.pairs) == (3, 4, 7)


def test_merging_leaves_the_shards_as_they_were() -> None:
    one, two = shards([5], 9)
    merge_contrasts([one, two])
    assert_same(one, made(5))
    assert_same(two, made(4, first=5))


def test_one_shard_is_itself() -> None:
    assert_same(merge_contrasts([made(3)]), made(3))


def refused(contrasts_: list[RoutingContrast], words: str) -> None:
    with pytest.raises(PlanError, match=words) as raised:
        merge_contrasts(contrasts_)
    assert "\n" not in str(raised.value)


def test_a_shard_given_twice_is_refused() -> None:
    one, two = shards([5], 9)
    refused([one, two, one], "5 clusters .* in two shards: a shard was given twice")


def test_a_group_in_two_shards_is_refused() -> None:
    one = made(5)
    other = made(5, first=5)
    ids = np.sort(np.append(other.cluster_ids[:-1], one.cluster_ids[2]))
    refused([one, replace(other, cluster_ids=ids)], "1 cluster .* or it splits a group")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (made(3, first=9, weights_id="1" * 64), r"differ in their weights id \([0-9a-f]+… and 1+…\)"),
        (made(3, first=9, weighting="pair"), r"differ in their weighting \(token and pair\)"),
        (made(3, first=9, layers=(None, *contrasts.ROUTERS)), "differ in their architecture"),
        (made(3, first=9, layers=(Router(0, 8, 2, "rule"),)), "differ in their architecture"),
    ],
)
def test_shards_of_something_else_are_refused(other: RoutingContrast, words: str) -> None:
    refused([made(3), other], words)


def test_nothing_to_merge() -> None:
    refused([], "nothing to merge")


# Identity ---------------------------------------------------------------------------------------------------


def test_sha256_tells_counts_apart() -> None:
    base = made(4)
    assert base.sha256 == made(4).sha256
    counts = base.activations.copy()
    counts[0, 0, 0] += 1
    others = [
        made(4, seed=1),
        made(5),
        made(4, first=1),
        made(4, weighting="pair"),
        made(4, weights_id="1" * 64),
        replace(base, activations=counts),
    ]
    assert len({base.sha256, *(other.sha256 for other in others)}) == 7
