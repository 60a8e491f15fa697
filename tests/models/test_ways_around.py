"""Ways to run a model around its plans: each is refused aloud, never steered otherwise than planned."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, StoppingCriteria, StoppingCriteriaList

import families as f
from steersman import PlanError, Steering, SteeringNotApplied, WeightsMismatch, apply_rows, weights_id
from waiting import HANGING

IDS = torch.arange(3, 9)[None]


@pytest.fixture(scope="module")
def model() -> Any:
    return f.tiny("qwen3_moe")


def plan(model: nn.Module, scope: Any = "all") -> Steering:
    return Steering.from_experts(model, activate={1: [5]}, scope=scope)


class Pause(StoppingCriteria):
    """Stops a generation in its midst until it may go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.reached.set()
        assert self.go_on.wait(HANGING)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def in_thread(model: Any, pause: Pause) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            model.generate(
                IDS, max_new_tokens=6, eos_token_id=None, stopping_criteria=StoppingCriteriaList([pause])
            )
        except BaseException as error:
            errors.append(error)

    return threading.Thread(target=run), errors


def test_generate_taken_before_the_block(model: Any) -> None:
    taken = model.generate
    with plan(model, "prompt").apply(model):
        with pytest.raises(SteeringNotApplied, match=r"call model\.generate"):
            taken(IDS, max_new_tokens=3)
        model(IDS)


def test_generate_of_the_class(model: Any) -> None:
    with plan(model, "prompt").apply(model):
        with pytest.raises(SteeringNotApplied, match=r"call model\.generate"):
            type(model).generate(model, IDS, max_new_tokens=3)
        model(IDS)


def test_a_block_that_ends_while_a_thread_generates(model: Any) -> None:
    pause = Pause()
    thread, errors = in_thread(model, pause)
    block = plan(model).apply(model, threads="all")
    block.__enter__()
    thread.start()
    assert pause.reached.wait(HANGING)
    with pytest.raises(SteeringNotApplied, match="wait for the thread"):
        block.__exit__(None, None, None)
    pause.go_on.set()
    thread.join()
    assert [type(error) for error in errors] == [SteeringNotApplied]


def test_a_block_that_begins_while_a_thread_generates(model: Any) -> None:
    pause = Pause()
    thread, errors = in_thread(model, pause)
    thread.start()
    assert pause.reached.wait(HANGING)
    with plan(model, "prompt").apply(model, threads="all"):
        pause.go_on.set()
        thread.join()
        model(IDS)
    assert [type(error) for error in errors] == [SteeringNotApplied]


