"""The bank: every plan that a worker holds, as tables at fixed addresses, and who of a step follows which.

Row 0 holds nothing; a plan in slot p has the rows 1 + 3p + role. A token follows up to `components` rows,
each with a strength of its own, so that any number of strengths, and any sum of plans, takes no room. Tables
are written where no running request looks, so that none sees half a plan.

| table | shape | holds |
|---|---|---|
| `strengths` | float32 [routers, rows, experts] | λ |
| `vector_ids` | int32 [blocks, rows, slots] | rows of `vectors`; 0: none |
| `shares` | float32 [blocks, rows, slots] | of a projection, what is taken out |
| `vectors` | float32 [vectors, width] | what is added (its strength multiplied in), or unit directions |
| `token_rows` | int32 [tokens, components] | the rows that each token of the step follows |
| `token_strengths` | float32 [tokens, components] | and how strongly; both lie in one table, `followed` |
| `ran` | int32 [routers + blocks] | how often each site has run |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from steersman.concepts.residual import NOTHING, Add, Step, in_slots
from steersman.edits import ROLES
from steersman.errors import ServingError
from steersman.vllm.plan_rows import PlanRow
from steersman.vllm.routing import Rule

ROLE_COUNT = len(ROLES)


@dataclass(frozen=True)
class RouterPlace:
    """A router of this worker that can be edited.

    `rule` is its routing rule where that is written out (`routing.choose`), else None: the engine's own rule
    follows on edited scores. `softmax_first` says that this rule takes a softmax before its top-k.
    """

    layer: int
    experts: int
    rule: Rule | None = None
    softmax_first: bool = False


@dataclass(frozen=True)
class Places:
    """Where a worker's part of the model is edited."""

    routers: tuple[RouterPlace, ...]
    blocks: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class Room:
    """How much fits: plans, vectors, steps at one layer's output, plans of one token, tokens of a step."""

    plans: int
    vectors: int
    slots: int
    components: int
    tokens: int


