"""What a program does at one router, row by row: strengths, where edited scores come from, and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.edits import strengths_at
from steersman.experts.bounds import (
    FEW,
    Moves,
    are_few,
    edit_scores,
    move_few,
    move_to_bounds,
    put_few,
    sources_of,
)
from steersman.limits import Router
from steersman.models.program import Layout, Program


@dataclass(frozen=True)
class TokenEdit:
    """What holds for the tokens of one forward at one router: one row for all of them, [experts], or one
    each, [tokens, experts].
    """

    strengths: Tensor
    """λ, float32."""
    sources: Tensor | None
    """As of `bounds.move_to_bounds`; None where a strength is neither 0 nor ±1."""
    expert_rank: Tensor | None
    """+inf where λ = 1, -inf where λ = -1, else 0; None where no strength is full."""
    group_rank: Tensor | None
    """+inf where a group holds an expert with λ = 1, else 0; over groups. None without such."""
    dead_rank: Tensor | None
    """-inf where λ = -1, else 0: all that a softmax needs. None where no expert is dead."""

    moves: tuple[Moves, ...] | None = None
    """What the host knows of a few tokens: of each, the experts at 1 and at -1. None where it does not."""

    def of_few(self, scores: Tensor) -> bool:
        """Whether these scores may be changed one by one, in place."""
        return self.moves is not None and are_few(scores)

    def scores(self, scores: Tensor, few: bool) -> Tensor:
        """Edited scores [tokens, experts]; where they are few, those given are changed."""
        if few:
            move_few(scores, self.moves or ())
            return scores
        if self.sources is not None:
            return move_to_bounds(scores, self.sources)
        return edit_scores(scores, self.strengths)

    def dead_last(self, shares: Tensor, few: bool) -> Tensor:
        """Shares [tokens, experts], all 0 or above, with those of dead experts below; where they are few,
        those given are changed.
        """
        if few:
            put_few(shares, self.moves or (), -1.0)
            return shares
        return shares if self.dead_rank is None else shares + self.dead_rank


class RouterTable:
    """The rows of a program at one router, on one device."""

    def __init__(self, program: Program, facts: Router, device: torch.device) -> None:
        strengths = torch.zeros(len(program.rows), facts.experts)
        for row, edits in enumerate(program.rows):
            named = strengths_at(edits, facts.layer)
            strengths[row, list(named)] = torch.tensor(list(named.values()), dtype=torch.float32)
        sources = sources_of(strengths)
        self._moves = None if sources is None else [_moves_of(row) for row in strengths.tolist()]
        inside, outside = strengths == 1, strengths == -1
        self._idle = [not bool(row.any()) for row in strengths]
        self._strengths = strengths.to(device)
        self._sources = None if sources is None else sources.to(device)
        self._dead = _rank(outside, -torch.inf, device)
        both = inside | outside
        self._expert = _rank(both, torch.inf, device, negative=outside)
        groups = facts.groups
        kept = inside.view(len(inside), groups[0], -1).any(dim=-1) if groups is not None else None
        self._group = None if kept is None else _rank(kept, torch.inf, device)

    def edit_of(self, layout: Layout, device: torch.device) -> TokenEdit | None:
        """What holds for the tokens of a forward; None: nothing for any of them, as far as the host can
        tell.
        """
        if layout.row is not None and self._idle[layout.row]:
            return None
        if all(self._idle):
            return None
        at = layout.row if layout.row is not None else layout.index_on(device)
        sources, expert, group, dead = (
            None if table is None else table[at]
            for table in (self._sources, self._expert, self._group, self._dead)
        )
        return TokenEdit(self._strengths[at], sources, expert, group, dead, self._moves_in(layout))

    def _moves_in(self, layout: Layout) -> tuple[Moves, ...] | None:
        rows = layout.rows_of_tokens(FEW // self._strengths.shape[-1])
        return None if rows is None or self._moves is None else tuple(self._moves[row] for row in rows)

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(strengths, expert ranks, group ranks), by row: what compiled code is given."""
        return self._strengths, self._expert, self._group


def _moves_of(strengths: list[float]) -> Moves:
    return (
        tuple(expert for expert, strength in enumerate(strengths) if strength > 0),
        tuple(expert for expert, strength in enumerate(strengths) if strength < 0),
    )


def _rank(where: Tensor, value: float, device: torch.device, negative: Tensor | None = None) -> Tensor | None:
    if not bool(where.any()):
        return None
    rank = torch.zeros(where.shape, device=where.device).masked_fill(where, value)
    return (rank if negative is None else rank.masked_fill(negative, -torch.inf)).to(device)


def token_edit(strengths: Tensor, facts: Router, index: Tensor) -> TokenEdit:
    """What holds for tokens that each follow a row of strengths, given outright instead of by a program.

    Args:
        strengths: λ, float32 [rows, experts].
        facts: The router's.
        index: int64 [tokens], the row of each.
    """
    sources = sources_of(strengths)
    inside, outside = strengths == 1, strengths == -1
    device = strengths.device
    groups = facts.groups
    kept = None if groups is None else inside.view(len(inside), groups[0], -1).any(dim=-1)
    tables = (
        sources,
        _rank(inside | outside, torch.inf, device, negative=outside),
        None if kept is None else _rank(kept, torch.inf, device),
        _rank(outside, -torch.inf, device),
    )
    places, expert, group, dead = (None if table is None else table[index] for table in tables)
    return TokenEdit(strengths[index], places, expert, group, dead)


def table_of(program: Program, facts: Router, device: torch.device) -> RouterTable:
    """The table of one router under a program, made once for each device."""
    tables: dict[torch.device, RouterTable] = program.compiled.setdefault(("router", facts.layer), {})
    if device not in tables:
        with torch.inference_mode(False):  # kept, and used where gradients are wanted too
            tables[device] = RouterTable(program, facts, device)
    return tables[device]
