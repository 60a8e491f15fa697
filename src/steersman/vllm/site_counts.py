"""Whether every site of the model runs, seen from its kernels' own counts without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

EVERY = 64
"""Steps from one look to the next."""


class SiteCounts:
    """Looks, now and then, whether every site has run since the last look.

    Args:
        ran: int32 [sites], how often each has run, where the model runs.
        every: Steps from one look to the next.
    """

    def __init__(self, ran: Tensor, every: int = EVERY) -> None:
        self._ran = ran
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