class Bank:
    """See the module's text. `device` is where the model runs."""

    def __init__(self, places: Places, room: Room, device: torch.device) -> None:
        self.places, self.room, self.device = places, room, device
        self.router_of = {place.layer: index for index, place in enumerate(places.routers)}
        self.block_of = {layer: index for index, layer in enumerate(places.blocks)}
        rows = 1 + ROLE_COUNT * (room.plans + 1)
        """The last plan is the sentinel of the start-up canary."""
        experts = max((place.experts for place in places.routers), default=1)
        routers, blocks = len(places.routers), len(places.blocks)
        self.strengths = torch.zeros(routers, rows, experts, device=device)
        self.vector_ids = torch.zeros(blocks, rows, room.slots, dtype=torch.int32, device=device)
        self.shares = torch.zeros(blocks, rows, room.slots, device=device)
        self.vectors = torch.full((1 + room.vectors, places.width), NOTHING, device=device)
        self.followed = torch.zeros(room.tokens, 2 * room.components, dtype=torch.int32, device=device)
        self.token_rows = self.followed[:, : room.components]
        self.token_strengths = self.followed.view(torch.float32)[:, room.components :]
        self.ran = torch.zeros(routers + blocks, dtype=torch.int32, device=device)
        self.busy: list[frozenset[int]] = [frozenset()] * rows
        """Of each row, the sites that it edits: routers from 0, then blocks."""
        self.stepping: set[int] = set()
        """Rows that do something else at a layer's output than to add one vector."""
        self.version = 0
        """Changes whenever a plan is written: what has been gathered from the tables is stale then."""
        self._free = list(range(room.vectors, 0, -1))
        self._held: dict[int, list[int]] = {}
        self._empty: dict[int, tuple[bool, ...]] = {}
        self._fingerprints: dict[int, str] = {}

    @property
    def sentinel(self) -> int:
        """The slot of the start-up canary's plan."""
        return self.room.plans

    def row(self, slot: int, role: int) -> int:
        """The row that tokens of a role follow under the plan in a slot; 0 where it does nothing to them."""
        return 0 if self._empty[slot][role] else 1 + ROLE_COUNT * slot + role

    def fingerprint(self, slot: int) -> str | None:
        """Of the plan in a slot; None: there is none."""
        return self._fingerprints.get(slot)

    def write(self, slot: int, rows: Sequence[PlanRow], fingerprint: str = "") -> None:
        """Put a plan into a slot that no running request follows.

        Args:
            slot: Which.
            rows: The plan's, of each role.
            fingerprint: What it is known by to the front end.

        Raises:
            ServingError: the plan does not fit; the bank is as before then.
        """
        self._check(slot, rows)
        if slot in self._empty:
            self.clear(slot)
        known: dict[int, int] = {}
        for role, plan in enumerate(rows):
            row = 1 + ROLE_COUNT * slot + role
            busy: set[int] = set()
            for layer, experts in plan.strengths.items():
                if layer in self.router_of:  # other layers are another worker's
                    index = self.router_of[layer]
                    named = torch.tensor(list(experts), device=self.device)
                    self.strengths[index, row, named] = torch.tensor(
                        list(experts.values()), dtype=torch.float32, device=self.device
                    )
                    busy.add(index)
            for layer, steps in plan.steps.items():
                if layer in self.block_of:
                    self._write_steps(slot, row, self.block_of[layer], steps, known)
                    busy.add(len(self.places.routers) + self.block_of[layer])
            self.busy[row] = frozenset(busy)
            if any(len(in_slots(steps)) > 1 or 0 not in in_slots(steps) for steps in plan.steps.values()):
                self.stepping.add(row)
        self._empty[slot] = tuple(plan.empty for plan in rows)
        self._fingerprints[slot] = fingerprint
        self.version += 1

    def _check(self, slot: int, rows: Sequence[PlanRow]) -> None:
        if not 0 <= slot <= self.room.plans:
            raise ServingError(f"there is no slot {slot}: plans have 0 to {self.room.plans - 1}")
        steps = {id(steps): steps for row in rows for steps in row.steps.values()}.values()
        needed = max((1 + max(in_slots(one)) for one in steps if one), default=0)
        if needed > self.room.slots:
            raise ServingError(
                f"the plan takes {needed} steps at one layer's output, and there is room for "
                f"{self.room.slots}: start the engine with a plan of this form"
            )
        here = {
            id(step)
            for row in rows
            for layer in row.steps
            if layer in self.block_of
            for step in row.steps[layer]
        }
        free = len(self._free) + len(self._held.get(slot, ()))
        if len(here) > free:
            raise ServingError(
                f"the plan has {len(here)} vectors here, and there is room for {free} more: "
                "start the engine with a larger max_vectors"
            )

    def _write_steps(
        self, slot: int, row: int, block: int, steps: Sequence[Step], known: dict[int, int]
    ) -> None:
        for place, step in in_slots(steps).items():
            if id(step) not in known:  # roles share their vectors
                known[id(step)] = self._free.pop()
                self._held.setdefault(slot, []).append(known[id(step)])
                vector = step.vector if isinstance(step, Add) else step.direction
                self.vectors[known[id(step)]] = vector.to(self.device)
            self.vector_ids[block, row, place] = known[id(step)]
            self.shares[block, row, place] = 0.0 if isinstance(step, Add) else float(step.share)

    def clear(self, slot: int) -> None:
        """Take a plan out of its slot."""
        first = 1 + ROLE_COUNT * slot
        rows = slice(first, first + ROLE_COUNT)
        self.strengths[:, rows] = 0
        self.vector_ids[:, rows] = 0
        self.shares[:, rows] = 0
        self.busy[rows] = [frozenset()] * ROLE_COUNT
        self.stepping -= set(range(first, first + ROLE_COUNT))
        self._free.extend(self._held.pop(slot, ()))
        self._empty.pop(slot, None)
        self._fingerprints.pop(slot, None)
        self.version += 1

    @property
    def free_vectors(self) -> int:
        """How many more vectors fit."""
        return len(self._free)

    def sites(self, rows: Iterable[int]) -> frozenset[int]:
        """The sites that any of some rows edits."""
        return frozenset().union(*(self.busy[row] for row in rows))
