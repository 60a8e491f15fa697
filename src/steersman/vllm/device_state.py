"""What a worker knows where its model runs on a GPU: steps are laid out on the host, and edited by kernels.

A step's table of who follows what is copied to the device only when it has changed, only as far as tokens
are or were steered, and without waiting. That every site runs is seen from the kernels' own counts, which
come back a while later, without waiting either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steersman.errors import SteeringNotApplied
from steersman.vllm import kernels, routing_kernel
from steersman.vllm.bank import Bank
from steersman.vllm.live import Span
from steersman.vllm.worker_state import WorkerState

EVERY = 64
"""Steps from one look at the kernels' counts to the next."""


class DeviceState(WorkerState):
    """See the module's text."""

    def __init__(self, bank: Bank, layers: frozenset[int]) -> None:
        super().__init__(bank, layers)
        self._rules = routing_kernel.rule_table(bank)
        self._spans: Sequence[Span] = ()
        self._reach = 0
        """Tokens of the table on the device that may be other than zero."""
        self._counts = Counts(bank)

    def lay_out(self, request_ids: Sequence[str], scheduled: Sequence[int], computed: Sequence[int]) -> None:
        """Prepare the edits of a step, from what the engine's runner has prepared.

        Raises:
            SteeringNotApplied: a site has not run for a while.
        """
        self._check(self._counts.step())
        super().lay_out(request_ids, scheduled, computed)

    def follow(self, spans: list[Span], tokens: int) -> None:
        """Make the next forward follow these spans; none: nobody is steered."""
        if spans == self._spans:
            return
        end = max((span.end for span in spans), default=0)
        if end > self.bank.room.tokens:
            raise SteeringNotApplied(
                f"a step has {end} tokens; this engine said that it has {self.bank.room.tokens} at most"
            )
        reach = max(end, self._reach)
        if reach:
            table = torch.from_numpy(followed(spans, reach, self.bank.room.components))
            # Freshly pinned: the allocator hands the memory out again only after the copy has run.
            pinned = table.pin_memory() if self.bank.device.type == "cuda" else table
            self.bank.followed[:reach].copy_(pinned, non_blocking=True)
        self._spans, self._reach = list(spans), end

    def check_ran(self) -> None:
        """Not after each step, which would wait for the device: see `lay_out`."""

    def counted(self) -> list[int]:
        """How often each site has run; waits for the device."""
        return self.bank.ran.tolist()

    def edit_scores(self, scores: Tensor, site: Tensor) -> None:
        kernels.edit_scores(scores, site, self.bank, self._rules.softmax_first)

    def choose(self, scores: Tensor, weights: Tensor, ids: Tensor, site: Tensor) -> None:
        routing_kernel.choose(scores, weights, ids, site, self.bank, self._rules)

    def edit_states(self, hidden: Tensor, residual: Tensor | None, site: Tensor) -> None:
        kernels.edit_states(hidden, residual, site, self.bank)


def followed(spans: Sequence[Span], tokens: int, components: int) -> NDArray[np.int32]:
    """The bank's table `followed`, int32 [tokens, 2 · components], for some spans of tokens.

    Raises:
        SteeringNotApplied: a token follows more rows than the table holds.
    """
    table = np.zeros((tokens, 2 * components), np.int32)
    if not spans:
        return table
    ends = np.fromiter((span.end for span in spans), np.int64, len(spans))
    lengths = ends - np.fromiter((span.first for span in spans), np.int64, len(spans))
    # Token t of a span lies at end - (tokens up to the span's end) + (its number among all tokens).
    at = np.repeat(ends - np.cumsum(lengths), lengths) + np.arange(lengths.sum())
    known: dict[object, NDArray[np.int32]] = {}
    packed = []
    for span in spans:
        row = known.get(span.follows)
        if row is None:
            row = known[span.follows] = _packed(span, components)
        packed.append(row)
    table[at] = np.repeat(np.stack(packed), lengths, axis=0)
    return table


def _packed(span: Span, components: int) -> NDArray[np.int32]:
    if len(span.follows) > components:
        raise SteeringNotApplied(
            f"a request follows {len(span.follows)} steerings; this engine has room for {components}"
        )
    packed = np.zeros(2 * components, np.int32)
    for component, (row, strength) in enumerate(span.follows):
        packed[component] = row
        packed[components + component] = np.float32(strength).view(np.int32)
    return packed


class Counts:
    """Looks, now and then, whether every site has run since the last look, and never waits for it."""

    def __init__(self, bank: Bank, every: int = EVERY) -> None:
        self._ran = bank.ran
        self._every = every
        self._steps = 0
        self._before: Tensor | None = None
        self._coming: tuple[Tensor, torch.cuda.Event | None] | None = None

    def step(self) -> list[int]:
        """To be called before each forward; gives the sites that have not run between the last two looks."""
        self._steps += 1
        late: list[int] = []
        if self._coming is not None and (self._coming[1] is None or self._coming[1].query()):  # type: ignore[no-untyped-call]
            now = self._coming[0]
            if self._before is not None:
                late = (now == self._before).nonzero().flatten().tolist()
            self._before, self._coming = now, None
        if self._steps % self._every == 0 and self._coming is None:
            self._coming = self._ask()
        return late

    def _ask(self) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._ran.device.type != "cuda":
            return self._ran.clone(), None
        copy = torch.empty_like(self._ran, device="cpu", pin_memory=True)
        copy.copy_(self._ran, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return copy, event
