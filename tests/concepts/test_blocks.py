"""Residual edits on running models: equal to adding by hand, at the right tokens, nothing else touched."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, TextIteratorStreamer

import families as f
import ways
from steersman import (
    ArchitectureMismatch,
    ModelError,
    PlanError,
    Steering,
    SteeringNotApplied,
    WeightsMismatch,
    apply_rows,
)
from steersman.concepts.states import block_outputs
from steersman.models.architecture import decoder_config, decoder_layers
from waiting import HANGING

_SIZES = {"vocab_size": f.VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4}
DENSE: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
    "gpt_neox": {**_LLAMA, "num_key_value_heads": 4},
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
}
TUPLES = ("falcon", "bloom")
"""In every release of transformers; before 5.24 GPT-J too."""
FAMILIES = (*DENSE, "olmoe", "mixtral")
LAYER = 1
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(5))
IDS = f.token_ids(3, 6)
WIDTH = 32


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    if name not in DENSE:
        return f.tiny(name, dtype=dtype)
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **_SIZES, **DENSE[name])
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture
def model() -> nn.Module:
    return tiny("llama")


def plan_for(model: nn.Module, **options: Any) -> Steering:
    return Steering.from_vectors(model, {LAYER: VECTOR}, **{"strength": 2.0, "scope": "all", **options})


def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def by_hand(model: nn.Module, added: Tensor) -> nn.Module:
    """A copy of the model with `added` [columns, width] put on the output of the layer."""
    other = copy.deepcopy(model)

    def add(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + added, *output[1:])
        return output + added

    decoder_layers(other)[LAYER].register_forward_hook(add)
    return other


class Edited:
    """What a layer gave and what became of it, forward by forward."""

    def __init__(self) -> None:
        self.raw: list[Tensor] = []
        self.seen: list[Tensor] = []

    @property
    def positions(self) -> list[list[list[bool]]]:
        """Of each forward: which tokens [rows][columns] were changed."""
        return [(raw != seen).any(-1).tolist() for raw, seen in zip(self.raw, self.seen, strict=True)]

    @property
    def difference(self) -> Tensor:
        """seen − raw of every changed token [n, width]."""
        return torch.cat(
            [(seen - raw)[(raw != seen).any(-1)] for raw, seen in zip(self.raw, self.seen, strict=True)]
        )


@contextmanager
def watching(model: nn.Module, layer: int = LAYER) -> Iterator[Edited]:
    """Record a layer's output before and after a plan, from outside: by a forward of our own under the one
    that the plan puts in place, and by a hook around it.
    """
    module, found = decoder_layers(model)[layer], Edited()
    original = module.forward

    def state(output: Any) -> Tensor:
        return (output[0] if isinstance(output, tuple) else output).detach().clone()

    def inner(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        found.raw.append(state(output))
        return output

    module.forward = inner
    handle = module.register_forward_hook(lambda _m, _i, output: found.seen.append(state(output)))
    try:
        yield found
    finally:
        handle.remove()
        module.__dict__.pop("forward", None)


# --------------------------------------------------------------------------- equal to adding by hand


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_adding_by_hand(name: str) -> None:
    model = tiny(name)
    ids = f.token_ids(2, 7)
    added = torch.zeros(7, WIDTH)
    added[:3] = 2.0 * VECTOR  # prompts of three tokens
    expected = logits(by_hand(model, added), ids)
    with torch.no_grad():
        base = block_outputs(model, [0, 1, 2], ids.tolist())
    plan = plan_for(model, scope="prompt")
    with plan.apply(model, prompt_lengths=[3, 3]) as receipt:
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
        steered = block_outputs(model, [0, 1, 2], ids.tolist())
    assert receipt.tokens == {"block_output:1": 12}  # of two forwards
    assert torch.equal(steered[0], base[0])
    assert torch.equal(steered[1][:, 3:], base[1][:, 3:])
    assert torch.equal(steered[1][:, :3], base[1][:, :3] + 2.0 * VECTOR)
    assert not torch.equal(steered[2][:, 3:], base[2][:, 3:])  # what comes later has read what was changed


def test_layers_of_the_tuple_families_do_give_tuples() -> None:
    for name in TUPLES:
        given: list[type] = []
        model = tiny(name)
        decoder_layers(model)[0].register_forward_hook(
            lambda _m, _i, output, to=given: to.append(type(output))
        )
        logits(model)
        assert given == [tuple], name


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_0_leaves_every_bit_and_a_block_leaves_nothing(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    base, forwards = logits(model), {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    with plan_for(model, strength=0.0).apply(model) as receipt:
        assert torch.equal(logits(model), base)
    assert receipt.tokens == {"block_output:1": IDS.numel()}
    with plan_for(model).apply(model):
        assert not torch.equal(logits(model), base)
    assert torch.equal(logits(model), base)
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == forwards


def test_bfloat16_is_added_to_in_float32() -> None:
    model = tiny("llama", torch.bfloat16)
    plan = plan_for(model, strength=0.3)
    with watching(model) as found, plan.apply(model):
        logits(model)
    assert torch.equal(found.seen[0], (found.raw[0].float() + 0.3 * VECTOR).bfloat16())


def test_a_model_that_changes_its_dtype_between_forwards() -> None:
    model = tiny("llama")
    plan = plan_for(model)
    with watching(model) as found, plan.apply(model):
        logits(model)
        model.bfloat16()
        logits(model)
    assert [seen.dtype for seen in found.seen] == [torch.float32, torch.bfloat16]
    assert torch.equal(found.seen[1], (found.raw[1].float() + 2.0 * VECTOR).bfloat16())


def test_gradients_after_inference_mode_in_the_same_block() -> None:
    model = tiny("olmoe")
    plan = plan_for(model, operation="project", strength=1.0) + Steering.from_experts(model, {1: [3]})
    with plan.apply(model):
        with torch.inference_mode():
            model(IDS)
        model(IDS).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_projecting_takes_the_direction_out_of_the_tokens_in_scope() -> None:
    model, unit = tiny("olmoe"), VECTOR / VECTOR.norm()
    plan = plan_for(model, operation="project", strength=1.0, scope="answer")
    with watching(model) as found, plan.apply(model):
        logits(model)
    assert found.positions == [[[False] * 5 + [True]] * 3]
    assert (found.seen[0][:, -1] @ unit).abs().max() < 1e-5
    assert (found.raw[0][:, -1] @ unit).abs().min() > 1e-3


# --------------------------------------------------------------------------- which tokens


@pytest.mark.parametrize(
    ("scope", "prompt", "step"),
    [
        ("all", [True] * 6, True),
        ("prompt", [True] * 6, False),
        ("generated", [False] * 6, True),
        ("answer", [False] * 5 + [True], True),
    ],
)
@pytest.mark.parametrize("cache", [None, "static"])
def test_scopes_while_generating(
    model: nn.Module, scope: Any, prompt: list[bool], step: bool, cache: str | None
) -> None:
    options = {} if cache is None else {"cache_implementation": cache}
    plan = plan_for(model, scope=scope)
    with watching(model) as found, plan.apply(model) as receipt:
        model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)
    assert found.positions == [[prompt] * 3, *[[[step]] * 3] * 3]
    torch.testing.assert_close(
        found.difference, (2.0 * VECTOR).expand(len(found.difference), -1), rtol=0, atol=1e-5
    )
    assert receipt.tokens == {"block_output:1": len(found.difference)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_touched(model: nn.Module, side: str) -> None:
    mask = torch.ones_like(IDS)
    mask[0, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    plan = plan_for(model, scope="answer")
    with watching(model) as found, plan.apply(model) as receipt:
        logits(model, attention_mask=mask)
    last = [5, 5, 5] if side == "left" else [3, 5, 5]
    assert found.positions == [[[column == end for column in range(6)] for end in last]]
    assert receipt.tokens == {"block_output:1": 3}


def test_beams_and_several_answers(model: nn.Module) -> None:
    plan = plan_for(model, scope="answer")
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    with watching(model) as found, plan.apply(model) as receipt:
        model.generate(IDS, num_beams=2, do_sample=False, **options)
    changed = sum(map(sum, (row for forward in found.positions for row in forward)))
    assert receipt.tokens == {"block_output:1": changed}
    assert {len(forward) for forward in found.positions[1:]} == {6}
    with plan.apply(model) as receipt:
        model.generate(IDS, num_return_sequences=2, do_sample=True, **options)
    assert receipt.tokens == {"block_output:1": 3 * 2 * 3}


def test_a_second_turn_with_a_cache(model: nn.Module) -> None:
    cache = DynamicCache(config=model.config)
    logits(model, **{f.CACHE: cache})
    plan = plan_for(model, scope="prompt")
    with watching(model) as found, plan.apply(model) as receipt:
        logits(model, f.token_ids(3, 2, seed=9), **{f.CACHE: cache})
    assert found.positions == [[[True, True]] * 3]
    assert receipt.tokens == {"block_output:1": 6}


def test_rows_follow_their_own_plans(model: nn.Module) -> None:
    other = Steering.from_vectors(model, {LAYER: VECTOR.flip(0), 2: VECTOR}, operation="project", scope="all")
    plans = [plan_for(model), None, other]
    alone = [logits(model, IDS[row : row + 1]) for row in range(3)]
    with plans[0].apply(model):
        alone[0] = logits(model, IDS[:1])
    with other.apply(model):
        alone[2] = logits(model, IDS[2:])
    base = logits(model)
    with watching(model) as found, apply_rows(model, plans) as receipt:
        together = logits(model)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert torch.equal(together[1], base[1])
    assert [any(row) for row in found.positions[0]] == [True, False, True]
    assert receipt.tokens == {"block_output:1": 12, "block_output:2": 6}


def test_blocks_nest_and_edits_run_in_order(model: nn.Module) -> None:
    first, second = plan_for(model), plan_for(model, operation="project", strength=1.0)
    unit = VECTOR / VECTOR.norm()
    with watching(model) as found, first.apply(model), second.apply(model):
        logits(model)
    assert (found.seen[0] @ unit).abs().max() < 1e-5  # added, then taken out
    outer, inner = second.apply(model), first.apply(model)
    with watching(model) as found:
        outer.__enter__()
        inner.__enter__()
        logits(model)
        outer.__exit__(None, None, None)
        logits(model)
        inner.__exit__(None, None, None)
    torch.testing.assert_close(found.seen[0] @ unit, (2.0 * VECTOR @ unit).expand(3, 6), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.seen[1], found.raw[1] + 2.0 * VECTOR)
    composed = first + second
    with composed.apply(model):
        together = logits(model)
    with first.apply(model), second.apply(model):
        assert torch.equal(logits(model), together)


# --------------------------------------------------------------------------- both levers


def test_both_levers_in_one_plan_each_with_its_receipt() -> None:
    model = f.tiny("qwen3_moe")
    experts = Steering.from_experts(model, {LAYER: [5]}, {2: [1]})
    plan = experts + plan_for(model, scope="answer")
    with (
        watching(model) as found,
        f.watching(model, LAYER) as routed,
        plan.apply(model, receipt="changes") as receipt,
    ):
        model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert receipt.fingerprint == plan.fingerprint
    assert receipt.tokens == {"block_output:1": 3 * 3, "router:1": 3 * 8, "router:2": 3 * 8}
    assert receipt.changed is not None
    assert receipt.changed["block_output:1"] == len(found.difference) == 9
    assert 0 < receipt.changed["router:1"] <= 24
    assert all(bool(seen.has(5).all()) for seen in routed)


# --------------------------------------------------------------------------- who, and where


def test_a_plan_belongs_to_its_thread_unless_said(model: nn.Module) -> None:
    base, seen = logits(model), {}

    def run(name: str) -> None:
        with pytest.warns(UserWarning, match="unsteered in a thread"):
            seen[name] = logits(model)

    with plan_for(model).apply(model):
        logits(model)
        thread = threading.Thread(target=run, args=("other",))
        thread.start()
        thread.join()
    assert torch.equal(seen["other"], base)
    streamer = TextIteratorStreamer(ways.tokenizer(), timeout=HANGING)
    with watching(model) as found, plan_for(model).apply(model, threads="all") as receipt:
        thread = threading.Thread(
            target=model.generate, args=(IDS[:1],), kwargs={"max_new_tokens": 3, "streamer": streamer}
        )
        thread.start()
        list(streamer)
        thread.join()
    assert receipt.tokens == {"block_output:1": len(found.difference)} == {"block_output:1": 8}


def test_other_models_are_refused(model: nn.Module) -> None:
    plan = plan_for(model)
    torch.manual_seed(1)
    same = AutoModelForCausalLM.from_config(model.config).eval()
    with pytest.raises(WeightsMismatch), plan.apply(same):
        pass
    with plan.apply(same, match="architecture") as receipt:
        logits(same)
    assert receipt.match == "architecture"
    with pytest.raises(ArchitectureMismatch), plan.apply(tiny("gpt2")):
        pass


class Skipped(nn.Module):
    """A decoder layer that is passed by."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


