"""Requests that come one by one: who shares a batch, what they get, and what a failure leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import anyio
import pytest

from steersman.harnesses.batching import Batcher


class Doubling:
    """Doubles numbers and notes each batch, and in which thread; refuses 13."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.running = 0

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.running += 1
        assert self.running == 1, "two batches at once"
        self.batches.append(list(numbers))
        self.threads.add(threading.get_ident())
        try:
            if 13 in numbers:
                raise ValueError("no thirteen")
            return [2 * number for number in numbers]
        finally:
            self.running -= 1


def ask_all(numbers: Sequence[int], size: int) -> tuple[Doubling, dict[int, object]]:
    """Every number at once; odd and even ones are of different kinds."""
    doubling, found = Doubling(), dict[int, object]()
    batcher = Batcher(doubling, size, kind=lambda number: number % 2)

    async def ask(number: int) -> None:
        try:
            found[number] = await batcher.ask(number)
        except ValueError as error:
            found[number] = str(error)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for number in numbers:
                group.start_soon(ask, number)

    anyio.run(main)
    return doubling, found


def test_like_requests_share_batches_in_a_thread_of_their_own() -> None:
    doubling, found = ask_all(range(12), 4)
    assert found == {number: 2 * number for number in range(12)}
    assert sorted(number for batch in doubling.batches for number in batch) == list(range(12))
    assert all(len(batch) <= 4 and len({n % 2 for n in batch}) == 1 for batch in doubling.batches)
    assert len(doubling.batches) == 4
    assert threading.get_ident() not in doubling.threads


def test_a_failure_reaches_its_batch_and_no_other() -> None:
    _, found = ask_all([11, 13, 2, 4], 8)
    assert found == {11: "no thirteen", 13: "no thirteen", 2: 4, 4: 8}


def test_one_who_gave_up_holds_nobody_back() -> None:
    doubling = Doubling()
    batcher = Batcher(doubling, 2, kind=lambda number: 0)
    found: list[int] = []

    async def ask(number: int) -> None:
        found.append(await batcher.ask(number))

    async def main() -> None:
        async with anyio.create_task_group() as group:
            with anyio.move_on_after(0.01):
                await batcher.ask(5)
            group.start_soon(ask, 6)
            group.start_soon(ask, 7)

    anyio.run(main)
    assert sorted(found) == [12, 14]
    assert doubling.batches == [[6, 7]]


@pytest.mark.parametrize("size", [1, 3])
def test_one_request_alone_is_not_kept_waiting(size: int) -> None:
    assert ask_all([8], size)[1] == {8: 16}
