"""One step of the engine on a CPU: the edits of its tokens, gathered from the bank by plain torch.

What is gathered is kept for as long as the same tokens follow the same rows: from one decoded token to the
next nothing changes, and a site costs little more than the arithmetic of its edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.concepts.residual import NOTHING
from steersman.experts.bounds import Moves, Moving, are_few, move_few, move_to_bounds, sources_of
from steersman.vllm.bank import Bank
from steersman.vllm.live import Span
from steersman.vllm.routing import choose, tell_dead_apart

DENSE = 0.5
"""From this share of a step's tokens on, all are edited, those without a plan by nothing."""
KEPT = 1 << 20
"""Numbers of gathered vectors that are kept from step to step, for each layer."""
FEW = 256
"""Scores up to which one by one is faster than operations on tensors."""


@dataclass(frozen=True)
class RouterEdit:
    """What holds at one router: λ of the edited tokens, and where its full edits find their scores."""

    strengths: Tensor
    moving: Moving
    sources: Tensor | None
    moves: tuple[Moves, ...] | None

    def scores(self, scores: Tensor) -> Tensor:
        """Edited scores; where few, those given are changed."""
        if self.moves is not None and are_few(scores):
            move_few(scores, self.moves)
            return scores
        if self.sources is not None:
            return move_to_bounds(scores, self.sources)
        return self.moving(scores)