def test_a_layer_that_does_not_run_raises(model: nn.Module) -> None:
    with plan_for(model).apply(model):
        kept, model.model.layers[LAYER] = model.model.layers[LAYER], Skipped()
        with pytest.raises(SteeringNotApplied, match="block_output:1"):
            logits(model)
        model.model.layers[LAYER] = kept
        logits(model)


def test_states_of_another_shape_are_refused(model: nn.Module) -> None:
    layer = decoder_layers(model)[LAYER]
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs)[:, :-1]
    with pytest.raises(SteeringNotApplied, match=r"shape \[3, 5, 32\]"), plan_for(model).apply(model):
        logits(model)


def test_a_layer_that_is_two_layers_is_refused(model: nn.Module) -> None:
    plan = plan_for(model)
    model.model.layers[2] = model.model.layers[LAYER]
    with (
        pytest.raises(PlanError, match="one module with another layer"),
        plan.apply(model, match="architecture"),
    ):
        pass


def test_a_vector_beyond_float16_is_refused() -> None:
    model = tiny("llama").half()
    plan = Steering.from_vectors(model, {LAYER: torch.full((WIDTH,), 7e4)}, scope="all")
    with pytest.raises(SteeringNotApplied, match="bfloat16 or float32"), plan.apply(model):
        logits(model)


