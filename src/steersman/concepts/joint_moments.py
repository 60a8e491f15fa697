"""Second moments of the states of two models over the same rows: streamed, centred, float64, mergeable.

Of source layers x, target layers y and pairs of them, for the texts that a map is fitted on and for those
held out of it, apart. Sums are taken about fixed centres near the means (shifted data: Chan, Golub and
LeVeque 1983); the means come in at the end.

Sums are float64. States that are float32 or coarser are centred in float32, and their products taken in it,
chunk by chunk, but for those of the source's fitted rows, xx. With u = 2⁻²⁴ and chunks of L rows an entry of
xy/n is off by at most (L + 4) u · mean|x_i y_j| (Higham 2002, section 3.1), and typically by √L u/√chunks of
the spreads' product (Higham and Mary 2019), where another draw of the rows would change it by 1/√n. A map is
linear in xy, ‖ΔW‖ ≤ ‖Δxy/n‖ / (ridge · tr(Cov)/d); xx is inverted, and is that of the centred states.

The control pairs source rows with the target rows of other texts. Its moments are kept as sketches: z = P'y,
P fixed Rademacher columns, so that E|P'r|² = q|r|² for any residual r and memory is that of q columns a draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS, CHUNK_BYTES = 2048, 1 << 28
"""Rows that are kept before they enter the sums, and what they may take: fewer, where they are wide."""
DRAWS, COLUMNS = 20, 8
"""Control pairings, and Rademacher columns of each."""
SKETCH = DRAWS * COLUMNS

FIT, HELD_OUT = 0, 1
_EXCHANGES = 16


@dataclass(frozen=True)
class Sides:
    """What is related: the layers and the width of either model, and which pairs (source layer, target layer)
    of them; all, where none are named.
    """

    source_layers: tuple[int, ...]
    source_width: int
    target_layers: tuple[int, ...]
    target_width: int
    pairs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.pairs:
            every = tuple((one, other) for one in self.source_layers for other in self.target_layers)
            object.__setattr__(self, "pairs", every)

    def of(self, pairs: Iterable[tuple[int, int]]) -> Sides:
        """These pairs alone, with the layers that they have."""
        wanted = set(pairs)
        sources, targets = {source for source, _ in wanted}, {target for _, target in wanted}
        return replace(
            self,
            source_layers=tuple(layer for layer in self.source_layers if layer in sources),
            target_layers=tuple(layer for layer in self.target_layers if layer in targets),
            pairs=tuple(sorted(wanted)),
        )

    @cached_property
    def numbers(self) -> tuple[tuple[int, int], ...]:
        """Of each pair the numbers of its layers among the source's and the target's."""
        sources = {layer: number for number, layer in enumerate(self.source_layers)}
        targets = {layer: number for number, layer in enumerate(self.target_layers)}
        return tuple((sources[source], targets[target]) for source, target in self.pairs)

    @cached_property
    def number_of(self) -> Mapping[tuple[int, int], int]:
        """Which of the pairs has these numbers of layers."""
        return {pair: number for number, pair in enumerate(self.numbers)}

    @property
    def columns(self) -> tuple[int, int, int]:
        """Numbers a row has in all source layers, in all target layers, and in the control's sketches."""
        targets = len(self.target_layers)
        return (
            len(self.source_layers) * self.source_width,
            targets * self.target_width,
            targets * SKETCH,
        )

    @property
    def bytes(self) -> int:
        """What the moments of both parts take in memory."""
        x, y, z = self.columns
        sources, targets = len(self.source_layers), len(self.target_layers)
        of_pairs = len(self.pairs) * self.source_width * (self.target_width + SKETCH)
        one = of_pairs + sources * self.source_width**2 + x + 2 * y + 2 * z
        return 8 * (2 * one + targets * self.target_width**2)


Layers = Iterable[Tensor]


