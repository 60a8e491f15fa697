"""What a worker knows where its model runs on a GPU: steps are laid out on the host, and edited by kernels.

A step's table of who follows what is copied to the device only when it has changed, only as far as tokens
are or were steered, and without waiting. That every site runs is seen from the kernels' own counts, which
come back a while later, without waiting either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steersman.errors import SteeringNotApplied
from steersman.vllm import kernels, routing_kernel
from steersman.vllm.bank import Bank
from steersman.vllm.live import Span
from steersman.vllm.site_counts import SiteCounts
from steersman.vllm.step_table import followed
from steersman.vllm.worker_state import WorkerState


class DeviceState(WorkerState):
    """See the module's text."""

    def __init__(self, bank: Bank, layers: frozenset[int]) -> None:
        super().__init__(bank, layers)
        self._rules = routing_kernel.rule_table(bank)
        self._spans: Sequence[Span] = ()
        self._reach = 0
        """Tokens of the table on the device that may be other than zero."""
        self._counts = SiteCounts(bank.ran)

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