def test_a_vector_beyond_float16_is_refused_in_compiled_code() -> None:
    torch._dynamo.reset()
    model = tiny("llama").half()
    compiled = torch.compile(model, backend=Graphs())
    plan = Steering.from_vectors(model, {LAYER: torch.full((WIDTH,), 7e4)}, scope="all")
    with pytest.raises(SteeringNotApplied, match="bfloat16 or float32"), plan.apply(compiled):
        logits(compiled)
    assert logits(compiled).isfinite().all()
    torch._dynamo.reset()


def test_a_layer_that_runs_twice_is_refused(model: nn.Module) -> None:
    layer = decoder_layers(model)[2]
    inner = layer.forward
    plan = plan_for(model)
    with plan.apply(model):
        logits(model)
        layer.forward = lambda *args, **kwargs: decoder_layers(model)[LAYER](inner(*args, **kwargs), **kwargs)
        with pytest.raises(SteeringNotApplied, match="block_output:1 runs twice"):
            logits(model)
        layer.forward = inner
    layer.forward = lambda *args, **kwargs: decoder_layers(model)[LAYER](inner(*args, **kwargs), **kwargs)
    with pytest.raises(ModelError, match="layer 1 ran twice"):
        block_outputs(model, [LAYER], IDS.tolist())


def test_hidden_states_that_a_model_gives_are_edited(model: nn.Module) -> None:
    before = hidden_states(model)
    with plan_for(model).apply(model):
        during = hidden_states(model)
    assert torch.equal(during[LAYER], before[LAYER])
    torch.testing.assert_close(during[LAYER + 1], before[LAYER + 1] + 2.0 * VECTOR, rtol=0, atol=1e-6)
    assert all(map(torch.equal, hidden_states(model), before))