class Step:
    """The steered tokens of one step. `tokens` is how many it has, without padding."""

    def __init__(self, bank: Bank, spans: Sequence[Span], tokens: int) -> None:
        self._bank = bank
        self._spans = spans
        self._tokens = tokens
        self._version = bank.version
        rows = {row for span in spans for row, _ in span.follows}
        self.busy = bank.sites(rows)
        self._adds = bank.stepping.isdisjoint(rows)
        steered = sum(span.end - span.first for span in spans)
        self.held: Tensor | None = None
        """The steered tokens, int64 [n]; None: all tokens of the step are edited."""
        if steered < DENSE * tokens:
            self.held = torch.cat([torch.arange(span.first, span.end) for span in spans])
        self._width = tokens if self.held is None else steered
        self._rows, self._by = self._laid_out()
        self._router_edits: dict[int, RouterEdit] = {}
        self._added: dict[int, Tensor] = {}
        self._firsts = torch.tensor([span.first for span in spans])

    def _laid_out(self) -> tuple[Tensor, Tensor]:
        """Rows int64 [components, edited tokens], and strengths, float32."""
        components = max(len(span.follows) for span in self._spans)
        rows = torch.zeros(components, self._width, dtype=torch.int64)
        by = torch.ones(components, self._width)
        start = 0
        for span in self._spans:
            first = span.first if self.held is None else start
            end = first + span.end - span.first
            for component, (row, strength) in enumerate(span.follows):
                rows[component, first:end] = row
                by[component, first:end] = strength
            start = end
        return rows, by

    # ------------------------------------------------------------ routers

    def edit_scores(self, index: int, scores: Tensor) -> None:
        """Edit the scores [tokens, experts] of a router, in place."""
        edit = self._router_edit(index)
        place = self._bank.places.routers[index]
        given = self._edited_tokens(scores)
        edited = edit.scores(given)
        if place.softmax_first:
            edited = tell_dead_apart(edited, edit.strengths)
        self._put(scores, given, edited)

    def choose(self, index: int, scores: Tensor, weights: Tensor, ids: Tensor) -> None:
        """Choose experts for the edited tokens anew, in place; scores [tokens, experts] stay."""
        rule = self._bank.places.routers[index].rule
        if rule is None:
            raise AssertionError("a router without a rule of ours edits its scores")
        strengths = self._router_edit(index).strengths
        named = strengths.any(dim=-1)  # tokens without an edit here keep the engine's own choice, to the bit
        held = torch.arange(self._tokens) if self.held is None else self.held
        held = held[named]
        ours = choose(scores[held], strengths[named], rule)
        # Shared experts that the engine runs beside those of the choice stand behind them.
        weights[held, : rule.top_k] = ours[0].to(weights.dtype)
        ids[held, : rule.top_k] = ours[1].to(ids.dtype)

    def _router_edit(self, index: int) -> RouterEdit:
        edit = self._router_edits.get(index)
        if edit is None:
            edit = self._router_edits[index] = self._find_router_edit(index)
        return edit

    def _find_router_edit(self, index: int) -> RouterEdit:
        experts = self._bank.places.routers[index].experts
        table = self._bank.strengths[index, :, :experts]
        strengths = table[self._rows[0]] * self._by[0][:, None]
        for rows, by in zip(self._rows[1:], self._by[1:], strict=True):
            strengths = strengths + table[rows] * by[:, None]
        strengths = strengths.clamp(-1, 1)
        sources = sources_of(strengths)
        few = sources is not None and strengths.numel() <= FEW
        moves = tuple(_moves(row) for row in strengths.tolist()) if few else None
        return RouterEdit(strengths, Moving.by(strengths), sources, moves)

    # ------------------------------------------------------------ states

    def edit_states(self, block: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the output of a decoder layer, in place.

        Args:
            block: Which of the places.
            hidden: What is changed, [tokens, width].
            residual: What the engine adds to it later; the state of a token is their sum. None: nothing.
        """
        if self._adds:
            self._add(block, hidden)
            return
        for rows, by in zip(self._rows, self._by, strict=True):
            for slot in range(self._bank.room.slots):
                if slot % 2 == 0:
                    vectors = self._gathered(block, rows, by, slot)
                    given = self._edited_tokens(hidden)
                    self._put(hidden, given, (given + vectors).to(hidden.dtype))
                else:
                    self._project(block, rows, by, slot, hidden, residual)

    def _add(self, block: int, hidden: Tensor) -> None:
        added = self._added.get(block)
        if added is None:
            added = self._gathered(block, self._rows[0], self._by[0], 0)
            for rows, by in zip(self._rows[1:], self._by[1:], strict=True):
                added = added + self._gathered(block, rows, by, 0)
            if added.numel() <= KEPT:
                self._added[block] = added
        if self.held is None:
            hidden[: self._tokens].add_(added)
            return
        given = hidden.index_select(0, self.held)
        hidden.index_copy_(0, self.held, (given + added).to(hidden.dtype))

    def _gathered(self, block: int, rows: Tensor, by: Tensor, slot: int) -> Tensor:
        """What is added to each edited token, [n, width]: −0.0, which changes no number, where nothing is."""
        ids = self._bank.vector_ids[block, :, slot][rows].long()
        vectors = self._bank.vectors[ids]
        if bool((by != 1).any()):
            vectors = torch.where(ids[:, None] == 0, NOTHING, vectors * by[:, None])
        return vectors

    def _project(
        self, block: int, rows: Tensor, by: Tensor, slot: int, hidden: Tensor, residual: Tensor | None
    ) -> None:
        share = (self._bank.shares[block, :, slot][rows] * by)[:, None]
        if not bool(share.any()):
            return
        direction = self._bank.vectors[self._bank.vector_ids[block, :, slot][rows].long()]
        given = self._edited_tokens(hidden)
        states = given.float()
        if residual is not None:
            states = states + self._edited_tokens(residual).float()
        along = (states * direction).sum(dim=-1, keepdim=True)
        projected = given.float() - share * along * direction
        self._put(hidden, given, torch.where(share == 0, given.float(), projected).to(hidden.dtype))

    def _edited_tokens(self, tensor: Tensor) -> Tensor:
        return tensor[: self._tokens] if self.held is None else tensor.index_select(0, self.held)

    def _put(self, tensor: Tensor, given: Tensor, edited: Tensor) -> None:
        if self.held is not None:
            tensor.index_copy_(0, self.held, edited)
        elif edited is not given:
            given.copy_(edited)

    def same(self, spans: Sequence[Span], tokens: int) -> bool:
        """Whether another step's tokens follow the same rows of the same tables."""
        return tokens == self._tokens and self._version == self._bank.version and spans == self._spans


def _moves(strengths: list[float]) -> Moves:
    return (
        tuple(expert for expert, strength in enumerate(strengths) if strength > 0),
        tuple(expert for expert, strength in enumerate(strengths) if strength < 0),
    )
