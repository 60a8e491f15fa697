"""Many plans as rows of one batch against each plan applied to each text alone, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import every_dense as d
import every_family as e
from steersman import PlanError, Steering, lab, load_task
from steersman.edits import Scope
from steersman.errors import ModelError
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.screening.texts import preferences
from steersman.evaluation.tuning.costs import CostBound, Kept, read_bounds
from steersman.evaluation.tuning.effects import LogOdds
from steersman.lab.tokenizer import build_tokenizer
from steersman.models.architecture import decoder_layers, find_routers
from steersman.models.plan_rows import Floats, PlanRows
from steersman.models.scored_text import Text

TOLERANCE = 2e-5
"""Nats, on tiny models in float32."""
SHORT = ("llama", "qwen3", "gemma2", "gpt2", "gpt_oss", "qwen3_moe", "mixtral", "deepseek_v3", "olmoe")
"""Seen to be computed from the edited layer on after cached prompts."""
LONG = ("mamba", "recurrent_gemma", "jamba", "gemma3", "qwen3_vl_moe", "openai-gpt")
"""Those with recurrent states, or positions that are kept between forwards: whole forwards after a prompt."""
REFUSED = {
    "doge": "its own forward gives other logits where a row is padded",
    "llama4": "transformers does not run it",
}
OTHERS = tuple(
    name for name in dict.fromkeys(e.MODEL_TYPES + d.MODEL_TYPES) if name not in {*SHORT, *LONG, *REFUSED}
)
LENGTHS = ((4, 3), (9, 2), (6, 5), (14, 3), (3, 1), (5, 0), (11, 0))
"""Of prompts and answers; without an answer two tokens are compared at the prompt's last place."""


def texts_of(size: int) -> list[Text]:
    found, draw = [], np.random.default_rng(0)
    for number, (prompt, answer) in enumerate(LENGTHS):
        ids = tuple(draw.integers(5, size, prompt + answer).tolist())
        if answer:
            scored = tuple((place - 1, ids[place], 1.0) for place in range(prompt, len(ids)))
            found.append(Text(number, ids[:-1], prompt, scored))
        else:
            two = ((prompt - 1, size - 1, 1.0), (prompt - 1, size - 2, -1.0))
            found.append(Text(number, ids, prompt, two))
    return found


def plans_of(model: nn.Module, scope: Scope) -> list[Steering | None]:
    """Vectors at the first and last layers, experts at the last router; None: unsteered."""
    last = len(decoder_layers(model)) - 1
    draw = torch.Generator().manual_seed(0)
    found: list[Steering | None] = [None]
    for layers in ((last,), (0,), (last - 1, last)):
        vectors = {layer: torch.randn(e.WIDTH, generator=draw) for layer in layers}
        try:
            found.append(Steering.from_vectors(model, vectors, strength=2.0, scope=scope))
        except PlanError:  # several streams, or a layer that runs twice
            continue
    sites = [site.facts.layer for site in find_routers(model) if site.facts.reason is None]
    found += [Steering.from_experts(model, {at: [1]}, {at: [2]}, scope=scope) for at in sites[-1:]]
    return found


def logits_of(model: nn.Module, text: Text, plan: Steering | None) -> torch.Tensor:
    """One text alone, unpadded: the slow, obvious way."""
    ids = torch.tensor([text.ids])
    nothing = plan is None or (plan.edits[0].scope == "generated" and len(text.ids) == text.prompt_length)
    with torch.no_grad():
        if nothing or plan is None:
            return model(input_ids=ids, use_cache=False).logits[0].double()
        with plan.apply(model, prompt_lengths=[text.prompt_length]):
            return model(input_ids=ids, use_cache=False).logits[0].double()


def separately(model: nn.Module, texts: list[Text], plans: list[Steering | None]) -> Floats:
    """Scores, divergences and greedy ones: [3, plans, texts]."""
    found = np.zeros((3, len(plans), len(texts)))
    for column, text in enumerate(texts):
        base = logits_of(model, text, None).log_softmax(-1)
        places = [place for place, *_ in text.scored]
        for row, plan in enumerate(plans):
            own = logits_of(model, text, plan).log_softmax(-1)
            found[0, row, column] = sum(weight * float(own[at, token]) for at, token, weight in text.scored)
            found[1, row, column] = float((own.exp() * (own - base)).sum(-1)[places].mean())
            found[2, row, column] = all(int(own[at].argmax()) == token for at, token, _ in text.scored)
    return found


def in_rows(rows: PlanRows, texts: list[Text], plans: list[Steering | None]) -> Floats:
    return np.stack([rows.scores(texts, plans), rows.divergences(texts, plans), rows.greedy(texts, plans)])


