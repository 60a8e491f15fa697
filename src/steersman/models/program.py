"""Open blocks' plans as one program, and one forward under it: which edits each token meets."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steersman.edits import ROLES, SCOPES, Edit
from steersman.errors import SteeringNotApplied
from steersman.models.overflow import Overflows
from steersman.models.tokens import ROLE_CODES, Tokens, codes_of
from steersman.steering import Architecture, Steering, check_edits

if TYPE_CHECKING:
    from steersman.models.apply import Context

Site = tuple[str, int]
"""(point, layer)"""

SMALL = 1024
"""Tokens of a forward whose edits, row by row, are kept for the next one of its form."""
FORMS = 64
"""Forms of a forward that a program remembers."""


def site_name(site: Site) -> str:
    """The name of a site in receipts: "router:3"."""
    return f"{site[0]}:{site[1]}"


class Program:
    """Several blocks' plans as one.

    Every combination of their rows' plans gets a number, and every token a code: `plan * ROLE_CODES + role`.
    Codes under which the same edits hold share a *row*; row 0 has no edits. Levers keep tables by row.

    Raises:
        PlanError: the plans contradict each other or together break a limit.
    """

    def __init__(self, contexts: tuple[Context, ...], architecture: Architecture) -> None:
        self.contexts = contexts
        self.architecture = architecture
        self.plans = list(itertools.product(*(range(len(context.plans)) for context in contexts)))
        self.compiled: dict[Site, Any] = {}
        """What a lever has prepared for its sites; filled by the lever."""
        self.sites: frozenset[Site] = frozenset().union(*(context.sites for context in contexts))
        self.rows: list[tuple[Edit, ...]] = [()]
        """The edits that hold in each row, in order of the blocks."""
        self.row_of_code: list[int] = []
        self._held: dict[tuple[Context, Site], tuple[bool, ...]] = {}
        self._row_of_code: dict[torch.device, Tensor] = {}
        self._layouts: dict[Any, Layout] = {}
        self.wants_changes = any(context.receipt_kind == "changes" for context in contexts)
        """Whether a receipt asks which tokens' choices were changed."""
        for plan in self.plans:
            steerings = self._steerings(plan)
            sums = any(steering.on_conflict == "sum" for steering in steerings)
            edits = [edit for steering in steerings for edit in steering.edits]
            check_edits(edits, architecture, "sum" if sums else "error")
            self._add_rows(edits)

    def _add_rows(self, edits: list[Edit]) -> None:
        known = {tuple(map(id, edits)): row for row, edits in enumerate(self.rows)}
        self.row_of_code.append(0)  # outside: padding, and what follows a row's end
        for role in ROLES:
            held = tuple(edit for edit in edits if role in SCOPES[edit.scope])
            key = tuple(map(id, held))
            if key not in known:
                known[key] = len(self.rows)
                self.rows.append(held)
            self.row_of_code.append(known[key])

    def rows_on(self, device: torch.device) -> Tensor:
        """`row_of_code` as a tensor, int64 [codes]."""
        if device not in self._row_of_code:
            self._row_of_code[device] = torch.tensor(self.row_of_code, device=device)
        return self._row_of_code[device]

    def layout_of(self, tokens: Tokens) -> Layout:
        """Where the rows hold in a forward; made once for the forms that come again, step by step."""
        form = (tokens.rows, tokens.columns, tokens.copies, tokens.counts, tokens.device)
        layout = self._layouts.get(form)
        if layout is None:
            layout = Layout(self, tokens)
            if tokens.counts is not None and (
                layout.row is not None or tokens.rows * tokens.columns <= SMALL
            ):
                if len(self._layouts) >= FORMS:
                    self._layouts.clear()
                self._layouts[form] = layout
        return layout

    def forget(self) -> None:
        """Drop tables and layouts: receipts outlive a block and keep its program."""
        self.compiled.clear()
        self._layouts.clear()

    def plan_of_rows(self, rows: int, copies: int) -> list[int]:
        """The combined plan of each row of a forward; `copies` rows stand for one row given."""
        number = [0] * rows
        for context in self.contexts:
            if len(context.plans) == 1:
                context.check_rows(rows, copies)
                continue
            local = context.plan_of_rows(rows, copies)
            number = [n * len(context.plans) + p for n, p in zip(number, local, strict=True)]
        return number

    def held(self, context: Context, site: Site) -> tuple[bool, ...]:
        """For each code, whether an edit of this block at this site holds the token."""
        if (context, site) not in self._held:
            self._held[context, site] = self._find_held(context, site)
        return self._held[context, site]

    def _find_held(self, context: Context, site: Site) -> tuple[bool, ...]:
        position = self.contexts.index(context)
        codes: list[bool] = []
        for plan in self.plans:
            steering = context.plans[plan[position]]
            edits = steering.edits if steering is not None else ()
            held = {
                code
                for edit in edits
                if edit.point == site[0] and site[1] in edit.layers
                for code in codes_of(edit.scope)
            }
            codes.extend(code in held for code in range(ROLE_CODES))
        return tuple(codes)

    def _steerings(self, plan: tuple[int, ...]) -> list[Steering]:
        chosen = (context.plans[p] for context, p in zip(self.contexts, plan, strict=True))
        return [steering for steering in chosen if steering is not None]


