"""Requests that come one by one, answered in batches: one batch at a time, each wholly in one thread."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import anyio
import anyio.to_thread

Request = TypeVar("Request")
Answer = TypeVar("Answer")

PATIENCE = 0.1
"""Seconds without a new request after which a batch is not waited for any longer."""


@dataclass(eq=False)
class _Waiting(Generic[Request, Answer]):
    request: Request
    kind: Hashable
    answers: tuple[Answer, ...] = ()
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return bool(self.answers) or self.error is not None


class Batcher(Generic[Request, Answer]):
    """Answers requests of one kind together.

    Args:
        answer: Answers a batch, in its order; run in a worker thread, never twice at once.
        size: Requests in a batch at most.
        kind: Requests of one kind may share a batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Request]], Sequence[Answer]],
        size: int,
        kind: Callable[[Request], Hashable],
    ) -> None:
        self._answer = answer
        self._size = size
        self._kind = kind
        self._queue: list[_Waiting[Request, Answer]] = []
        self._turn = anyio.Lock()

    async def ask(self, request: Request) -> Answer:
        """The answer to a request, after its batch's turn. Raises what answering the batch raised."""
        own: _Waiting[Request, Answer] = _Waiting(request, self._kind(request))
        self._queue.append(own)
        try:
            async with self._turn:
                # The first to have the turn answers for all of its batch, who find it done.
                if not own.done:
                    await self._gathered(own.kind)
                    await self._answer_batch(own)
        finally:
            if own in self._queue:  # given up while it waited
                self._queue.remove(own)
        if own.error is not None:
            raise own.error
        return own.answers[0]

    async def _gathered(self, kind: Hashable) -> None:
        """Wait while requests of a kind still come in."""
        before = -1
        while before < (now := sum(other.kind == kind for other in self._queue)) < self._size:
            before = now
            await anyio.sleep(PATIENCE)

    async def _answer_batch(self, own: _Waiting[Request, Answer]) -> None:
        others = [other for other in self._queue if other.kind == own.kind and other is not own]
        batch = [own, *others][: self._size]
        self._queue = [other for other in self._queue if other not in batch]
        try:
            answers = await anyio.to_thread.run_sync(self._answer, [each.request for each in batch])
            for each, answer in zip(batch, answers, strict=True):
                each.answers = (answer,)
        except Exception as error:
            for each in batch:
                each.error = error
        except BaseException:  # cancelled: the others' turn comes again
            self._queue = [*(each for each in batch if each is not own), *self._queue]
            raise
