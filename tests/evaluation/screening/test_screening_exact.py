"""Exact effects against one separate `apply` an expert, on models of several families."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from every_family import shared
from screened import TEXTS, readings, sites_of, vocabulary
from steersman import PairsError, Steering
from steersman.edits import Scope
from steersman.evaluation.arms import Subject
from steersman.evaluation.screening import room
from steersman.evaluation.screening.exact import Edit, Instrument, instrument
from steersman.evaluation.screening.texts import Batch, Reading, preferences
from steersman.evaluation.tasks import load_task
from steersman.lab.tokenizer import build_tokenizer
from steersman.models.replay import EVERYTHING, CannotCut, Cuts
from steersman.models.scored_text import Text

# What may be left out of their forwards; llama4's blocks give states without columns.
FAMILIES = {
    "gpt_oss": {Cuts()},
    "qwen3_moe": {Cuts()},
    "mixtral": {Cuts()},
    "deepseek_v3": {Cuts()},
    "llama4_text": {Cuts(), Cuts(columns=False)},
}


def separate(model: nn.Module, text: Text, edits: tuple[Edit, ...], scope: Scope) -> float:
    """One text alone, unpadded, under a plan made by hand: the slow, obvious way."""
    activate: dict[int, list[int]] = {}
    deactivate: dict[int, list[int]] = {}
    for layer, expert, strength in edits:
        (activate if strength > 0 else deactivate).setdefault(layer, []).append(expert)
    plan = Steering.from_experts(model, activate, deactivate, scope=scope)
    with torch.no_grad(), plan.apply(model, prompt_lengths=[text.prompt_length]):
        logits = model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0]
    log_p = logits.double().log_softmax(dim=-1)
    return sum(weight * float(log_p[place, token]) for place, token, weight in text.scored)


def opened(tool: Instrument, reading: Reading) -> Batch:
    (batch,) = tool.batches(reading)
    return batch


@pytest.mark.parametrize("name", FAMILIES)
def test_many_experts_in_one_batch_are_as_each_applied_alone(name: str) -> None:
    model = shared(name)
    reading = readings(vocabulary(model))["whole"]
    with instrument(model, build_tokenizer(), sites_of(model), batch_size=5) as tool:
        batch = opened(tool, Reading(reading.name, reading.texts[:3], reading.groups[:3]))
        base = tool.base(batch)
        for layer in tool.sites:
            edits = [(layer, expert, strength) for strength in (-1.0, 1.0) for expert in (0, 3)]
            found = tool.singles(batch, base, edits)
            want = [
                [separate(model, reading.texts[text], (edit,), "all") for text in batch.texts]
                for edit in edits
            ]
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
            assert np.abs(found - base.values).max() > 1e-4  # something happened
        assert set(tool.cuts.values()) == FAMILIES[name]


@pytest.mark.parametrize("scope", ["prompt", "answer", "generated"])
def test_the_scope_is_that_of_a_plan(scope: Scope) -> None:
    model = shared("qwen3_moe")
    reading = readings(vocabulary(model))["whole"]
    with instrument(model, build_tokenizer(), sites_of(model), scope=scope, batch_size=64) as tool:
        batch = opened(tool, reading)
        base = tool.base(batch)
        for layer in (0, 2):
            edit = (layer, 2, 1.0)
            (found,) = tool.singles(batch, base, [edit])
            want = [separate(model, reading.texts[text], (edit,), scope) for text in batch.texts]
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
            assert (found != base.values).all()


def test_an_expert_beside_those_already_steered() -> None:
    model = shared("qwen3_moe")
    reading = readings(vocabulary(model))["fork"]
    plan: tuple[Edit, ...] = ((0, 1, 1.0), (1, 2, -1.0), (2, 4, 1.0))
    with instrument(model, build_tokenizer(), sites_of(model)) as tool:
        batch = opened(tool, reading)
        base = tool.base(batch, plan)
        want = [separate(model, reading.texts[text], plan, "all") for text in batch.texts]
        np.testing.assert_allclose(base.values, want, rtol=0, atol=1e-5)
        for edit in ((0, 3, -1.0), (1, 3, 1.0), (2, 0, -1.0)):
            (found,) = tool.singles(batch, base, [edit])
            want = [separate(model, reading.texts[text], (*plan, edit), "all") for text in batch.texts]
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def test_sets_of_several_layers_in_one_batch_are_as_each_applied_alone() -> None:
    model = shared("qwen3_moe")
    reading = readings(vocabulary(model))["whole"]
    plans: list[tuple[Edit, ...]] = [
        ((2, 1, 1.0),),
        (),
        ((0, 1, -1.0), (2, 1, 1.0)),
        ((2, 0, -1.0), (1, 3, 1.0)),
    ]
    with instrument(model, build_tokenizer(), sites_of(model), batch_size=2) as tool:
        batches = tool.batches(reading)
        assert len(batches) == 2
        for batch in batches:
            run: list[int] = []
            found = tool.sets(batch, tool.base(batch), plans, run.append)
            assert sum(run) == 3 * batch.rows  # all but those of the empty plan
            want = [[separate(model, reading.texts[n], plan, "all") for n in batch.texts] for plan in plans]
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def test_batches_are_sized_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With less room there are more of them, and the same numbers; one text is always run."""
    model = shared("qwen3_moe")
    reading = readings(vocabulary(model))["whole"]
    edits: list[Edit] = [(1, expert, 1.0) for expert in range(4)]

    def measured() -> tuple[int, dict[int, np.ndarray]]:
        with instrument(model, build_tokenizer(), sites_of(model)) as tool:
            batches = tool.batches(reading)
            found = [(batch, tool.singles(batch, tool.base(batch), edits)) for batch in batches]
            of_texts = {
                int(n): v for batch, values in found for n, v in zip(batch.texts, values.T, strict=True)
            }
            return len(batches), of_texts

    one, want = measured()
    monkeypatch.setattr(room, "BYTES", 1)
    three, found = measured()
    assert (one, three) == (1, 3)
    for text, values in want.items():
        np.testing.assert_allclose(found[text], values, rtol=0, atol=1e-5)