class Layout:
    """Where a program's rows hold in forwards of one form.

    `row` is the row that all tokens follow, as far as the host can tell; None where they differ.
    """

    def __init__(self, program: Program, tokens: Tokens) -> None:
        self._program = program
        self._tokens = tokens
        self._plans = program.plan_of_rows(tokens.rows, tokens.copies)
        self._codes: Tensor | None = None
        self._index: dict[torch.device, Tensor] = {}
        self.edits: dict[Site, Any] = {}
        """What a lever has found to hold for the tokens at its sites; filled by the lever."""
        roles = range(ROLE_CODES) if tokens.counts is None else [r for r, n in enumerate(tokens.counts) if n]
        rows = {program.row_of_code[plan * ROLE_CODES + role] for plan in set(self._plans) for role in roles}
        self.row: int | None = rows.pop() if len(rows) == 1 else None

    @property
    def codes(self) -> Tensor:
        """The code of each token, int64 [rows · columns]."""
        if self._codes is None:
            first = torch.tensor(self._plans, device=self._tokens.device)[:, None] * ROLE_CODES
            self._codes = (first + self._tokens.roles).reshape(-1)
        return self._codes

    def index_on(self, device: torch.device) -> Tensor:
        """The row of each token, int64 [rows · columns], on a site's device."""
        if device not in self._index:
            self._index[device] = self._program.rows_on(device)[self.codes.to(device)]
        return self._index[device]

    def rows_of_tokens(self, most: int) -> list[int] | None:
        """The row of each token, where the host knows it and there are not more than `most`."""
        tokens = self._tokens
        if tokens.counts is None or tokens.rows * tokens.columns > most:
            return None
        roles = [role for role, count in enumerate(tokens.counts) for _ in range(count)]
        rows = self._program.row_of_code
        return [rows[plan * ROLE_CODES + role] for plan in self._plans for role in roles]

    def tokens_of_rows(self, chosen: Sequence[bool], device: torch.device) -> Tensor | None:
        """The tokens that follow one of the chosen rows, int64 [n]; None where only a device could tell."""
        tokens, of_code = self._tokens, self._program.row_of_code
        if tokens.counts is None:
            if device.type != "cpu":
                return None  # it would have to be waited for
            return torch.tensor(chosen)[self.index_on(device)].nonzero().squeeze(1)
        ends = list(itertools.accumulate(tokens.counts))
        spans = [
            torch.arange(row * tokens.columns + end - count, row * tokens.columns + end)
            for row, plan in enumerate(self._plans)
            for role, (count, end) in enumerate(zip(tokens.counts, ends, strict=True))
            if count and chosen[of_code[plan * ROLE_CODES + role]]
        ]
        return torch.cat(spans).to(device) if spans else torch.empty(0, dtype=torch.int64, device=device)

    @property
    def fresh(self) -> Tensor | None:
        """Which tokens are fed for the first time, bool [rows · columns]; None: all."""
        if not self._tokens.fresh:
            return None
        columns = torch.arange(self._tokens.columns, device=self._tokens.device) >= self._tokens.fresh
        return columns.expand(self._tokens.rows, -1).reshape(-1)

    @cached_property
    def histogram(self) -> list[int] | Tensor:
        """How many tokens have each code."""
        codes = len(self._program.plans) * ROLE_CODES
        counts = self._tokens.counts
        if counts is not None:
            histogram = [0] * codes
            for plan, rows in Counter(self._plans).items():
                for role, count in enumerate(counts):
                    histogram[plan * ROLE_CODES + role] = rows * count
            return histogram
        fresh = self.fresh
        return torch.bincount(self.codes if fresh is None else self.codes[fresh], minlength=codes)


