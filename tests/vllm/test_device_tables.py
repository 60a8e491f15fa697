"""What goes to the device before a step, and what comes back a while after it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman.errors import SteeringNotApplied
from steersman.vllm.live import Span
from steersman.vllm.site_counts import SiteCounts
from steersman.vllm.step_table import followed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3)), max_size=6))
def test_the_table_of_who_follows_what(parts: list[tuple[int, int, int]]) -> None:
    spans, at = [], 0
    for gap, length, count in parts:
        at += gap
        spans.append(Span(at, at + length, tuple((7 + n, 0.5 + n) for n in range(count))))
        at += length
    table = followed(spans, at + 2, 3)
    slow = np.zeros((at + 2, 6), np.int32)
    for span in spans:
        for token in range(span.first, span.end):
            for n, (row, strength) in enumerate(span.follows):
                slow[token, n] = row
                slow[token, 3 + n] = np.float32(strength).view(np.int32)
    assert np.array_equal(table, slow)


def test_more_plans_than_there_is_room_for_are_an_error() -> None:
    with pytest.raises(SteeringNotApplied, match="follows 3 steerings; this engine has room for 2"):
        followed([Span(0, 1, ((1, 1.0), (2, 1.0), (3, 1.0)))], 1, 2)


def test_a_site_that_stops_running_is_seen() -> None:
    ran = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    counts = SiteCounts(ran, every=4)

    def late(steps: int, runs: list[int]) -> set[int]:
        found: set[int] = set()
        for _ in range(steps):
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            found.update(counts.step())
            ran.add_(torch.tensor(runs, dtype=torch.int32, device=DEVICE))
        return found

    assert late(12, [1, 1]) == set()
    assert late(12, [1, 0]) == {1}
