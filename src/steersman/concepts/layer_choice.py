"""Which source layer explains each target layer, before anything is fitted exactly: from a sample of rows,
with random projections of the target's states, all pairs of layers at once.

The target's standardised states are projected on Rademacher columns, z = P'y; a map to z has the R² of the
map to y, in expectation, as E|P'r|² = q|r|² for any residual r. Source states are not projected: that would
cost them what they explain. The sample's rows wait in a file, and enter the exact moments from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.concepts.affine_map import MapTable
from steersman.concepts.joint_moments import SKETCH, JointMoments, Sides
from steersman.concepts.regression import R2_TIE
from steersman.concepts.solving import Ticking, judge
from steersman.concepts.state_file import StateFile
from steersman.ties import largest

SAMPLE_ROWS = 4096
"""Rows that layers are chosen by: about so many, of texts spread over all."""
GROUP_BYTES = 1 << 30
"""What the sketches of the source layers that are judged at once may take."""


@dataclass(frozen=True)
class UnitRows:
    """Rows of some texts: states x [rows, Ls, ds] and y [rows, Lt, dt], whose text each is of, whether it is
    held out, and whether its norm counts.
    """

    x: Tensor
    y: Tensor
    texts: Tensor
    held_out: Tensor
    in_scope: Tensor

    @classmethod
    def joined(cls, parts: Sequence[UnitRows]) -> UnitRows:
        """The rows of several texts."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(of, each.name) for of in parts]) for each in fields(cls)))

    def of(self, whole: Sides, some: Sides) -> UnitRows:
        """The same rows with some of the layers."""
        if (whole.source_layers, whole.target_layers) == (some.source_layers, some.target_layers):
            return self
        x = self.x[:, [whole.source_layers.index(layer) for layer in some.source_layers]]
        y = self.y[:, [whole.target_layers.index(layer) for layer in some.target_layers]]
        return UnitRows(x, y, self.texts, self.held_out, self.in_scope)


@dataclass(frozen=True)
class _Part:
    """Where the rows of a text are, in which dtypes, and their facts, int64 [3, rows]."""

    unit: int
    x: int
    y: int
    of_x: torch.dtype
    of_y: torch.dtype
    facts: Tensor