class Pass:
    """One decoder forward under steering: where its edits hold, and which sites have run."""

    __slots__ = ("layout", "overflows", "program", "ran", "shape", "size")

    def __init__(self, program: Program, tokens: Tokens) -> None:
        self.program = program
        self.layout = program.layout_of(tokens)
        self.shape = (tokens.rows, tokens.columns)
        self.size = tokens.rows * tokens.columns
        """Tokens of the forward, padding included."""
        self.ran: set[Site] = set()
        self.overflows = Overflows()

    def count_changed(self, site: Site, changed: Tensor) -> None:
        """Take note of which tokens, bool [rows · columns], chose otherwise at a site than they would have
        unsteered.
        """
        codes, fresh = self.layout.codes, self.layout.fresh
        changed = changed.to(codes.device)
        if fresh is not None:
            changed = changed & fresh
        for context in self.program.contexts:
            counts = context.receipt._changed
            if counts is not None and site in context.sites:
                held = torch.tensor(self.program.held(context, site), device=codes.device)
                count = (changed & held[codes]).sum()
                counts[site] = counts[site] + count if site in counts else count

    def steered(self, device: torch.device) -> Tensor:
        """Which tokens any edit holds, bool [rows, columns]."""
        if self.layout.row is not None:
            return torch.full(self.shape, self.layout.row != 0, device=device)
        return (self.layout.index_on(device) != 0).view(self.shape)

    def close(self) -> None:
        """Check that every planned site ran, then enter the tokens into the receipts.

        Raises:
            SteeringNotApplied: a planned site did not run.
        """
        if not self.program.sites <= self.ran:
            missing = sorted(self.program.sites - self.ran)
            named = ", ".join(site_name(site) for site in missing)
            raise SteeringNotApplied(
                f"planned but not run in this forward: {named}; the output is not steered"
            )
        histogram = self.layout.histogram
        for context in self.program.contexts:
            context.forwards += 1
            context.receipt._histograms.setdefault(self.program, Histogram()).add(histogram)


class Histogram:
    """Sums of token counts by code: those known to the host, and those still on their device."""

    def __init__(self) -> None:
        self._known: list[int] = []
        self._on_device: dict[torch.device, Tensor] = {}

    def add(self, counts: list[int] | Tensor) -> None:
        """Add the counts of one forward, without waiting for a device."""
        if isinstance(counts, list):
            self._known = list(map(operator.add, self._known, counts)) if self._known else counts
        elif counts.device in self._on_device:
            self._on_device[counts.device] += counts
        else:
            self._on_device[counts.device] = counts.clone()

    def tolist(self) -> list[int]:
        """The sums, by code."""
        parts = [counts.tolist() for counts in self._on_device.values()]
        return [sum(column) for column in zip(*filter(None, [self._known, *parts]), strict=True)]
