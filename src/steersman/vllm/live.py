"""The steered requests that a worker has been told of, and the tokens of a step that follow their plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

from steersman.errors import SteeringNotApplied
from steersman.vllm.bank import Bank
from steersman.vllm.read_text import prompt_length
from steersman.vllm.roles import GENERATED, role_runs
from steersman.vllm.settings import KEY

Follows = tuple[tuple[int, float], ...]
"""(row, strength) of each plan that a token follows, in order, without those that do nothing to it."""


class Span(NamedTuple):
    """Tokens first … end − 1 of a step, which follow the same plans."""

    first: int
    end: int
    follows: Follows


@dataclass(frozen=True)
class LivePlan:
    """What a running request follows: slots and strengths, and where its prompt ends."""

    slots: tuple[tuple[int, float], ...]
    prompt_length: int

    def follows(self, bank: Bank) -> tuple[Follows, ...]:
        """By role."""
        rows = [[(bank.row(slot, role), strength) for slot, strength in self.slots] for role in range(3)]
        return tuple(tuple((row, strength) for row, strength in one if row and strength) for one in rows)


class LiveRequests:
    """By request id, of those that are steered."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._plans: dict[str, tuple[LivePlan, tuple[Follows, ...]]] = {}

    def __len__(self) -> int:
        return len(self._plans)

    def add(self, request_id: str, extra_args: Mapping[str, Any] | None, prompt: Sized | None) -> None:
        """Take note of a request that the engine has scheduled for the first time, with its prompt's ids.

        Raises:
            SteeringNotApplied: in its place there is another plan than the front end means, or none; or its
                prompt has no ids.
        """
        resolved = (extra_args or {}).get(KEY)
        if resolved is None or not resolved["slots"]:
            return
        if prompt is None:
            raise SteeringNotApplied(f"request {request_id} is steered, and its prompt has no token ids")
        slots = tuple((int(slot), float(by)) for slot, by in resolved["slots"])
        for (slot, _), meant in zip(slots, resolved["plans"], strict=True):
            held = self._bank.fingerprint(slot)
            if held != meant:
                raise SteeringNotApplied(
                    f"request {request_id} follows plan {meant[:12]} in place {slot}, where this worker "
                    f"holds {'none' if held is None else held[:12]}"
                )
        plan = LivePlan(slots, prompt_length(resolved, len(prompt)))
        self._plans[request_id] = (plan, plan.follows(self._bank))

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests that have ended."""
        if self._plans:
            for request_id in request_ids:
                self._plans.pop(request_id, None)

    def spans(
        self, request_ids: Sequence[str], scheduled: Sequence[int], computed: Sequence[int]
    ) -> list[Span]:
        """The steered tokens of a step, in order.

        Args:
            request_ids: Of the step, in the order in which their tokens lie.
            scheduled: Tokens of each.
            computed: Tokens of each that were computed before: the position of its first one.
        """
        spans: list[Span] = []
        start = 0
        counts, positions = map(int, scheduled), map(int, computed)
        for request_id, count, before in zip(request_ids, counts, positions, strict=True):
            live = self._plans.get(request_id)
            if live is not None:
                plan, follows = live
                if before >= plan.prompt_length:  # nearly all of a server's steps: no need to look further
                    if follows[GENERATED]:
                        spans.append(Span(start, start + count, follows[GENERATED]))
                else:
                    shift = start - before
                    for first, end, role in role_runs(before, before + count, plan.prompt_length):
                        if follows[role]:
                            spans.append(Span(first + shift, end + shift, follows[role]))
            start += count
        return spans