class Sample:
    """Rows of some units, all layers, in a file.

    Args:
        sides: All layers of either model.
        folder: As for `StateFile`.
    """

    def __init__(self, sides: Sides, folder: str | Path | None = None) -> None:
        self.sides, self._folder = sides, folder
        self._parts: list[_Part] = []
        self._opened: StateFile | None = None

    def __len__(self) -> int:
        """How many texts are in it."""
        return len(self._parts)

    @property
    def _file(self) -> StateFile:
        if self._opened is None:
            self._opened = StateFile(self._folder)
        return self._opened

    @property
    def units(self) -> tuple[int, ...]:
        """Which units are in it, in order."""
        return tuple(dict.fromkeys(part.unit for part in self._parts))

    def add(self, unit: int, texts: Iterable[UnitRows]) -> None:
        """Keep the rows of a unit, text by text. Raises ModelError for a full disk."""
        for rows in texts:
            kept = [_narrowed(states.transpose(0, 1)).contiguous() for states in (rows.x, rows.y)]
            x, y = (self._file.append(states.view(torch.uint8).numpy().data) for states in kept)
            facts = torch.stack([rows.texts, rows.held_out.long(), rows.in_scope.long()])
            self._parts.append(_Part(unit, x, y, kept[0].dtype, kept[1].dtype, facts))

    def unit(self, number: int, sides: Sides) -> UnitRows:
        """The rows of a unit with some of the layers."""
        whole, found = self.sides, []
        for part in self._parts:
            if part.unit != number:
                continue
            layers = (
                (part.x, part.of_x, whole.source_width, whole.source_layers, sides.source_layers),
                (part.y, part.of_y, whole.target_width, whole.target_layers, sides.target_layers),
            )
            x, y = (self._read(part.facts.shape[1], *each) for each in layers)
            texts, held_out, in_scope = part.facts
            found.append(UnitRows(x, y, texts, held_out.bool(), in_scope.bool()))
        return UnitRows.joined(found)

    def _read(
        self,
        rows: int,
        start: int,
        dtype: torch.dtype,
        width: int,
        there: Sequence[int],
        wanted: Sequence[int],
    ) -> Tensor:
        size = rows * width * dtype.itemsize
        found = torch.empty(rows, len(wanted), width, dtype=_wide(dtype))
        for place, layer in enumerate(wanted if size else ()):
            content = self._file.read(start + there.index(layer) * size, size)
            found[:, place] = torch.frombuffer(content, dtype=dtype).reshape(rows, width)
        return found

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `restore` takes; the rows themselves stay in the file."""
        parts = [
            [part.unit, part.x, part.y, _NAMES[part.of_x], _NAMES[part.of_y], part.facts.shape[1]]
            for part in self._parts
        ]
        facts = torch.cat(
            [torch.zeros(3, 0, dtype=torch.int64), *(part.facts for part in self._parts)], dim=1
        )
        return {"facts": facts}, {"file": self._file.facts() if parts else None, "parts": parts}

    def restore(self, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
        """Go on from what was saved. Raises ArtifactError where the file is not as it was."""
        if saved["file"] is not None:
            self._opened = StateFile(self._folder, saved["file"])
        counts = [part[-1] for part in saved["parts"]]
        each = torch.split(tensors["facts"], counts, dim=1) if counts else ()
        self._parts = [
            _Part(unit, x, y, getattr(torch, of_x), getattr(torch, of_y), facts)
            for (unit, x, y, of_x, of_y, _), facts in zip(saved["parts"], each, strict=True)
        ]

    def close(self) -> None:
        """Let go of the file."""
        if self._opened is not None:
            self._opened.close()

    def table(self, seed: int, tick: Ticking | None = None) -> MapTable:
        """How well each source layer explains each target layer.

        Raises:
            PairsError: too few rows.
            ModelError: the states of a layer are constant.
        """
        sketches, sides = self._sketches(seed), self.sides
        one = Sides(sides.source_layers[:1], sides.source_width, sides.target_layers, SKETCH).bytes
        at_once = max(1, GROUP_BYTES // one)
        rows: list[MapTable] = []
        for start in range(0, len(sides.source_layers), at_once):
            group = sides.source_layers[start : start + at_once]
            some = Sides(group, sides.source_width, sides.target_layers, SKETCH)
            moments = JointMoments(some, seed)
            for unit in self.units:
                of_unit = self.unit(unit, Sides(group, sides.source_width, (), sides.target_width))
                moments.add(of_unit.x, sketches[unit], of_unit.texts, of_unit.held_out, unit=unit)
            rows.append(judge(moments, tick).table)
        return MapTable.below(rows, rows=sum(part.rows for part in moments.parts))

    def _sketches(self, seed: int) -> Mapping[int, Tensor]:
        """Of each unit P'y, [rows, Lt, columns] float32, y standardised by the rows that are fitted."""
        width = self.sides.target_width
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (width, SKETCH), generator=generator).float() * 2 - 1
        found: dict[int, list[Tensor]] = {unit: [] for unit in self.units}
        for layer in self.sides.target_layers:
            states = dict(self._target(layer))
            fitted = torch.cat([y[~held_out] for y, held_out in states.values()]).double()
            if not len(fitted):
                fitted = torch.cat([y for y, _ in states.values()]).double()
            mean, spread = fitted.mean(0), fitted.std(0, correction=0)
            scale = torch.where(spread > 1e-9 * mean.abs(), 1 / spread.clamp(min=1e-300), 0.0)
            for unit, (y, _) in states.items():
                found[unit].append(((y.double() - mean) * scale).float() @ signs)
        return {unit: torch.stack(parts, dim=1) for unit, parts in found.items()}

    def _target(self, layer: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        for unit in self.units:
            some = Sides((), self.sides.source_width, (layer,), self.sides.target_width)
            rows = self.unit(unit, some)
            yield unit, (rows.y[:, 0], rows.held_out)


_NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}


def _narrowed(states: Tensor) -> Tensor:
    """In bfloat16 or float16, where that loses nothing."""
    few = states[:, :1]
    for dtype in (torch.bfloat16, torch.float16):
        if not torch.equal(few.to(dtype).to(states.dtype), few):
            continue
        if torch.equal((narrow := states.to(dtype)).to(states.dtype), states):
            return narrow
    return states


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def chosen_pairs(table: MapTable) -> tuple[tuple[int, int], ...]:
    """(source layer, target layer) for each target layer: the source layer with the best R², of equals the
    lowest.
    """
    sources = range(len(table.source_layers))
    best = [largest(sources, of_target.__getitem__, 0.0, R2_TIE)[0] for of_target in table.r2.T.tolist()]
    return tuple(
        (table.source_layers[source], target)
        for source, target in zip(best, table.target_layers, strict=True)
    )
