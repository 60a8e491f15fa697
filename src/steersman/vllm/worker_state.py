"""What one worker of the engine knows: its bank, its steered requests, and the edits of the step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from typing import Any

from torch import Tensor

from steersman.errors import SteeringNotApplied
from steersman.vllm.bank import Bank
from steersman.vllm.counting import Counter
from steersman.vllm.live import LiveRequests, Span
from steersman.vllm.step import Step


class WorkerState:
    """The state of a worker whose model runs on the host (on a GPU: `device_state.DeviceState`).

    Lays out each step before its forward; the operations in the graph read it.
    """

    def __init__(self, bank: Bank, layers: frozenset[int]) -> None:
        self.bank = bank
        self.layers = layers
        """The decoder layers that are in this worker."""
        self.live = LiveRequests(bank)
        self.counter: Counter | None = None
        """Where experts are counted (detection)."""
        self._step: Step | None = None
        sites = len(bank.places.routers) + len(bank.places.blocks)
        self._ran = [0] * sites
        """How often each site has run, where the host runs it."""
        self._ran_before = [0] * sites

    def begin(self, request_id: str, extra_args: Mapping[str, Any] | None, prompt: Sized | None) -> None:
        """Take note of a request that the engine has scheduled for the first time. See `LiveRequests.add`."""
        self.live.add(request_id, extra_args, prompt)
        if self.counter is not None:
            self.counter.add(request_id, extra_args)

    def finish(self, request_ids: Collection[str]) -> None:
        """Forget requests that have ended."""
        self.live.finish(request_ids)
        if self.counter is not None:
            self.counter.finish(request_ids)

    def lay_out(self, request_ids: Sequence[str], scheduled: Sequence[int], computed: Sequence[int]) -> None:
        """Prepare the edits of a step, from what the engine's runner has prepared.

        Raises:
            SteeringNotApplied: in the step before, a site did not run.
        """
        self.check_ran()
        spans = self.live.spans(request_ids, scheduled, computed) if len(self.live) else []
        self.follow(spans, int(sum(scheduled)))
        if self.counter is not None:
            self.counter.lay_out(request_ids, scheduled, computed)

    def follow(self, spans: list[Span], tokens: int) -> None:
        """Make the next forward follow these spans; none: nobody is steered."""
        self._ran_before[:] = self._ran
        if not spans:
            self._step = None
        elif self._step is None or not self._step.same(spans, tokens):
            self._step = Step(self.bank, spans, tokens)

    def check_ran(self) -> None:
        """Raise `SteeringNotApplied` where a site that the last step's plans name has not run in it."""
        if self._step is not None:
            self._check(index for index in self._step.busy if self._ran[index] == self._ran_before[index])

    def counted(self) -> list[int]:
        """How often each site has run."""
        return list(self._ran)

    def check_ran_since(self, counted: Sequence[int]) -> None:
        """Raise `SteeringNotApplied` where a site has not run since so many runs were counted."""
        pairs = zip(counted, self.counted(), strict=True)
        self._check(index for index, (before, now) in enumerate(pairs) if before == now)

    def _check(self, missing: Iterable[int]) -> None:
        names = ", ".join(map(self.site_name, missing))
        if names:
            raise SteeringNotApplied(f"planned but not run by the engine: {names}; the output is not steered")

    def site_name(self, index: int) -> str:
        """The name of a site: "router:3"."""
        routers = self.bank.places.routers
        if index < len(routers):
            return f"router:{routers[index].layer}"
        return f"block_output:{self.bank.places.blocks[index - len(routers)]}"

    # ------------------------------------------------------------ what the graph's operations do

    def edit_scores(self, scores: Tensor, site: Tensor) -> None:
        index = int(site)
        self._ran[index] += 1
        step = self._step
        if step is not None and index in step.busy:
            step.edit_scores(index, scores)

    def choose(self, scores: Tensor, weights: Tensor, ids: Tensor, site: Tensor) -> None:
        index = int(site)
        self._ran[index] += 1
        step = self._step
        if step is not None and index in step.busy:
            step.choose(index, scores, weights, ids)

    def edit_states(self, hidden: Tensor, residual: Tensor | None, site: Tensor) -> None:
        index = int(site)
        self._ran[index] += 1
        step = self._step
        if step is not None and index in step.busy:
            step.edit_states(index - len(self.bank.places.routers), hidden, residual)
