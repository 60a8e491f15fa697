"""Threads: a streamer under `threads="all"`, two plans in two threads at once, a third thread left alone."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

import families as f
import ways as w
from steersman import SteeringNotApplied
from waiting import HANGING

by_family = pytest.mark.parametrize("name", w.WAYS_FAMILIES)


def together(*works: Callable[[], None]) -> None:
    """Run each work in a thread of its own; raise what any of them raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGING)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


@by_family
def test_a_streamer(name: str) -> None:
    model: Any = f.tiny(name)
    plan = w.plan_of(model)
    ids = w.IDS[:1]
    with plan.apply(model):
        expected = w.written(model, ids)
    streamer = TextIteratorStreamer(w.tokenizer(), skip_prompt=True, timeout=HANGING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no thread runs unsteered
        with plan.apply(model, threads="all") as receipt:
            options = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "max_new_tokens": 4,
                "do_sample": False,
                "streamer": streamer,
            }
            thread = threading.Thread(target=model.generate, kwargs=options)
            thread.start()
            text = "".join(streamer)
            thread.join(HANGING)
    assert text.split() == w.tokenizer().decode(expected[0, ids.shape[1] :]).split()
    assert receipt.tokens == {f"router:{layer}": ids.numel() + 3 for layer in w.LAYERS}


@by_family
def test_two_plans_in_two_threads_and_none_in_a_third(name: str) -> None:
    model: Any = f.tiny(name)
    plans = [w.plan_of(model), w.plan_of(model).reversed()]
    alone, expected = w.logits(model), [w.steered(model, plans[0])]
    with plans[1].apply(model):
        expected.append(w.logits(model))
    assert not torch.equal(*expected)
    everyone = threading.Barrier(3)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    receipts: dict[int, Any] = {}

    def steered(number: int) -> None:
        with plans[number].apply(model) as receipts[number]:
            for _ in range(8):
                everyone.wait(HANGING)
                seen[number].append(w.logits(model))
            everyone.wait(HANGING)

    def unsteered() -> None:
        for _ in range(8):
            everyone.wait(HANGING)
            seen[2].append(w.logits(model))
        everyone.wait(HANGING)

    with pytest.warns(UserWarning, match="unsteered in a thread that has no plan"):
        together(lambda: steered(0), lambda: steered(1), unsteered)
    for number, right in enumerate([*expected, alone]):
        assert len(seen[number]) == 8
        assert all(torch.equal(output, right) for output in seen[number])
    for receipt in receipts.values():
        assert receipt.tokens == {f"router:{layer}": 8 * w.IDS.numel() for layer in w.LAYERS}
    assert torch.equal(w.logits(model), alone)


@by_family
def test_a_thread_that_outlives_the_block(name: str) -> None:
    model: Any = f.tiny(name)
    go_on, opened = threading.Event(), threading.Event()

    def late() -> None:
        opened.set()
        assert go_on.wait(HANGING)
        seen.append(w.logits(model))

    def begin() -> None:
        thread.start()
        assert opened.wait(HANGING)

    seen: list[torch.Tensor] = []
    thread = threading.Thread(target=late)
    with (
        pytest.raises(SteeringNotApplied, match="without a steered forward"),
        w.plan_of(model).apply(model, threads="all"),
    ):
        begin()
    go_on.set()
    thread.join(HANGING)
    assert torch.equal(seen[0], w.logits(f.shared(name)))  # after the block nobody is steered
