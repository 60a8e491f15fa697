"""The closed form against plain float64 solves, and held-out quality against predictions row by row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concepts.states_of_texts import Example, example, moments_of
from steersman.concepts import joint_moments
from steersman.concepts.joint_moments import FIT, JointMoments
from steersman.concepts.regression import (
    RIDGES,
    Fitting,
    effective_rank,
    held_out_moments,
    spreads,
)
from steersman.concepts.solving import solve


def fitting_of(moments: JointMoments, source: int) -> Fitting:
    return Fitting(moments, source, spreads(moments))


def plain_solve(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The minimum of Σ|W x + b − y|² + ridge · rows · tr(Cov x)/d · |W|² for standardised x and y, b free, by
    least squares over rows and d more for the penalty; W, b for x and y as they are.
    """
    rows, d = x.shape
    mx, my, sx, sy = x.mean(0), y.mean(0), x.std(0, correction=0), y.std(0, correction=0)
    a, t = (x - mx) / sx, (y - my) / sy
    penalty = ridge * rows * float(torch.trace(a.T @ a) / rows) / d
    design = torch.cat(
        [torch.cat([a, torch.ones(rows, 1).double()], 1), penalty**0.5 * torch.eye(d, d + 1).double()]
    )
    wanted = torch.cat([t, torch.zeros(d, y.shape[1]).double()])
    solution = torch.linalg.lstsq(design, wanted, driver="gelsd").solution
    weight = sy[:, None] * solution[:d].T / sx
    return weight, my + sy * solution[d] - weight @ mx