def test_tokens_before_the_prompt(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As prompt tuning feeds them: they would shift every role."""
    prepare = model.prepare_inputs_for_generation

    def with_virtual_tokens(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        inputs = prepare(input_ids, **kwargs)
        if kwargs.get("is_first_iteration"):
            inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :2], inputs["input_ids"]], dim=1)
            inputs["position_ids"] = None
        return inputs

    monkeypatch.setattr(model, "prepare_inputs_for_generation", with_virtual_tokens)
    with pytest.raises(SteeringNotApplied, match="8 tokens where 6"), plan(model, "prompt").apply(model):
        model.generate(IDS, max_new_tokens=3)


@pytest.mark.parametrize(("scope", "lengths"), [("generated", [6]), ("answer", [60])])
def test_a_scope_that_holds_no_token(model: Any, scope: Any, lengths: list[int]) -> None:
    with (
        pytest.raises(SteeringNotApplied, match="without a token in the scope"),
        plan(model, scope).apply(model, prompt_lengths=lengths),
    ):
        model(IDS)


def test_an_answer_that_ends_at_once_is_no_error(model: Any) -> None:
    first = int(model.generate(IDS, max_new_tokens=1, do_sample=False)[0, -1])
    with (
        pytest.warns(UserWarning, match="without a token in the scope"),
        plan(model, "generated").apply(model) as receipt,
    ):
        model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=first, pad_token_id=0)
    assert receipt.tokens == {"router:1": 0}


def test_a_cache_given_by_position(model: Any) -> None:
    cache = model(IDS, use_cache=True)[f.CACHE]
    with plan(model, "generated").apply(model, prompt_lengths=[6]) as receipt:
        model.model(IDS[:, :1], None, None, cache)
    assert receipt.tokens == {"router:1": 1}


def test_a_decoder_of_other_weights_than_the_checkpoint_it_names(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    made_for = plan(loaded)
    torch.manual_seed(7)
    foreign = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    assert weights_id(loaded) == weights_id(AutoModel.from_pretrained(tmp_path)) != weights_id(foreign)
    with pytest.raises(WeightsMismatch), made_for.apply(foreign):
        pass


def test_a_change_of_one_expert_is_noticed(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    known = weights_id(loaded)
    with torch.no_grad():
        loaded.model.layers[1].mlp.gate.weight.mul_(-3)
    assert weights_id(loaded) != known


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_a_copy_made_inside_a_block_is_a_model_of_its_own() -> None:
    model = f.tiny("olmoe")
    ids = f.token_ids(2, 5)
    plan = Steering.from_experts(model, {1: [3]}, {2: [0, 1]})
    unsteered = logits(model, ids)
    with plan.apply(model) as receipt:
        steered = logits(model, ids)
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied, ids), unsteered)
        assert torch.equal(copied.generate(ids, max_new_tokens=2)[:, :5], ids)
        with torch.no_grad():
            for parameter in copied.model.parameters():
                parameter.zero_()
        assert not torch.equal(logits(copied, ids), unsteered)
        assert torch.equal(logits(model, ids), steered)
    assert receipt.tokens == {"router:1": 20, "router:2": 20}
    assert not torch.equal(logits(copied, ids), unsteered)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss", "qwen3_moe"])
def test_autocast_entered_inside_a_block(name: str) -> None:
    model = f.tiny(name)
    ids = f.token_ids(2, 5)
    plan = Steering.from_experts(model, {1: [3]}, {2: [0, 1]})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = logits(model, ids)
        with apply_rows(model, [plan, None]):
            outside = logits(model, ids)
    with apply_rows(model, [plan, None]), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = logits(model, ids)
    assert torch.equal(inside, outside)
    assert torch.equal(inside[1], alone[1])


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
def test_a_routers_flags_changed_inside_a_block(name: str) -> None:
    model = f.tiny(name)
    ids = f.token_ids(2, 5)
    plan = Steering.from_experts(model, {1: [3]}, {2: [0, 1]})
    router = f.router_of(model, 1)
    with apply_rows(model, [plan, None]):
        logits(model, ids)
        router.norm_topk_prob = not router.norm_topk_prob
        mixed = logits(model, ids)
    assert torch.allclose(mixed[1], logits(model, ids)[1], atol=1e-5)
    router.norm_topk_prob = not router.norm_topk_prob
    assert not torch.allclose(mixed[1], logits(model, ids)[1], atol=1e-4)
    with plan.apply(model):
        logits(model, ids)
        router.top_k = 3
        with pytest.raises(SteeringNotApplied, match="did not run as known"):
            logits(model, ids)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated")
def test_a_traced_model_would_keep_its_plan(model: Any) -> None:
    ids = f.token_ids(1, 5)
    plan = Steering.from_experts(model, {1: [3]})

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.inner(given, use_cache=False).logits

    nothing = pytest.raises(SteeringNotApplied, match="without a steered forward")
    with nothing, plan.apply(model), pytest.raises(SteeringNotApplied, match="trace it outside"):
        torch.jit.trace(Logits(), (ids,), check_trace=False)


def test_a_model_called_within_its_own_forward(model: Any) -> None:
    ids = f.token_ids(1, 5)
    plan = Steering.from_experts(model, {1: [3]})
    handle = model.model.layers[0].register_forward_hook(lambda *_: logits(model, ids + 1) and None)
    try:
        nothing = pytest.raises(SteeringNotApplied, match="without a steered forward")
        with nothing, plan.apply(model), pytest.raises(SteeringNotApplied, match="within its own forward"):
            logits(model, ids)
    finally:
        handle.remove()


# Several texts in a row -------------------------------------------------------------------------------------

BLOCKS = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4))
PACKED: dict[str, dict[str, Any]] = {
    "positions": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])},
    "bounds": {"cu_seq_lens_q": torch.tensor([0, 3, 7]), "cu_seq_lens_k": torch.tensor([0, 3, 7])},
    "mask": {"attention_mask": BLOCKS.tril().bool()[None, None]},
}


@pytest.mark.parametrize("way", PACKED)
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "dense"])
def test_packed_rows(name: str, way: str) -> None:
    """Refused where roles matter; with scope `all` every token is steered, as in rows of their own."""
    model, ids = f.dense() if name == "dense" else f.tiny(name), f.token_ids(1, 7)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    for scope in ("answer", "prompt", "generated"):
        plan = Steering.from_vectors(model, {1: vector}, scope=scope)
        told = r"roles cannot be told.*scope 'all'"
        with pytest.raises(SteeringNotApplied, match=told), plan.apply(model, prompt_lengths=[3]):
            model(ids, **PACKED[way])
        with pytest.raises(SteeringNotApplied, match="packed"), apply_rows(model, [plan]), torch.no_grad():
            model(ids, **PACKED[way])
    plan = Steering.from_vectors(model, {1: vector}, scope="all")
    with plan.apply(model) as receipt, torch.no_grad():
        together = model(ids, use_cache=False, **PACKED[way]).logits
    assert receipt.tokens == {"block_output:1": 7}
    if way == "positions":  # which transformers masks by; the positions of the mask go on
        with plan.apply(model), torch.no_grad():
            alone = [model(part).logits for part in (ids[:, :3], ids[:, 3:])]
        torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_packed_rows_given_to_generate() -> None:
    model, ids = f.tiny("olmoe"), f.token_ids(1, 7)
    plan = Steering.from_experts(model, {1: [5]}, scope="answer")
    with pytest.raises(SteeringNotApplied, match="position_ids"), plan.apply(model):
        model.generate(ids, max_new_tokens=2, **PACKED["positions"])
    with plan.apply(model) as receipt:
        model.generate(ids, max_new_tokens=2, position_ids=torch.arange(7)[None])
    assert receipt.tokens == {"router:1": 2}


@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}])
def test_layers_that_are_run_again_for_gradients_are_refused(options: dict[str, int]) -> None:
    model = f.tiny("qwen3_moe")
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.23 on
    if enable is None and options:
        pytest.skip("this transformers runs all layers again or none")
    (enable or model.gradient_checkpointing_enable)(**options)
    with plan(model, "all").apply(model):  # in evaluation nothing is run again
        model(IDS)
    with pytest.raises(PlanError, match="gradient checkpointing"):
        plan(model, "all").apply(model.train()).__enter__()
