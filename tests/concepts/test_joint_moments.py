"""Streamed moments against sums over all rows at once: any chunks, any parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concepts.states_of_texts import Example, example, moments_of
from steersman.concepts import joint_moments
from steersman.concepts.joint_moments import COLUMNS, DRAWS, FIT, HELD_OUT, JointMoments
from steersman.concepts.solving import solve


def centred(moments: JointMoments, part: int) -> dict[str, Tensor]:
    """Centred sums of products of a part, and means."""
    of, n = moments.parts[part], moments.parts[part].rows
    x = of.x.reshape(-1, moments.sides.source_width)
    y = of.y.reshape(-1, moments.sides.target_width)
    z = of.z.reshape(len(y), -1)
    pairs = moments.sides.numbers
    return {
        "xy": of.xy - torch.stack([x[one].outer(y[other]) for one, other in pairs]) / n,
        "xx": of.xx - torch.einsum("li,lj->lij", x, x) / n,
        "y2": of.y2 - of.y**2 / n,
        "xz": of.xz - torch.stack([x[one].outer(z[other]) for one, other in pairs]) / n,
        "z2": of.z2 - of.z**2 / n,
        "x": of.x / n + moments.centres[0],
        "y": of.y / n + moments.centres[1],
    }


def slowly(of: Example, held_out: bool) -> dict[str, Tensor]:
    rows = of.held_out == held_out
    x, y = of.x[rows].double().flatten(1), of.y[rows].double().flatten(1)
    a, b = x - x.mean(0), y - y.mean(0)
    xs, ys = a.reshape(len(a), -1, of.x.shape[2]).unbind(1), b.reshape(len(b), -1, of.y.shape[2]).unbind(1)
    return {
        "xy": torch.stack([one.T @ other for one in xs for other in ys]),
        "xx": torch.stack([one.T @ one for one in xs]),
        "y2": (b**2).sum(0),
        "x": x.mean(0),
        "y": y.mean(0),
    }


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(2, 64), st.integers(0, 5))
def test_any_chunks_give_the_sums_over_all_rows(units: int, chunk: int, seed: int) -> None:
    of = example(seed=seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(joint_moments, "CHUNK_ROWS", chunk)
        moments = moments_of(of, units)
    for part in (FIT, HELD_OUT):
        found, expected = centred(moments, part), slowly(of, bool(part))
        assert moments.parts[part].rows == int((of.held_out == bool(part)).sum())
        for name, value in expected.items():
            close = {"rtol": 1e-4, "atol": 1e-3} if part == HELD_OUT else {"rtol": 1e-10, "atol": 1e-9}
            assert torch.allclose(found[name], value, **close), name


@pytest.mark.parametrize("first", [1, 2, 3])
def test_parts_merge_into_the_whole_control_included(first: int) -> None:
    of = example(rows=200)
    one, other = (moments_of(of, only=only) for only in (slice(0, first), slice(first, 4)))
    one.merge(other)
    whole = moments_of(of)
    for name, tensor in whole.to_tensors().items():
        exact = name.startswith("fit") and "z" not in name  # the others are made in float32
        close = {"rtol": 1e-12, "atol": 1e-9} if exact else {"rtol": 1e-4, "atol": 1e-2}
        assert torch.allclose(one.to_tensors()[name], tensor, **close), name


def test_parts_about_other_centres_merge_too() -> None:
    of = example(rows=200)
    half = of.texts < 25
    one, other = JointMoments(of.sides), JointMoments(of.sides)
    one.add(of.x[half], of.y[half], of.texts[half], of.held_out[half])
    other.add(of.x[~half], of.y[~half], of.texts[~half], of.held_out[~half])
    before = {name: tensor.clone() for name, tensor in other.to_tensors().items()}
    assert not torch.equal(one.centres[0], other.centres[0])
    one.merge(other)
    for part in (FIT, HELD_OUT):
        found, expected = centred(one, part), slowly(of, bool(part))
        for name, value in expected.items():
            close = {"rtol": 1e-4, "atol": 1e-3} if part == HELD_OUT else {"rtol": 1e-10, "atol": 1e-9}
            assert torch.allclose(found[name], value, **close), name
    assert all(torch.equal(other.to_tensors()[name], tensor) for name, tensor in before.items())


def test_a_control_pairs_rows_with_other_texts_of_the_same_part() -> None:
    of = example(rows=120, targets=1)
    seen: list[tuple[Tensor, Tensor]] = []
    original = joint_moments._partners

    def noted(places: Tensor, pool: Tensor, texts: Tensor, generator: torch.Generator) -> Tensor:
        seen.append((places, original(places, pool, texts, generator)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(joint_moments, "_partners", noted)
        moments_of(of, units=1)
    assert len(seen) == 2
    for places, by_draw in seen:
        assert len(by_draw) == DRAWS == len(by_draw.unique(dim=0))
        for partners in by_draw:
            assert torch.equal(of.held_out[places], of.held_out[partners])
            assert not bool((of.texts[places] == of.texts[partners]).any())
            assert torch.equal(partners.sort().values, places.sort().values)


def test_a_sketch_has_the_size_of_what_it_stands_for() -> None:
    of = example(rows=400, targets=1, target_width=64, source_width=3)
    moments = moments_of(of)
    squares = centred(moments, FIT)["z2"].reshape(DRAWS, COLUMNS).sum(1) / COLUMNS
    expected = (slowly(of, False)["y2"] / moments.scale**2).sum()
    assert float((squares.mean() / expected - 1).abs()) < 0.15


def test_to_tensors_and_back() -> None:
    of = example()
    moments = moments_of(of)
    again = JointMoments.from_tensors(moments.to_tensors(), of.sides, 0)
    assert all(torch.equal(again.to_tensors()[name], value) for name, value in moments.to_tensors().items())
    empty = JointMoments(of.sides)
    empty.merge(again)
    assert torch.equal(empty.parts[FIT].xy, moments.parts[FIT].xy)


def test_what_does_not_fit_is_refused() -> None:
    of = example()
    tensors = moments_of(of).to_tensors()
    with pytest.raises(ValueError, match="are missing"):
        JointMoments.from_tensors({name: t for name, t in tensors.items() if name != "fit.x"}, of.sides, 0)
    with pytest.raises(ValueError, match=r"fit\.x is torch\.float64 \[3\]"):
        JointMoments.from_tensors({**tensors, "fit.x": tensors["fit.x"][:3].clone()}, of.sides, 0)
    with pytest.raises(ValueError, match="do not add up"):
        moments_of(of).merge(moments_of(of, seed=1))
    with pytest.raises(ValueError, match="no rows"):
        _ = JointMoments(of.sides).centres


def test_float32_products_are_within_their_bound_and_change_no_map() -> None:
    """The bound of the module's docstring, against the same states in float64."""
    of = example(rows=6000, source_width=24, target_width=16, noise=0.3)
    rounded = Example(of.x.float(), of.y.float(), of.texts, of.held_out)
    of = Example(rounded.x.double(), rounded.y.double(), of.texts, of.held_out)  # the same numbers
    exact, found = moments_of(of, 7), moments_of(rounded, 7)
    x, y = ((side[~of.held_out] - side[~of.held_out].mean(0)).abs() for side in (of.x, of.y))
    n = len(x)
    for number, (source, target) in enumerate(of.sides.numbers):
        error = (found.parts[FIT].xy[number] - exact.parts[FIT].xy[number]).abs() / n
        magnitude = x[:, source].T @ y[:, target] / n
        assert bool((error <= (joint_moments.CHUNK_ROWS + 4) * 2.0**-24 * magnitude).all())
        spread = x[:, source].pow(2).mean(0).sqrt().outer(y[:, target].pow(2).mean(0).sqrt())
        assert float((error / spread).max()) < 1e-6  # what the worst case does not say
    magnitude = torch.stack([x[:, layer].T @ x[:, layer] for layer in (0, 1)])
    assert bool(((found.parts[FIT].xx - exact.parts[FIT].xx).abs() < 4 * 2.0**-24 * magnitude).all())
    mine, theirs = solve(found)[0], solve(exact)[0]
    for pair, of_layer in theirs.items():
        assert mine[pair].ridge == of_layer.ridge
        assert float((mine[pair].weight - of_layer.weight).norm() / of_layer.weight.norm()) < 1e-5
        assert mine[pair].r2 == pytest.approx(of_layer.r2, abs=1e-6)
