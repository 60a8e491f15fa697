"""Edits of the residual stream: pure maths, for every engine.

`add`: h ← h + s v (ConTrans, arXiv 2405.13578, equation 5). `project`: h ← h − s (h·v̂) v̂, v̂ = v/‖v‖
(directional ablation, arXiv 2406.11717). In float32, returned in the dtype of h. Edits at one site run in
order; those that follow each other and add become one.

Tokens may follow different rows of edits. A row is laid out over *slots*, which alternate between adding and
projecting, so that all rows run through the same few operations. Where a row has nothing in a slot it adds
−0.0, which is the one number that leaves every number as it is, +0.0 and −0.0 included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.edits import ResidualEdit

NOTHING = -0.0
"""x + (−0.0) is x to the bit, for every x; x + 0.0 would turn −0.0 into 0.0."""


# Not frozen: steps are made in compiled code, where torch 2.11 would lose their attributes.
@dataclass(eq=False)
class Add:
    """h + `vector`: one [width] for all tokens, or each its own [tokens, width]."""

    vector: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """States [tokens, width] with the vector added."""
        added = hidden + self.vector
        return added if added.dtype is hidden.dtype else added.to(hidden.dtype)


@dataclass(eq=False)
class Project:
    """h − `share` (h·`direction`) `direction`, with unit directions [width] and a share []; or each token its
    own, [tokens, width] and [tokens, 1]. Tokens with the share 0 keep their bits.
    """

    direction: Tensor
    share: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """States [tokens, width] with their part along the direction taken out."""
        exact = hidden.float()
        along = (exact * self.direction).sum(dim=-1, keepdim=True)
        projected = exact - self.share * along * self.direction
        return torch.where(self.share == 0, exact, projected).to(hidden.dtype)


Step = Add | Project


def steps_of(edits: Iterable[ResidualEdit], layer: int) -> list[Step]:
    """What edits do at one layer, in order: no strength of 0, and adding that follows adding in one."""
    steps: list[Step] = []
    for edit in edits:
        vector = edit.vectors.get(layer)
        if vector is None or edit.strength == 0:
            continue
        if edit.operation == "project":
            exact = vector.double()  # whose square may not overflow
            steps.append(Project((exact / exact.norm()).float(), torch.tensor(edit.strength)))
        elif steps and isinstance(steps[-1], Add):
            steps[-1] = Add(steps[-1].vector + edit.strength * vector)
        else:
            steps.append(Add(edit.strength * vector))
    return steps


def edit_states(hidden: Tensor, steps: Iterable[Step]) -> Tensor:
    """States [tokens, width] after the steps. A tensor of its own; the one given is not changed."""
    for step in steps:
        hidden = step(hidden)
    return hidden


class Slots:
    """Rows of steps as tables: slot by slot, of every row what it does there.

    Args:
        rows: The steps of each row.
        width: Of the states.
        device: Where the tables go.
        least: Slots that there are at least.
    """

    def __init__(
        self, rows: Sequence[Sequence[Step]], width: int, device: torch.device, least: int = 0
    ) -> None:
        placed = [in_slots(steps) for steps in rows]
        count = max(least, 1 + max((max(slots, default=-1) for slots in placed), default=-1))
        self.tables: list[Step] = [_table(placed, slot, width, device) for slot in range(count)]

    def at(self, index: Tensor) -> list[Step]:
        """The steps of tokens that follow different rows, int64 [tokens]."""
        return [_gathered(table, index) for table in self.tables]


def in_slots(steps: Sequence[Step]) -> dict[int, Step]:
    """Each step at the first free slot of its kind: adding at even ones, projecting at odd ones."""
    placed: dict[int, Step] = {}
    slot = 0
    for step in steps:
        slot += (slot % 2 == 0) != isinstance(step, Add)
        placed[slot] = step
        slot += 1
    return placed


def _table(placed: Sequence[dict[int, Step]], slot: int, width: int, device: torch.device) -> Step:
    rows = len(placed)
    if slot % 2 == 0:
        added = torch.full((rows, width), NOTHING)
        for row, slots in enumerate(placed):
            if isinstance(step := slots.get(slot), Add):
                added[row] = step.vector
        return Add(added.to(device))
    directions, shares = torch.zeros(rows, width), torch.zeros(rows, 1)
    for row, slots in enumerate(placed):
        if isinstance(step := slots.get(slot), Project):
            directions[row], shares[row] = step.direction, step.share
    return Project(directions.to(device), shares.to(device))


def _gathered(table: Step, index: Tensor) -> Step:
    if isinstance(table, Add):
        return Add(table.vector[index])
    return Project(table.direction[index], table.share[index])
