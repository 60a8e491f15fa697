"""Which role each token of an engine's step has, from positions alone.

A request's prompt has P tokens, at positions 0 to P − 1; of them the last is the one that produces the
first token of the answer. What the engine schedules is a run of positions: a chunk of a prompt, one
generated token, or, after a preemption, generated tokens once more. A position's role never changes, so
chunks, preemption, recomputation and drafts that are verified need no case of their own.
"""

from __future__ import annotations

from steersman.edits import ROLES

PROMPT, LAST, GENERATED = range(len(ROLES))
Run = tuple[int, int, int]
"""(first, one past the last, role)"""


def role_runs(first: int, end: int, prompt_length: int) -> list[Run]:
    """The positions first … end − 1 of a request as runs of one role each, in order.

    Args:
        first: The first position.
        end: One past the last.
        prompt_length: P, at least 1.
    """
    last = prompt_length - 1
    bounds = ((0, last, PROMPT), (last, prompt_length, LAST), (prompt_length, end, GENERATED))
    clipped = ((max(first, low), min(end, high), role) for low, high, role in bounds)
    return [run for run in clipped if run[0] < run[1]]