@settings(max_examples=30)
@given(
    st.integers(1, 6),
    st.integers(2, 70),
    st.integers(0, 20),
    st.sampled_from([1e-8, 1e-4, 1e-2, 0.3, 1.0]),
)
def test_closed_form_is_a_plain_solve_in_any_chunks(units: int, chunk: int, seed: int, ridge: float) -> None:
    of = example(seed=seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(joint_moments, "CHUNK_ROWS", chunk)
        moments = moments_of(of, units)
    for source in range(2):
        fitting = fitting_of(moments, source)
        for target in range(2):
            weight, bias = fitting.affine(target, ridge)
            expected = plain_solve(*of.part(False, source, target), ridge)
            assert float((weight - expected[0]).abs().max()) <= 1e-8
            assert float((bias - expected[1]).abs().max()) <= 1e-8


def test_merged_parts_give_the_plain_solve_too() -> None:
    of = example(rows=240, seed=3)
    merged = moments_of(of, 6, only=slice(0, 2))
    merged.merge(moments_of(of, 6, only=slice(4, 6)))
    merged.merge(moments_of(of, 6, only=slice(2, 4)))
    weight, bias = fitting_of(merged, 1).affine(0, 1e-3)
    expected = plain_solve(*of.part(False, 1, 0), 1e-3)
    assert float((weight - expected[0]).abs().max()) <= 1e-8
    assert float((bias - expected[1]).abs().max()) <= 1e-8


def r2_by_rows(of: Example, source: int, target: int, ridge: float) -> float:
    x, y = of.part(False, source, target)
    weight, bias = plain_solve(x, y, ridge)
    held_x, held_y = of.part(True, source, target)
    spread = y.std(0, correction=0)
    residual = ((held_y - held_x @ weight.T - bias) / spread) ** 2
    return float(1 - residual.sum() / (((held_y - y.mean(0)) / spread) ** 2).sum())


@pytest.mark.parametrize("seed", range(4))
def test_quality_and_ridge_are_those_of_predictions(seed: int) -> None:
    of = example(rows=60 + 40 * seed, seed=seed, noise=2.0, source_width=9)
    moments = moments_of(of)
    for source, target in ((0, 0), (1, 1)):
        found = fitting_of(moments, source).pair(target)
        by_ridge = [r2_by_rows(of, source, target, ridge) for ridge in RIDGES]
        assert found.r2 == pytest.approx(max(by_ridge), abs=1e-5)  # judged in float32
        place = RIDGES.index(found.ridge)  # the largest of those that do as well
        assert by_ridge[place] >= max(by_ridge) - 2e-5
        assert all(r2 < max(by_ridge) for r2 in by_ridge[place + 1 :])


def test_rounding_does_not_choose_the_ridge() -> None:
    """Of ridges that do equally well the largest is taken, where the last digits would prefer another."""
    fitting = fitting_of(moments_of(example(rows=2000, noise=0.3)), 0)
    for ridge in (1e-4, 1e-2, 1.0):
        alike = tuple(ridge * (1 + 1e-9 * n) for n in range(3))
        assert fitting.pair(0, alike).ridge == alike[-1]
    assert fitting.pair(0, (1e-4, 10.0)).ridge == 1e-4


def test_of_source_layers_that_do_equally_well_the_lowest_is_taken() -> None:
    of = example(rows=400, sources=1, noise=0.3)
    for seed in range(6):
        noise = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        alike = torch.cat([of.x * (1 + 1e-7 * more) for more in noise], dim=1)
        maps, _ = solve(moments_of(replace(of, x=alike)))
        assert {found.source_layer for found in maps.values()} == {0}


def test_a_control_explains_nothing_and_a_map_something() -> None:
    of = example(rows=2000, noise=0.3, target_width=16)
    found = fitting_of(moments_of(of), 0).pair(0)
    assert found.r2 > 0.8
    assert -0.05 < found.r2_control < 0.02
    assert 0 < found.control_sd < 0.05


def test_a_control_is_what_permuted_rows_would_give() -> None:
    """Few rows for many dimensions: a map of permuted rows overfits, and the sketch must say so."""
    of = example(rows=150, source_width=20, target_width=32, targets=1, sources=1)
    moments = moments_of(of, 1)
    ridge = 1e-8
    found = fitting_of(moments, 0).pair(0, (ridge,))
    generator = torch.Generator().manual_seed(5)
    exact = []
    for _ in range(40):
        y = of.y.clone()
        for part in (False, True):
            places = torch.nonzero(of.held_out == part)[:, 0]
            y[places] = of.y[places[torch.randperm(len(places), generator=generator)]]
        exact.append(r2_by_rows(Example(of.x, y, of.texts, of.held_out), 0, 0, ridge))
    assert np.mean(exact) < -0.15
    assert found.r2_control == pytest.approx(float(np.mean(exact)), abs=0.06)


def test_more_dimensions_than_rows_and_constant_ones() -> None:
    of = example(rows=20, source_width=30, of_text=2)
    of.x[:, 0, 3] = 4.0
    of.y[:, 1, 2] = -1.5
    moments = moments_of(of, 1)
    fitting = fitting_of(moments, 0)
    weight, bias = fitting.affine(1, 1e-3)
    assert torch.isfinite(weight).all()
    assert (weight[:, 3] == 0).all()
    assert (weight[2] == 0).all()
    assert float(bias[2]) == pytest.approx(-1.5)
    assert np.isfinite(fitting.pair(1).r2)
    assert fitting.basis.effective_rank < moments.parts[FIT].rows
    assert fitting.basis.condition > 1e12


@pytest.mark.parametrize("seed", range(3))
def test_where_states_do_not_vary_rounding_makes_no_map(seed: int) -> None:
    """The same sixteen states read again and again, held-out ones among them, in 48 dimensions."""
    few = example(rows=16, source_width=48, target_width=40, seed=seed, of_text=1, noise=0.0)
    again = torch.arange(320) % 16
    held_out = torch.arange(320) >= 240
    of = Example(few.x[again].float(), few.y[again].float(), torch.arange(320), held_out)
    found = fitting_of(moments_of(of), 0)
    pair = found.pair(0)
    assert 0.99 < pair.r2 <= 1 + 1e-6
    exact = fitting_of(moments_of(Example(of.x.double(), of.y.double(), of.texts, held_out)), 0)
    assert exact.pair(0).r2 <= 1 + 1e-6
    weight, expected = (each.affine(0, pair.ridge)[0] for each in (found, exact))
    assert float((weight - expected).norm() / expected.norm()) < 0.05


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    of = example(rows=400, noise=0.0, target_width=4)
    fitting = fitting_of(moments_of(of), 0)
    weight, _ = fitting.affine(0, 1e-8)
    x, y = of.part(False, 0, 0)
    standard = weight * x.std(0, correction=0) / y.std(0, correction=0)[:, None]
    singular = torch.linalg.svdvals(standard)
    assert fitting.effective_rank(0, 1e-8) == pytest.approx(effective_rank(singular), rel=1e-6)


def test_share_explained_is_a_squared_correlation() -> None:
    of = example(rows=300, noise=1.0)
    moments = moments_of(of)
    weight, _ = fitting_of(moments, 1).affine(0, 1e-3)
    vector = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0])
    held = held_out_moments(moments, 1, 0)
    x, y = of.part(True, 1, 0)
    along = weight @ vector.double()
    along /= along.norm()
    expected = np.corrcoef((y @ along).numpy(), (x @ weight.T @ along).numpy())[0, 1] ** 2
    assert held.share(weight, vector) == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < 1
    assert held.share(weight, torch.zeros(5)) == 0