def hidden_states(model: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found: tuple[Tensor, ...] = model(IDS, output_hidden_states=True).hidden_states
    return found


def test_two_plans_in_two_threads(model: nn.Module) -> None:
    plans = [plan_for(model, strength=strength, scope="answer") for strength in (3.0, -3.0)]
    expected = [generated(model, plan) for plan in plans]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def run(number: int) -> None:
        found[number] += [generated(model, plans[number]) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(*expected)
    for number, logits_of in found.items():
        assert len(logits_of) == 4
        assert all(torch.equal(each, expected[number]) for each in logits_of)


def generated(model: Any, plan: Steering) -> Tensor:
    """The scores of each step under a plan, [steps, rows, vocabulary]."""
    with plan.apply(model) as receipt:
        output = model.generate(
            IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert receipt.tokens == {"block_output:1": 9}
    return torch.stack(output.logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autocast(name: str) -> None:
    model = tiny(name)
    with torch.autocast("cpu", torch.bfloat16):
        with watching(model) as found, plan_for(model, scope="answer").apply(model):
            logits(model)
        states = block_outputs(model, [LAYER], IDS.tolist())[LAYER]
    assert found.positions == [[[False] * 5 + [True]] * 3]
    expected = (found.raw[0][:, -1].float() + 2.0 * VECTOR).to(found.raw[0].dtype)
    assert torch.equal(found.seen[0][:, -1], expected)
    assert torch.equal(states, found.raw[0])


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_offloaded_layers(place: str, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    plan = plan_for(model, scope="answer")
    with plan.apply(model):
        expected = logits(model)
    if place == "memory":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    with plan.apply(model, match="architecture") as receipt:
        assert torch.equal(logits(model), expected)
    assert receipt.tokens == {"block_output:1": 3}


# --------------------------------------------------------------------------- compiled


class Graphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        self.made += 1
        return graph.forward


@pytest.mark.parametrize(
    ("name", "way"), [("llama", "model"), ("llama", "layers"), ("olmoe", "in place"), ("olmoe", "layers")]
)
def test_compiled_models(name: str, way: str) -> None:
    torch._dynamo.reset()
    model, graphs = tiny(name), Graphs()
    add = plan_for(model)
    others = (plan_for(model, strength=-1.0, scope="answer"), plan_for(model, strength=0.5))
    project = plan_for(model, operation="project", strength=1.0)
    expected: dict[int, Tensor] = {}
    for number, plan in enumerate((add, *others, project, add + project)):
        with plan.apply(model):
            expected[number] = logits(model)
    base, compiled = logits(model), model
    if way == "model":
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
    elif way == "in place":
        model.compile(fullgraph=True, backend=graphs)
    else:
        for layer in decoder_layers(model):
            layer.compile(fullgraph=True, backend=graphs)
    torch.testing.assert_close(logits(compiled), base, rtol=0, atol=1e-5)
    made = []
    for number, plan in enumerate((add, *others, project, add + project, add)):
        with plan.apply(compiled) as receipt:
            found = logits(compiled)
        torch.testing.assert_close(found, expected[number % 5], rtol=0, atol=1e-5)
        assert receipt.tokens["block_output:1"] in (3, 18)
        made.append(graphs.made)
    assert made[0] == made[1] == made[2]  # later plans of this form need no code of their own
    torch.testing.assert_close(logits(compiled), base, rtol=0, atol=1e-5)
    read, plain = (block_outputs(each, [LAYER], IDS.tolist())[LAYER] for each in (compiled, tiny(name)))
    torch.testing.assert_close(read, plain, rtol=0, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_generated_code(name: str) -> None:
    torch._dynamo.reset()
    model = tiny(name)
    compiled = torch.compile(model, fullgraph=True)
    logits(compiled)
    for options in (
        {},
        {"scope": "answer"},
        {"operation": "project", "strength": 1.0},
        {"strength": -1.0},
    ):
        plan = plan_for(model, **options)
        with plan.apply(model):
            expected = logits(model)
        with plan.apply(compiled) as receipt:
            torch.testing.assert_close(logits(compiled), expected, rtol=0, atol=1e-5)
        assert receipt.tokens == {"block_output:1": 3 if options.get("scope") == "answer" else 18}
    torch._dynamo.reset()


def test_vectors_changed_in_place_leave_a_plan_as_it_was(model: nn.Module) -> None:
    given = torch.randn(decoder_config(model).hidden_size)
    plan = Steering.from_vectors(model, {1: given}, scope="all")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        with plan.apply(model) as receipt:
            expected = model(ids).logits
        given.mul_(100)
        with plan.apply(model) as again:
            plan.edits[0].vectors[1].mul_(100)  # before the first forward, when it is laid out
            found = model(ids).logits
            plan.edits[0].vectors[1].numpy().fill(7)
            later = model(ids).logits
    assert torch.equal(found, expected)
    assert torch.equal(later, expected)
    assert plan.fingerprint == receipt.fingerprint == again.fingerprint
    with pytest.raises(TypeError):
        plan.edits[0].vectors[1] = given