def test_experts_that_no_token_uses_are_not_run() -> None:
    """Where their score enters no weight: keeping them out changes nothing."""
    model = shared("mixtral")
    reading = readings(vocabulary(model))["fork"]
    with instrument(model, build_tokenizer(), sites_of(model)) as tool:
        batch = opened(tool, reading)
        base = tool.base(batch)
        tool.singles(batch, base, [(1, 0, 1.0)])  # the way to cut is found here
        used = base.chosen[1]
        for expert in range(4):
            before = tool.rows_run
            (found,) = tool.singles(batch, base, [(1, expert, -1.0)])
            rows = [bool((used[row][batch.in_scope[row]] == expert).any()) for row in range(batch.rows)]
            assert tool.rows_run - before == sum(rows)
            want = [separate(model, reading.texts[text], ((1, expert, -1.0),), "all") for text in batch.texts]
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def test_layers_that_cannot_be_cut_are_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that says something else to the next than its output: the cut is seen not to hold."""
    model = shared("olmoe")
    told: list[torch.Tensor] = []
    layers = model.get_decoder().layers

    def tell(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        told[:] = [output]

    def hear(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + 10 * told[0][: len(output)]

    handles = [layers[0].self_attn.o_proj.register_forward_hook(tell), layers[2].register_forward_hook(hear)]
    try:
        reading = readings(vocabulary(model))["fork"]
        with instrument(model, build_tokenizer(), sites_of(model)) as tool:
            batch = opened(tool, reading)
            base = tool.base(batch)
            (found,) = tool.singles(batch, base, [(1, 3, 1.0)])
            assert tool.cuts[1, True] == EVERYTHING
            # Padding is part of what is told: the same batch, edited as a whole.
            plans = {1: torch.eye(4).new_zeros(batch.rows, tool.sites[1].facts.experts)}
            plans[1][:, 3] = 1.0
            np.testing.assert_allclose(found, tool.subsets(batch, np.arange(batch.rows), plans), atol=1e-6)
    finally:
        for handle in handles:
            handle.remove()


def test_a_module_out_of_its_order_is_noticed() -> None:
    model = shared("olmoe")
    reading = readings(vocabulary(model))["fork"]
    with instrument(model, build_tokenizer(), sites_of(model)) as tool:
        batch = opened(tool, reading)
        base = tool.base(batch)
        base.recorded.before[1].reverse()
        rows = torch.arange(batch.rows)
        with (
            pytest.raises(CannotCut, match="ran where"),
            tool.anatomy.replaying(base.recorded, 1, Cuts(), batch.keep, rows),
        ):
            tool.anatomy.forward(batch.ids, batch.mask, batch.mask.cumsum(dim=1), batch.keep)


def test_the_model_is_left_as_it_was() -> None:
    model = shared("olmoe")
    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    with instrument(model, build_tokenizer(), sites_of(model)) as tool:
        batch = opened(tool, readings(vocabulary(model))["fork"])
        tool.singles(batch, tool.base(batch), [(0, 1, 1.0)])
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_d_is_that_of_evaluations(subject: Subject) -> None:
    task = load_task("lab:faithfulness/train", limit=8)
    plan = Steering.from_experts(subject.model, activate={0: [1]})
    forks = subject.forks(task)
    with instrument(subject.model, subject.tokenizer, sites_of(subject.model)) as tool:
        batch = opened(tool, preferences(task, subject.tokenizer))
        base = tool.base(batch)
        (steered,) = tool.singles(batch, base, [(0, 1, 1.0)])
    np.testing.assert_allclose(base.values, subject.preference(forks)[batch.texts], atol=1e-5)
    np.testing.assert_allclose(steered, subject.preference(forks, plan)[batch.texts], atol=1e-5)


def test_a_scope_that_holds_nothing_is_an_error() -> None:
    model = shared("olmoe")
    reading = readings(vocabulary(model))["fork"]
    texts = tuple(Text(t.item, t.ids, len(t.ids), t.scored) for t in reading.texts)
    with (
        instrument(model, build_tokenizer(), sites_of(model), scope="generated") as tool,
        pytest.raises(PairsError, match="generated holds no token"),
    ):
        tool.batches(Reading("t", texts, reading.groups))
