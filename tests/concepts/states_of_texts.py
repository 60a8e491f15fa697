"""Random states of texts for two models, one an affine image of the other with noise, and moments of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.concepts.joint_moments import JointMoments, Sides


@dataclass(frozen=True)
class Example:
    """States x [rows, Ls, ds], y [rows, Lt, dt], whose text each row is of, which rows are held out."""

    x: Tensor
    y: Tensor
    texts: Tensor
    held_out: Tensor

    @property
    def sides(self) -> Sides:
        sources, targets = self.x.shape[1], self.y.shape[1]
        return Sides(tuple(range(sources)), self.x.shape[2], tuple(range(targets)), self.y.shape[2])

    def part(self, held_out: bool, source: int, target: int) -> tuple[Tensor, Tensor]:
        rows = self.held_out == held_out
        return self.x[rows, source].double(), self.y[rows, target].double()


def example(
    rows: int = 160,
    sources: int = 2,
    source_width: int = 5,
    targets: int = 2,
    target_width: int = 4,
    *,
    seed: int = 0,
    noise: float = 0.5,
    of_text: int = 4,
    dtype: torch.dtype = torch.float64,
) -> Example:
    """Correlated dimensions of unlike size and mean, as states have."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = torch.exp(draw(source_width))
    base = draw(rows, source_width) @ draw(source_width, source_width)
    x = torch.stack([(base + 0.3 * draw(rows, source_width)) * sizes + 3 for _ in range(sources)], dim=1)
    image = [base @ draw(source_width, target_width) for _ in range(targets)]
    y = torch.stack([part + noise * draw(rows, target_width) - 7 for part in image], dim=1)
    texts = torch.arange(rows) // of_text
    return Example(x.to(dtype), y.to(dtype), texts, texts % 5 == 0)


def moments_of(of: Example, units: int = 4, seed: int = 0, only: slice = slice(None)) -> JointMoments:
    """Moments of some of the units of texts; every part begins with the first unit."""
    moments = JointMoments(of.sides, seed)
    edges = torch.linspace(0, int(of.texts.max()) + 1, units + 1).long().tolist()
    for number in range(units):
        rows = (of.texts >= edges[number]) & (of.texts < edges[number + 1])
        if number == 0:
            moments.begin(of.x[rows], of.y[rows])
        if number in range(units)[only]:
            moments.add(of.x[rows], of.y[rows], of.texts[rows], of.held_out[rows], unit=number)
    moments.flush()
    return moments