@dataclass
class Moments:
    """Sums over the rows of one part, about the centres.

    x [Ls·ds], y [Lt·dt] and z [Lt·draws·columns] are sums; xx [Ls, ds, ds], xy [pairs, ds, dt], xz [pairs,
    ds, draws·columns] and yy [Lt, dt, dt] (held-out rows; else empty) sums of products, y2 and z2 of squares.
    All float64.
    """

    rows: int
    x: Tensor
    y: Tensor
    z: Tensor
    xx: Tensor
    xy: Tensor
    xz: Tensor
    yy: Tensor
    y2: Tensor
    z2: Tensor

    @classmethod
    def zeros(cls, sides: Sides, *, with_yy: bool) -> Moments:
        """No rows yet."""
        shapes = cls.shapes(sides, with_yy=with_yy)
        return cls(
            rows=0, **{name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        )

    @staticmethod
    def shapes(sides: Sides, *, with_yy: bool) -> dict[str, tuple[int, ...]]:
        """The shape of each sum."""
        x, y, z = sides.columns
        ds, dt = sides.source_width, sides.target_width
        return {
            "x": (x,),
            "y": (y,),
            "z": (z,),
            "xx": (len(sides.source_layers), ds, ds),
            "xy": (len(sides.pairs), ds, dt),
            "xz": (len(sides.pairs), ds, SKETCH),
            "yy": (len(sides.target_layers) if with_yy else 0, dt, dt),
            "y2": (y,),
            "z2": (z,),
        }

    def add(self, x: Layers, y: Layers, z: Tensor, pairs: Iterable[tuple[int, int]]) -> None:
        """Add rows about the centres.

        Args:
            x, y: Layer by layer, [rows, width], in the precision of products.
            z: float32 [rows, columns].
            pairs: Of numbers of layers.
        """
        self.rows += len(z)
        self.z += _total(z)
        self.z2 += _total(z * z)
        judged = bool(len(self.yy))
        sources, targets = [], []
        for layer, block in enumerate(x):
            self.x.reshape(len(self.xx), -1)[layer] += _total(block)
            _add_product(self.xx[layer], *(2 * [block.float() if judged else block.double()]))
            sources.append(block)
        for layer, block in enumerate(y):
            place = slice(layer * block.shape[1], (layer + 1) * block.shape[1])
            self.y[place] += _total(block)
            self.y2[place] += _total(block * block)
            if judged:
                _add_product(self.yy[layer], *(2 * [block.float()]))
            targets.append(block)
        for number, (source, target) in enumerate(pairs):
            one, other = sources[source], targets[target]
            if judged:
                one, other = one.float(), other.float()
            _add_product(self.xy[number], one, other)
            sketch = z[:, target * SKETCH : (target + 1) * SKETCH]
            _add_product(self.xz[number], one.float(), sketch)

    def move(self, dx: Tensor, dy: Tensor, pairs: Iterable[tuple[int, int]]) -> None:
        """Take the sums about other centres: those of x and y less dx and dy (z keeps its own)."""
        n = self.rows
        (x, dx_), (y, dy_) = (
            [each.reshape(count, -1) for each in both]
            for both, count in (((self.x, dx), len(self.xx)), ((self.y, dy), self._targets))
        )
        z = self.z.reshape(-1, SKETCH)
        for number, (source, target) in enumerate(pairs):
            self.xy[number].addr_(x[source], dy_[target]).addr_(dx_[source], y[target])
            self.xy[number].addr_(dx_[source], dy_[target], alpha=n)
            self.xz[number].addr_(dx_[source], z[target])
        for totals, at, by in ((self.xx, x, dx_), (self.yy, y, dy_)):
            for total, one, other in zip(totals, at, by, strict=False):  # there may be no yy
                total.addr_(one, other).addr_(other, one).addr_(other, other, alpha=n)
        self.y2 += 2 * dy * self.y + n * dy * dy
        self.x += n * dx
        self.y += n * dy

    @property
    def _targets(self) -> int:
        return len(self.z) // SKETCH

    def include(self, other: Moments) -> None:
        """Add other rows' sums about the same centres."""
        self.rows += other.rows
        for field in fields(self):
            if field.name != "rows":
                getattr(self, field.name).add_(getattr(other, field.name))


def _total(rows: Tensor) -> Tensor:
    """The sum of rows, float64: of float32 ones by way of sums of 64, a tenth of the time."""
    if rows.dtype == torch.float64:
        return rows.sum(0)
    whole = len(rows) // 64 * 64
    parts = rows[:whole].reshape(-1, 64, rows.shape[1]).sum(1)
    return torch.cat([parts, rows[whole:]]).sum(0, dtype=torch.float64)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add one'other to a float64 total, multiplied in their own precision."""
    if one.dtype == torch.float64:
        total.addmm_(one.T, other)
    else:
        total += one.T @ other


class JointMoments:
    """Moments of the fitted and of the held-out rows.

    Args:
        sides: The layers and widths.
        seed: Of the control's pairings and projections.

    `centres` and `scale` are fixed by the first rows added, or by `begin`. Parts of a job that are to be
    merged begin with the same rows.
    """

    def __init__(self, sides: Sides, seed: int = 0) -> None:
        self.sides, self.seed = sides, seed
        self.parts = (Moments.zeros(sides, with_yy=False), Moments.zeros(sides, with_yy=True))
        self._centres: tuple[Tensor, Tensor] | None = None
        self.scale = torch.ones(sides.columns[1], dtype=torch.float64)
        self._waiting: tuple[list[tuple[Tensor, ...]], ...] = ([], [])
        generator = torch.Generator().manual_seed(seed)
        shape = sides.target_width, SKETCH
        self._signs = torch.randint(0, 2, shape, generator=generator).float() * 2 - 1

    @property
    def centres(self) -> tuple[Tensor, Tensor]:
        """What the sums of x and y are taken about. Raises ValueError where no rows were added."""
        if self._centres is None:
            raise ValueError("no rows were added")
        return self._centres

    def begin(self, x: Tensor, y: Tensor) -> None:
        """Fix the centres, and the scale of the sketches, by these rows' means and spreads.

        Args:
            x: [rows, Ls, ds]; y: [rows, Lt, dt].
        """
        if self._centres is None and len(x):
            flat_x, flat_y = x.flatten(1).double(), y.flatten(1).double()
            # As precise as the states, so that taking them away rounds once.
            self._centres = flat_x.mean(0).to(x.dtype).double(), flat_y.mean(0).to(y.dtype).double()
            spread = flat_y.std(0, correction=0)
            # Powers of two: the same whatever the last digits of a forward are.
            self.scale = torch.where(spread > 0, spread, 1.0).log2().round().exp2()

    def add(self, x: Tensor, y: Tensor, texts: Tensor, held_out: Tensor, *, unit: int = 0) -> None:
        """Add the rows of some texts, all of their rows at once.

        Args:
            x: States of the source, [rows, Ls, ds], any float dtype.
            y: States of the target, [rows, Lt, dt].
            texts: int64 [rows], which text a row is of.
            held_out: bool [rows].
            unit: A number of these texts among all: it seeds the control's pairings, which stay among them.
        """
        if not len(x):
            return
        self.begin(x, y)
        z = self._paired(self._sketch(y), texts, held_out, unit)
        flat = x.flatten(1), y.flatten(1), z
        for part in (FIT, HELD_OUT):
            chosen = held_out == bool(part)
            if bool(chosen.any()):
                self._waiting[part].append(tuple(rows[chosen] for rows in flat))
            while sum(len(rows[0]) for rows in self._waiting[part]) >= self._chunk:
                self._enter(part, self._chunk)

    def flush(self) -> None:
        """Enter rows that wait for their chunk to be full."""
        for part in (FIT, HELD_OUT):
            if self._waiting[part]:
                self._enter(part, self._chunk)

    @property
    def _chunk(self) -> int:
        """Rows of a chunk."""
        return min(CHUNK_ROWS, max(128, CHUNK_BYTES // (4 * sum(self.sides.columns))))

    def _enter(self, part: int, rows: int) -> None:
        """Add waiting rows, at most so many, to a part's sums."""
        taken: list[tuple[Tensor, ...]] = []
        while rows > 0 and self._waiting[part]:
            piece = self._waiting[part].pop(0)
            if len(piece[0]) > rows:
                # Of their own memory, so that what has entered can go.
                self._waiting[part].insert(0, tuple(some[rows:].clone() for some in piece))
                piece = tuple(some[:rows] for some in piece)
            rows -= len(piece[0])
            taken.append(piece)
        z = torch.cat([piece[2] for piece in taken])
        x, y = (self._centred([piece[side] for piece in taken], side) for side in (0, 1))
        self.parts[part].add(x, y, z, self.sides.numbers)

    def _centred(self, pieces: list[Tensor], side: int) -> Layers:
        """Rows about their centre, layer by layer, in the precision of their products."""
        width = (self.sides.source_width, self.sides.target_width)[side]
        dtype = torch.float64 if pieces[0].dtype == torch.float64 else torch.float32
        for start in range(0, pieces[0].shape[1], width):
            centre = self.centres[side][start : start + width].to(dtype)
            yield torch.cat([piece[:, start : start + width].to(dtype) - centre for piece in pieces])

    def _sketch(self, y: Tensor) -> Tensor:
        """[rows, Lt · draws · columns], float32: a control has no need of more."""
        scaled = y.flatten(1).float().sub(self.centres[1].float()).div_(self.scale.float())
        return (scaled.reshape(-1, self.sides.target_width) @ self._signs).reshape(len(y), -1)

    def _paired(self, z: Tensor, texts: Tensor, held_out: Tensor, unit: int) -> Tensor:
        """Sketches of other rows, of another text and the same part wherever there are any, draw by draw."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + unit) % 2**63)
        partner = torch.empty((DRAWS, len(z)), dtype=torch.int64)
        for part in (False, True):
            places = torch.nonzero(held_out == part)[:, 0]
            alone = len(places) and bool((texts[places] == texts[places[0]]).all())
            pool = torch.arange(len(z)) if alone else places
            partner[:, places] = _partners(places, pool, texts, generator)
        of_draw = z.reshape(len(z), -1, DRAWS, COLUMNS)
        paired = [of_draw[partner[draw], :, draw] for draw in range(DRAWS)]
        return torch.stack(paired, dim=2).reshape(len(z), -1)

    def merge(self, other: JointMoments) -> None:
        """Include the rows of another part of the same job. Raises ValueError where it is of other sides."""
        if (self.sides, self.seed) != (other.sides, other.seed):
            raise ValueError("moments of other layers, widths or seeds do not add up")
        self.flush()
        other.flush()
        if other._centres is None:
            return
        if self._centres is None:
            self._centres, self.scale = other._centres, other.scale
        dx, dy = (theirs - ours for ours, theirs in zip(self.centres, other.centres, strict=True))
        for ours, theirs in zip(self.parts, other.parts, strict=True):
            if bool((dx != 0).any()) or bool((dy != 0).any()):
                theirs = Moments(**{f.name: getattr(theirs, f.name) for f in fields(theirs)})
                for field in fields(theirs):
                    if field.name != "rows":
                        setattr(theirs, field.name, getattr(theirs, field.name).clone())
                theirs.move(dx, dy, self.sides.numbers)
            ours.include(theirs)

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as float64 and int64 tensors: what `from_tensors` takes."""
        self.flush()
        tensors = {"rows": torch.tensor([part.rows for part in self.parts])}
        if self._centres is not None:
            tensors |= {"centre.x": self._centres[0], "centre.y": self._centres[1], "scale": self.scale}
        for name, part in zip(("fit", "held_out"), self.parts, strict=True):
            tensors |= {f"{name}.{f.name}": getattr(part, f.name) for f in fields(part) if f.name != "rows"}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], sides: Sides, seed: int) -> JointMoments:
        """Moments as they were. Raises ValueError where a tensor is missing or of another shape."""
        x, y, _ = sides.columns
        begun: dict[str, tuple[int, ...]] = {"centre.x": (x,), "centre.y": (y,), "scale": (y,)}
        expected: dict[str, tuple[int, ...]] = {"rows": (2,)}
        for part_name, with_yy in (("fit", False), ("held_out", True)):
            shapes = Moments.shapes(sides, with_yy=with_yy)
            expected |= {f"{part_name}.{name}": shape for name, shape in shapes.items()}
        if set(tensors) not in (set(expected), {*expected, *begun}):
            raise ValueError("tensors of moments are missing, or there are others")
        expected |= begun
        for name, tensor in tensors.items():
            dtype = torch.int64 if name == "rows" else torch.float64
            if tuple(tensor.shape) != expected[name] or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {list(expected[name])}")
        made = cls(sides, seed)  # only now: what is read says how large it is
        if "scale" in tensors:
            made._centres, made.scale = (tensors["centre.x"], tensors["centre.y"]), tensors["scale"]
        rows: list[Any] = tensors["rows"].tolist()
        if min(rows) < 0:
            raise ValueError(f"rows are {rows}")
        for name, part, count in zip(("fit", "held_out"), made.parts, rows, strict=True):
            part.rows = count
            for field in fields(part):
                if field.name != "rows":
                    setattr(part, field.name, tensors[f"{name}.{field.name}"])
        return made


def _partners(places: Tensor, pool: Tensor, texts: Tensor, generator: torch.Generator) -> Tensor:
    """For each place another of the pool, draw by draw [draws, places]: a permutation where the pool is the
    places, of another text where there is one.
    """
    order = torch.rand(DRAWS, len(pool), generator=generator).argsort(dim=1, stable=True)
    partner = pool[order[:, : len(places)]]
    for _ in range(_EXCHANGES):
        same = texts[partner] == texts[places]
        most = min(int(same.sum(dim=1).max()), len(places) // 2)
        if not most:
            break
        # Exchange partners with places chosen at random: what was a permutation stays one.
        chance = torch.rand(same.shape, generator=generator, dtype=torch.float64)
        # float64, where no two of so many are equal: which of them comes first must not be chance.
        order = (chance - 2 * same.double()).topk(2 * most, dim=1, largest=False).indices
        wrong, others = order[:, :most], order[:, most : 2 * most]
        given, taken = partner.gather(1, wrong), partner.gather(1, others)
        swapped = same.gather(1, wrong)
        partner.scatter_(1, wrong, torch.where(swapped, taken, given))
        partner.scatter_(1, others, torch.where(swapped, given, taken))
    return partner
