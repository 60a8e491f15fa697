"""A sample says what all rows would: which source layer explains a target layer, and how well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from concepts.states_of_texts import Example, example, moments_of
from steersman import ArtifactError
from steersman.concepts.joint_moments import Sides
from steersman.concepts.layer_choice import Sample, UnitRows, chosen_pairs
from steersman.concepts.solving import judge
from steersman.concepts.state_file import StateFile


def three_layers(dtype: torch.dtype = torch.float32) -> Example:
    """Source layers that know the targets ever better; the second target knows little of them."""
    of = example(rows=600, sources=1, source_width=8, targets=2, target_width=48, noise=0.4)
    noise = torch.randn(600, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    more = of.x + noise * of.x.std(0) * torch.tensor([1.0, 0.5, 0.2])[:, None]
    return Example(more.to(dtype), of.y.to(dtype), of.texts, of.held_out)


def sample_of(of: Example, folder: Path | None = None) -> Sample:
    sample = Sample(of.sides, folder)
    for unit in range(4):
        rows = of.texts // 40 == unit
        scope = torch.ones(int(rows.sum()), dtype=torch.bool)
        of_unit = UnitRows(of.x[rows], of.y[rows], of.texts[rows], of.held_out[rows], scope)
        parts = of_unit.texts < 40 * unit + 13  # text by text, or many at once
        two = [UnitRows(*(tensor[part] for tensor in vars(of_unit).values())) for part in (parts, ~parts)]
        sample.add(unit, two)
    return sample


def test_a_sample_says_which_layers_and_how_well() -> None:
    of = three_layers()
    table, exact = sample_of(of).table(0), judge(moments_of(of)).table
    assert chosen_pairs(table) == chosen_pairs(exact) == ((2, 0), (2, 1))
    assert table.rows == 600
    assert float((table.r2 - exact.r2).abs().max()) < 0.05
    assert float((table.r2_control - exact.r2_control).abs().max()) < 0.05
    assert torch.allclose(table.source_rank, exact.source_rank, rtol=1e-5)
    again = sample_of(of).table(0)
    assert torch.equal(again.r2, table.r2)


def test_of_layers_that_explain_as_much_the_lowest_is_taken() -> None:
    of = three_layers()
    alike = torch.cat([of.x[:, 2:] * (1 + 1e-7 * n) for n in (1, 0, 2)], dim=1)
    table = sample_of(Example(alike, of.y, of.texts, of.held_out)).table(0)
    assert chosen_pairs(table) == ((0, 0), (0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_come_back_to_the_bit(dtype: torch.dtype) -> None:
    of = three_layers(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    of = Example(of.x.to(wide), of.y.to(wide), of.texts, of.held_out)
    sample, some = sample_of(of), of.sides.of([(2, 1), (0, 1)])
    for unit in range(4):
        rows = of.texts // 40 == unit
        found = sample.unit(unit, some)
        assert torch.equal(found.x, of.x[rows][:, [0, 2]])
        assert torch.equal(found.y, of.y[rows][:, [1]])
        assert torch.equal(found.held_out, of.held_out[rows])


def test_a_sample_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    of = three_layers()
    sample = sample_of(of, tmp_path / "p")
    tensors, facts = sample.to_tensors()
    (tmp_path / "p/manifest.json").write_text("{}")  # progress was saved
    sample.add(9, [sample.unit(0, of.sides)])  # and the run stopped after it
    sample.close()
    again = Sample(of.sides, tmp_path / "p")
    again.restore(tensors, facts)
    assert again.units == (0, 1, 2, 3)
    assert torch.equal(again.table(0).r2, sample_of(of).table(0).r2)
    again.close()
    content = bytearray((tmp_path / "p/states.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "p/states.bin").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"states\.bin: damaged \(it is not as it was saved\)"):
        Sample(of.sides, tmp_path / "p").restore(tensors, facts)


def test_a_file_that_nothing_was_saved_beside_is_gone(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "p")
    file.append(b"states")
    assert file.read(2, 3) == b"ate"
    with pytest.raises(ValueError, match="were not written"):
        file.read(4, 9)
    file.close()
    assert not (tmp_path / "p").exists()


def test_pairs_alone_have_the_moments_that_all_of_them_would() -> None:
    of = three_layers(torch.float64)
    every = moments_of(of)
    some = Example(of.x[:, [0, 2]], of.y[:, [1]], of.texts, of.held_out)
    assert Sides((0, 2), 8, (1,), 48) == of.sides.of([(0, 1), (2, 1)])
    alone = moments_of(some)
    for one, other in zip(every.parts, alone.parts, strict=True):
        numbers = [every.sides.number_of[pair] for pair in ((0, 1), (2, 1))]
        close = {"rtol": 1e-4, "atol": 1e-2} if len(one.yy) else {"rtol": 1e-12, "atol": 1e-9}
        assert torch.allclose(one.xy[numbers], other.xy, **close)
        assert torch.allclose(one.xx[[0, 2]], other.xx, **close)
