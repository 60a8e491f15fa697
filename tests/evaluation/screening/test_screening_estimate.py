"""Estimates: first order in what experts give, and near to exact effects in the lab."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from every_family import routers, shared, tiny
from screened import readings, sites_of, vocabulary
from steersman.evaluation.arms import Subject
from steersman.evaluation.screening.estimate import estimates
from steersman.evaluation.screening.exact import Edit, Floats, instrument
from steersman.evaluation.screening.expert_calls import CannotEstimate
from steersman.evaluation.screening.texts import preferences
from steersman.evaluation.tasks import load_task
from steersman.lab.tokenizer import build_tokenizer


def both(
    model: torch.nn.Module, edits: dict[int, list[Edit]], name: str = "fork"
) -> tuple[dict[int, Floats], dict[int, Floats]]:
    """Estimated and exact changes, by layer."""
    with instrument(model, build_tokenizer(), sites_of(model)) as tool:
        (batch,) = tool.batches(readings(vocabulary(model))[name])
        values, found = estimates(tool, batch, edits)
        base = tool.base(batch)
        np.testing.assert_allclose(values, base.values, atol=1e-4)
        exact = {
            layer: tool.singles(batch, base, of_layer) - base.values for layer, of_layer in edits.items()
        }
    return found, exact


@pytest.mark.parametrize(("name", "size"), [("gpt_oss", 0.01), ("qwen3_moe", 0.05), ("deepseek_v3", 0.05)])
def test_small_experts_change_what_is_estimated(name: str, size: float) -> None:
    """To first order: where experts add little to the stream, estimates are exact effects."""
    model = tiny(name, seed=3)
    with torch.no_grad():
        for block, _ in routers(model).values():
            for tensor in block.experts.parameters():
                tensor.mul_(size)
    edits = {
        layer: [(layer, expert, strength) for strength in (-1.0, 1.0) for expert in (0, 2, 3)]
        for layer in routers(model)
    }
    found, exact = both(model, edits, "whole")
    for layer in edits:
        largest = np.abs(exact[layer]).max()
        assert largest > 1e-4
        assert np.abs(found[layer] - exact[layer]).max() < 0.1 * largest


def test_estimates_beside_a_plan_are_those_of_experts_that_join_it() -> None:
    """Small experts, so that estimates are exact; an expert of the plan's layers and of others joins."""
    model = tiny("qwen3_moe", seed=3)
    with torch.no_grad():
        for block, _ in routers(model).values():
            for tensor in block.experts.parameters():
                tensor.mul_(0.2)
    plan: tuple[Edit, ...] = ((0, 1, 1.0), (1, 2, -1.0))
    edits: dict[int, list[Edit]] = {layer: [(layer, 0, -1.0), (layer, 3, 1.0)] for layer in (0, 1, 2)}
    with instrument(model, build_tokenizer(), sites_of(model)) as tool:
        (batch,) = tool.batches(readings(vocabulary(model))["whole"])
        values, found = estimates(tool, batch, edits, plan)
        base, plain = tool.base(batch, plan), tool.base(batch)
        np.testing.assert_allclose(values, base.values, atol=1e-4)
        assert np.abs(base.values - plain.values).max() > 3e-4
        for layer in edits:
            exact = tool.singles(batch, base, edits[layer]) - base.values
            assert np.abs(found[layer] - exact).max() < 0.1 * np.abs(exact).max()


def test_shared_experts_are_not_run_for_every_edit() -> None:
    """And where a block does without them, its router says the same."""
    model = shared("deepseek_v3")
    block = next(site.block for site in sites_of(model))
    runs: list[int] = []
    handle = block.shared_experts.register_forward_hook(lambda *_: runs.append(1))
    try:
        with instrument(model, build_tokenizer(), sites_of(model)) as tool:
            (batch,) = tool.batches(readings(vocabulary(model))["fork"])
            (layer,) = [n for n, site in tool.sites.items() if site.block is block]
            estimates(tool, batch, {layer: [(layer, expert, 1.0) for expert in range(4)]})
    finally:
        handle.remove()
    assert len(runs) <= 3  # forward, again for the gradient, and to compare


@pytest.mark.parametrize(
    ("name", "reason"), [("llama4_text", "not given"), ("jetmoe", "module of their own")]
)
def test_experts_that_cannot_be_called_one_by_one_are_said(name: str, reason: str) -> None:
    model = shared(name)
    with instrument(model, build_tokenizer(), sites_of(model)) as tool:
        (batch,) = tool.batches(readings(vocabulary(model))["fork"])
        with pytest.raises(CannotEstimate, match=reason):
            estimates(tool, batch, {0: [(0, 1, 1.0)]})
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("behaviour", ["faithfulness", "refusal"])
def test_estimates_rank_experts_as_exact_effects_do(subject: Subject, behaviour: str) -> None:
    model, tokenizer = subject.model, subject.tokenizer
    reading = preferences(load_task(f"lab:{behaviour}/train", limit=6), tokenizer)
    edits = {
        layer: [(layer, expert, strength) for strength in (-1.0, 1.0) for expert in range(0, 32, 3)]
        for layer in range(4)
    }
    with instrument(model, tokenizer, sites_of(model), batch_size=256) as tool:
        (batch,) = tool.batches(reading)
        _, found = estimates(tool, batch, edits)
        base = tool.base(batch)
        exact = {layer: tool.singles(batch, base, edits[layer]) - base.values for layer in edits}
    for half in (slice(0, 11), slice(11, 22)):
        near, far = (
            np.concatenate([values[layer][half].mean(axis=1) for layer in edits]) for values in (found, exact)
        )
        assert spearmanr(near, far).statistic > 0.9