@pytest.mark.parametrize("name", [*SHORT, *LONG, *(pytest.param(n, marks=pytest.mark.long) for n in OTHERS)])
def test_rows_are_as_each_plan_alone(name: str) -> None:
    if not e.known(name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = e.shared(name) if name in e.MODEL_TYPES else d.tiny(name)
    size = e.VOCABULARY if name == "mllama" else model.get_input_embeddings().num_embeddings
    texts = texts_of(size)
    before = logits_of(model, texts[0], None)
    # What spares prompts is computed after a cache of them, the rest without one.
    for scopes in (("answer", "generated"), ("all", "prompt")):
        plans = [plan for scope in scopes for plan in plans_of(model, scope)]
        rows = PlanRows(model, build_tokenizer())
        want, found = separately(model, texts, plans), in_rows(rows, texts, plans)
        np.testing.assert_allclose(found[:2], want[:2], rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(found[2], want[2])
        if steered := [row for row, plan in enumerate(plans) if plan is not None]:
            assert np.abs(want[0, steered] - want[0, 0]).max() > 1e-3  # something happened
        if name in SHORT:
            assert rows.ways
            assert all(rows.ways.values())
        if name in LONG and scopes[0] == "answer":
            assert not any(rows.ways.values())
    assert torch.equal(logits_of(model, texts[0], None), before)
    for module in model.modules():
        assert not module._forward_hooks, type(module)
        assert not module._forward_pre_hooks, type(module)
        assert "forward" not in vars(module), type(module)


def test_scopes_and_first_layers_may_differ_in_one_call() -> None:
    model = e.shared("qwen3_moe")
    texts = texts_of(e.VOCABULARY)
    plans = [plan for scope in ("answer", "all", "generated", "prompt") for plan in plans_of(model, scope)]
    found = in_rows(PlanRows(model, build_tokenizer()), texts, plans)
    np.testing.assert_allclose(found, separately(model, texts, plans), rtol=0, atol=TOLERANCE)


def test_less_room_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches, few rows at once, nothing kept for the next plans."""
    from steersman.models import plan_rows

    model = e.shared("qwen3_moe")
    texts, plans = texts_of(e.VOCABULARY), plans_of(model, "answer")
    want = in_rows(PlanRows(model, build_tokenizer()), texts, plans)
    for name, value in (("_TOKENS", 30), ("_CACHE_BYTES", 1), ("_LOGITS_BYTES", 1), ("KEPT_BYTES", 0)):
        monkeypatch.setattr(plan_rows, name, value)
    rows = PlanRows(model, build_tokenizer())
    np.testing.assert_allclose(in_rows(rows, texts, plans), want, rtol=0, atol=TOLERANCE)
    assert all(rows.ways.values())


def test_a_way_that_is_wrong_for_one_text_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen3-VL's, whose positions after a cache were wrong for rows in the middle of a batch alone."""
    from steersman.models.plan_rows import _Batch

    after = _Batch._after

    def wrong(batch: _Batch, cache: object) -> torch.Tensor:
        found = after(batch, cache)
        found[len(batch.texts) // 2] += torch.randn(found.shape[-1])
        return found

    model = e.shared("qwen3_moe")
    texts, plans = texts_of(e.VOCABULARY), plans_of(model, "answer")
    monkeypatch.setattr(_Batch, "_after", wrong)
    rows = PlanRows(model, build_tokenizer())
    np.testing.assert_allclose(
        in_rows(rows, texts, plans), separately(model, texts, plans), rtol=0, atol=TOLERANCE
    )
    assert not any(rows.ways.values())


def test_a_broken_model_is_said() -> None:
    model = e.tiny("qwen3_moe")
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = torch.nan
    with pytest.raises(ModelError, match="no finite log probability"):
        PlanRows(model, build_tokenizer()).scores(texts_of(e.VOCABULARY), [None])


# On the lab: as what evaluation says of the same plan ------------------------------------------------------


@pytest.fixture(scope="module")
def subject() -> Subject:
    model, tokenizer = lab.load("moe")
    return Subject(model, tokenizer, batch_size=8)


def test_log_odds_are_those_of_an_evaluation(subject: Subject) -> None:
    task = load_task("lab:refusal/dev", limit=12)
    plan = Steering.from_experts(subject.model, {1: [3, 4]}, {2: [5]})
    rows = PlanRows(subject.model, subject.tokenizer)
    found = LogOdds(rows, task, whole=False).values([None, plan])
    forks = subject.forks(task)
    want = [subject.preference(forks, each) for each in (None, plan)]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4)
    whole = LogOdds(rows, task, whole=True).values([plan])[0]
    condition = subject.condition(Arm("tuned", plan))
    sides = condition.log_likelihoods(
        [item.content for item in task], [[item.positive, item.negative or ""] for item in task]
    )
    np.testing.assert_allclose(whole, [one.total - other.total for one, other in sides], rtol=0, atol=1e-4)
    assert preferences(task, subject.tokenizer).texts


def test_kl_is_that_along_the_unsteered_answers(subject: Subject) -> None:
    task = load_task("lab:ordinary/dev", limit=8)
    plan = Steering.from_experts(subject.model, {1: [3, 4]}, {2: [5]})
    base = subject.condition(Arm("base", None))
    kept = Kept([task], read_bounds(["kl <= 0.3"]), base)
    found = kept.measure(PlanRows(subject.model, subject.tokenizer), plan)["kl"]
    steered = subject.condition(Arm("tuned", plan))
    shifts = steered.token_shifts(kept.contents, kept.base_texts, base)
    want = np.mean([np.mean([shift for _, shift in of_text]) for of_text in shifts])
    assert found.value == pytest.approx(want, abs=1e-4)
    assert found.value > 0
    assert found.items == 8
    assert found.upper > found.value


def test_what_is_far_too_dear_is_looked_at_in_a_quarter_of_the_items(subject: Subject) -> None:
    task = load_task("lab:ordinary/dev", limit=32)
    width = subject.model.config.hidden_size
    plan = Steering.from_vectors(subject.model, {1: torch.ones(width)}, strength=100.0)
    kept = Kept([task], [CostBound("kl", 0.0)], subject.condition(Arm("base", None)))
    found = kept.measure(PlanRows(subject.model, subject.tokenizer), plan)["kl"]
    assert (found.items, found.kept) == (8, False)
