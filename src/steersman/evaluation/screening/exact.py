"""Exact effects: what texts score when one expert more is steered, many experts in the rows of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from steersman.edits import Scope
from steersman.errors import PairsError
from steersman.evaluation.screening.room import Room
from steersman.evaluation.screening.texts import Batch, Reading, batches_of
from steersman.experts.fixed_edits import FixedEdits, fixed_edits
from steersman.experts.recording import recording
from steersman.experts.router_tables import TokenEdit, token_edit
from steersman.limits import Router, broken_limit
from steersman.models.architecture import RouterSite
from steersman.models.reading import evaluating, input_device
from steersman.models.replay import (
    EVERYTHING,
    Anatomy,
    CannotCut,
    Cuts,
    Recording,
    positions_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Edit = tuple[int, int, float]
"""(layer, expert, λ)"""
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
WAYS = (Cuts(), Cuts(columns=False), Cuts(children=False, columns=False), EVERYTHING)
"""From the one that leaves out most to a whole forward."""


@dataclass(frozen=True)
class Base:
    """A batch under the experts steered so far: its values [rows], and what its forward gave on the way."""

    plan: tuple[Edit, ...]
    values: Floats
    recorded: Recording
    chosen: Mapping[int, Tensor]
    """Layer → the ids of the chosen experts, [rows, columns, k]."""


class Instrument:
    """Scores texts of a model under edits of its routers. Use `instrument` to open one."""

    has_gradients = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sites: Sequence[RouterSite],
        edits: FixedEdits,
        *,
        scope: Scope,
        batch_size: int,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sites = {site.facts.layer: site for site in sites}
        self.edits = edits
        self.scope = scope
        self.batch_size = batch_size
        self.device = input_device(model)
        self.anatomy = Anatomy(model, list(sites))
        self.cuts: dict[tuple[int, bool], Cuts] = {}
        """What is left out of forwards from a layer on, by whether one column is read or several; filled when
        a layer is first screened."""
        self.room: Room | None = Room.of(model)
        self.rows_run = 0
        """Texts that went through a forward so far, whole or not."""

    def batches(self, reading: Reading, size: int | None = None) -> list[Batch]:
        """The texts of a reading. Raises PairsError where the scope holds no token of them."""
        most = size or self.batch_size
        found = batches_of(reading, most, self.tokenizer, self.scope, self.device, self.room)
        if not any(bool(batch.in_scope.any()) for batch in found):
            raise PairsError(
                f"{reading.name}: the scope {self.scope} holds no token that is read before d; "
                'right is scope="all", "prompt" or "answer" (--scope)'
            )
        return found

    @contextmanager
    def steered(self, batch: Batch, plan: Sequence[Edit]) -> Iterator[None]:
        """While open, whole forwards of a batch run under a plan."""
        tables = self._table(plan)
        edits = {layer: table.edit(batch.in_scope, self.sites[layer]) for layer, table in tables.items()}
        with self.edits.given(edits):
            yield

    @torch.no_grad()
    def base(self, batch: Batch, plan: tuple[Edit, ...] = ()) -> Base:
        """Run a batch whole, and take notes."""
        chosen: dict[int, Tensor] = {}
        local = [site for site in self.sites.values() if changes_only_users(site.facts)]

        def collect(number: int, ids: Tensor) -> None:
            chosen[local[number].facts.layer] = ids.view(batch.rows, batch.columns, -1)

        rows = torch.arange(batch.rows, device=self.device)
        with self.anatomy.recording() as recorded, recording(local, collect):
            values = self._run(batch, rows, self._table(plan), None)
        return Base(plan, values, recorded, chosen)

    @torch.no_grad()
    def singles(self, batch: Batch, base: Base, edits: Sequence[Edit]) -> Floats:
        """The batch's values when each edit joins the base's plan alone, float64 [edits, rows].

        All are of one layer.
        """
        found = np.repeat(base.values[None], len(edits), axis=0)
        if not edits:
            return found
        layer = edits[0][0]
        cuts = self._cuts_of(layer, batch, base)
        number, row = self._changed(batch, base, edits).nonzero()
        columns = batch.keep if self.anatomy.short(layer, cuts) else batch.columns
        size = self._at_once(batch, columns)
        for start in range(0, len(number), size):
            chunk = slice(start, start + size)
            found[number[chunk], row[chunk]] = self._replay(
                batch, base, layer, cuts, [edits[n] for n in number[chunk]], row[chunk]
            )
        return found

    @torch.no_grad()
    def subsets(self, batch: Batch, rows: Integers, plans: Mapping[int, Tensor]) -> Floats:
        """Values of some rows of a batch, each under strengths of its own: {layer: [n, experts]}."""
        found = np.zeros(len(rows))
        size = self._at_once(batch, batch.columns)
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            chosen = torch.from_numpy(rows[chunk]).to(self.device)
            tables = {
                layer: _Rows(torch.cat([values.new_zeros(1, values.shape[1]), values[chunk]]), None)
                for layer, values in plans.items()
            }
            found[chunk] = self._run(batch, chosen, tables, None)
        return found

    @torch.no_grad()
    def sets(
        self,
        batch: Batch,
        base: Base,
        plans: Sequence[Sequence[Edit]],
        advance: Callable[[int], object] = lambda _: None,
    ) -> Floats:
        """The batch's values under each of several plans, float64 [plans, rows]; `advance` is told how many
        more there are.

        `base` is the batch's unsteered: plans begin at their first edited layer, those of one layer together.
        """
        found = np.repeat(base.values[None], len(plans), axis=0)
        by_layer: dict[int, list[int]] = {}
        for number, plan in enumerate(plans):
            if plan:
                by_layer.setdefault(min(layer for layer, *_ in plan), []).append(number)
        for layer, numbers in sorted(by_layer.items()):
            cuts = self._cuts_of(layer, batch, base)
            pairs = [(number, row) for number in numbers for row in range(batch.rows)]
            size = self._at_once(batch, batch.keep if self.anatomy.short(layer, cuts) else batch.columns)
            for start in range(0, len(pairs), size):
                some = pairs[start : start + size]
                rows = np.array([row for _, row in some])
                values = self._under(batch, base, layer, cuts, [plans[number] for number, _ in some], rows)
                for (number, row), value in zip(some, values, strict=True):
                    found[number, row] = value
                advance(len(some))
        return found

    def _at_once(self, batch: Batch, columns: int) -> int:
        """Rows of one forward: as many as fit, and tokens as in a whole batch at most."""
        most = max(1, self.batch_size * batch.columns // columns)
        return most if self.room is None else min(most, self.room.at_once(columns, batch.keep))

    # ------------------------------------------------------------ one forward

    def _run(
        self,
        batch: Batch,
        rows: Tensor,
        tables: Mapping[int, _Rows],
        cut: tuple[int, Cuts] | None,
    ) -> Floats:
        self.rows_run += len(rows)
        short = cut is not None and self.anatomy.short(*cut)
        trims = cut is not None and self.anatomy.trims_last(*cut)
        taken = slice(-batch.keep, None) if short else slice(None)
        in_scope = batch.in_scope[rows]
        edits: dict[int, TokenEdit] = {}
        for layer, table in tables.items():
            trimmed = short or (trims and layer == self.anatomy.last)
            held = in_scope[:, -batch.keep :] if trimmed else in_scope
            edits[layer] = table.edit(held, self.sites[layer])
        ids, mask = batch.ids[rows], batch.mask[rows]
        positions = positions_of(mask)
        with self.edits.given(edits):
            logits = self.anatomy.forward(ids[:, taken], mask[:, taken], positions[:, taken], batch.keep)
        return batch.values(logits, rows.to(logits.device)).cpu().numpy()

    def _table(self, plan: Sequence[Edit]) -> dict[int, _Rows]:
        """The same strengths for every row: table row 1; row 0 has none."""
        return {
            layer: _Rows(
                self._strengths(layer, [(), [edit for edit in plan if edit[0] == layer]]), None, same=1
            )
            for layer in {edit[0] for edit in plan}
        }

    def _strengths(self, layer: int, rows: Sequence[Sequence[Edit]]) -> Tensor:
        strengths = torch.zeros(len(rows), self.sites[layer].facts.experts)
        for row, edits in enumerate(rows):
            for _, expert, strength in edits:
                strengths[row, expert] = strength
        return strengths

    def _replay(
        self,
        batch: Batch,
        base: Base,
        layer: int,
        cuts: Cuts,
        edits: Sequence[Edit],
        rows: Integers,
    ) -> Floats:
        return self._under(batch, base, layer, cuts, [(*base.plan, edit) for edit in edits], rows)

    def _under(
        self,
        batch: Batch,
        base: Base,
        layer: int,
        cuts: Cuts,
        plans: Sequence[Sequence[Edit]],
        rows: Integers,
    ) -> Floats:
        """Values of some rows, each under a plan of its own that is the base's before `layer`."""
        distinct = list(dict.fromkeys(map(tuple, plans)))
        place = {plan: number for number, plan in enumerate(distinct, 1)}
        index = torch.tensor([place[tuple(plan)] for plan in plans])
        tables = {
            edited: _Rows(
                self._strengths(edited, [(), *([e for e in plan if e[0] == edited] for plan in distinct)]),
                index,
            )
            for edited in {edit[0] for plan in distinct for edit in plan}
            if edited >= layer or not cuts.layers
        }
        chosen = torch.from_numpy(rows).to(self.device)
        with self.anatomy.replaying(base.recorded, layer, cuts, batch.keep, chosen):
            return self._run(batch, chosen, tables, (layer, cuts))

    def _changed(self, batch: Batch, base: Base, edits: Sequence[Edit]) -> npt.NDArray[np.bool_]:
        """Which rows an edit can change, bool [edits, rows]: keeping out an expert that no token of a row
        uses changes nothing, where the others' weights do not depend on its score.
        """
        found = np.ones((len(edits), batch.rows), bool)
        ids = base.chosen.get(edits[0][0])
        if ids is None:
            return found
        held = batch.in_scope
        if edits[0][0] == self.anatomy.last:
            ids, held = ids[:, -batch.keep :], held[:, -batch.keep :]
        for number, (_, expert, strength) in enumerate(edits):
            if strength < 0:
                used = (ids == expert).any(dim=-1) & held.to(ids.device)
                found[number] = used.any(dim=-1).cpu().numpy()
        return found

    # ------------------------------------------------------------ what may be left out

    def _cuts_of(self, layer: int, batch: Batch, base: Base) -> Cuts:
        """The way that leaves out most, of those that give a whole forward's values on two rows."""
        key = (layer, batch.keep == 1)
        if key not in self.cuts:
            tried = [self._telling(layer, base.plan)] * min(2, batch.rows)
            rows = np.arange(len(tried))[::-1].copy()
            whole = self._replay(batch, base, layer, EVERYTHING, tried, rows)
            self.cuts[key] = next(
                (way for way in WAYS[:-1] if self._gives(way, layer, batch, base, tried, rows, whole)),
                EVERYTHING,
            )
        return self.cuts[key]

    def _telling(self, layer: int, plan: Sequence[Edit]) -> Edit:
        """An edit that may join a plan; to put an expert in changes more than to keep one out."""
        facts = self.sites[layer].facts
        held = {expert: strength for at, expert, strength in plan if at == layer}
        return next(
            (layer, expert, strength)
            for strength in (1.0, -1.0, 0.0)
            for expert in range(facts.experts)
            if expert not in held and broken_limit(facts, {**held, expert: strength}) is None
        )

    def _gives(
        self,
        way: Cuts,
        layer: int,
        batch: Batch,
        base: Base,
        tried: list[Edit],
        rows: Integers,
        whole: Floats,
    ) -> bool:
        # What modules keep from forward to forward must not pass for what a forward gives them.
        self._replay(batch, base, layer, EVERYTHING, tried, rows[::-1].copy())
        try:
            cut = self._replay(batch, base, layer, way, tried, rows)
        except (CannotCut, RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            return False
        dtype = next(self.model.parameters()).dtype
        tolerance = max(1e-5, 4 * torch.finfo(dtype).eps) if dtype.is_floating_point else 0.05
        return bool((np.abs(cut - whole) <= tolerance * (1 + np.abs(whole))).all())


@dataclass(frozen=True)
class _Rows:
    """Strengths of one layer, [rows, experts], of which row 0 is idle, and the row that each text follows:
    given, or the `same`, or text after text.
    """

    strengths: Tensor
    index: Tensor | None
    same: int | None = None

    def edit(self, in_scope: Tensor, site: RouterSite) -> TokenEdit:
        device = site.weight.device if site.weight.device.type != "meta" else in_scope.device
        texts = len(in_scope)
        if self.index is not None:
            row = self.index
        elif self.same is not None:
            row = torch.full((texts,), self.same)
        else:
            row = torch.arange(1, texts + 1)
        of_tokens = (in_scope * row.to(in_scope.device)[:, None]).reshape(-1).to(device)
        return token_edit(self.strengths.to(device), site.facts, of_tokens)


@contextmanager
def instrument(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[RouterSite],
    *,
    scope: Scope = "all",
    batch_size: int = 128,
) -> Iterator[Instrument]:
    """An instrument while its block is open; the model is then as it was."""
    with evaluating(model), fixed_edits(sites) as edits:
        yield Instrument(model, tokenizer, sites, edits, scope=scope, batch_size=batch_size)


def changes_only_users(router: Router) -> bool:
    """Whether keeping out an expert changes nothing for tokens that do not use it."""
    independent = "renormalised" in router.rule or router.rule.startswith(("topk-", "sigmoid-"))
    return independent and router.groups is None and not router.rule.startswith("sparsemixer")
