"""Scopes under `generate`: which tokens of which row are edited and counted, whatever way it generates.

An edited token is one whose raw score of the activated expert is not what the router's own class computes
from the same hidden state: an activation always changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache, StoppingCriteria

import families as f
from steersman import Receipt, Steering, SteeringNotApplied, apply_rows

LAYER, EXPERT, NEW = 1, 5, 5
SCOPES = ("all", "prompt", "generated", "answer")
SITE = f"router:{LAYER}"


def expected_positions(mask: Tensor, new: list[int], scope: str, columns: int) -> Tensor:
    """Which positions a scope holds, bool [rows, columns], by the design's words.

    `mask` is the prompt's, `new` the tokens each row generated; the last of them is never fed back.
    """
    width = mask.shape[1]
    held = torch.zeros(mask.shape[0], columns, dtype=torch.bool)
    for row, count in enumerate(new):
        real = [column for column in range(width) if mask[row, column]]
        fed_back = list(range(width, width + count - 1))
        positions = {
            "all": real + fed_back,
            "prompt": real,
            "generated": fed_back,
            "answer": real[-1:] + fed_back,
        }[scope]
        held[row, positions] = True
    return held


def edited_tokens(model: nn.Module, step: f.Step) -> Tensor:
    """Which tokens of a forward were edited, bool [rows, columns]; checks the choice of the others."""
    scores, _, chosen = f.unsteered(f.router_of(model, LAYER), step)
    edited = step.scores[:, EXPERT] != scores[:, EXPERT]
    assert bool(step.has(EXPERT)[edited].all())
    assert torch.equal(step.chosen[~edited], chosen[~edited])
    return edited.reshape(step.shape)


def check(
    model: nn.Module,
    generate: Callable[[], Tensor],
    mask: Tensor,
    scope: str,
    *,
    copies: int = 1,
    new: Callable[[Tensor], list[int]] | None = None,
    cached: int = 0,
    forwards: list[tuple[int, int]] | None = None,
) -> Tensor:
    """Generate under a plan and compare what was edited, and the receipt, with the scope's definition.

    `generate` returns the new tokens [rows, N]; `new` tells from them how many each row has (all of them).
    `cached` columns of the mask were in a cache before. Returns the new tokens.
    """
    plan = Steering.from_experts(model, {LAYER: [EXPERT]}, scope=scope)
    with plan.apply(model) as receipt, f.watching(model, LAYER) as steps:
        output = generate()
    mask = mask.repeat_interleave(copies, dim=0).clone()
    mask[:, :cached] = 0
    counts = new(output) if new is not None else [output.shape[1]] * output.shape[0]
    held = expected_positions(mask, counts, scope, mask.shape[1] + output.shape[1] - 1)
    reached = torch.zeros_like(held)
    fed = cached
    for step in steps:
        start = step.cached if step.cached is not None else 0
        end = start + step.shape[1]
        assert torch.equal(edited_tokens(model, step), held[:, start:end]), (start, end)
        reached[:, start:end] = True
        fed = max(fed, end)
    assert bool(reached[held].all())
    assert fed == held.shape[1]
    if forwards is not None:
        assert [step.shape for step in steps] == forwards
    real = [int(row.sum()) for row in mask]
    formula = {
        "all": sum(p + n - 1 for p, n in zip(real, counts, strict=True)),
        "prompt": sum(real),
        "generated": sum(n - 1 for n in counts),
        "answer": sum(counts),
    }[scope]
    assert int(held.sum()) == formula
    assert receipt.tokens == {SITE: formula}
    assert receipt.fingerprint == plan.fingerprint
    return output


def greedy(model: nn.Module, ids: Tensor, **options: Any) -> Callable[[], Tensor]:
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    return lambda: model.generate(ids, **settings)[:, ids.shape[1] :]


# --------------------------------------------------------------------------- every family


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", f.FAMILIES)
def test_left_padding(name: str, scope: str) -> None:
    """Prompts longer than gpt_oss's sliding window of 8."""
    model = f.shared(name)
    ids, mask = f.padded([10, 4, 7], "left")
    check(model, greedy(model, ids, attention_mask=mask), mask, scope, forwards=[(3, 10)] + [(3, 1)] * 4)


@pytest.mark.parametrize("scope", ["prompt", "answer"])
@pytest.mark.parametrize("name", f.FAMILIES)
def test_static_cache(name: str, scope: str) -> None:
    model = f.shared(name)
    ids, mask = f.padded([10, 4], "left")
    check(model, greedy(model, ids, attention_mask=mask, cache_implementation="static"), mask, scope)


@pytest.mark.parametrize("name", f.FAMILIES)
def test_right_padding_beams_and_half_precision(name: str) -> None:
    ids, mask = f.padded([6, 3], "right")
    model = f.shared(name, dtype=torch.bfloat16)
    check(model, greedy(model, ids, attention_mask=mask), mask, "answer")
    model = f.shared(name)
    ids, mask = f.padded([6, 3], "left")
    beams = greedy(model, ids, attention_mask=mask, num_beams=3, num_return_sequences=3)
    check(model, beams, mask, "all", copies=3, forwards=[(6, 6)] + [(6, 1)] * 4)


# --------------------------------------------------------------------------- every way, one family

MODEL = "deepseek_v3"
WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 3},
    "chunks that leave one token": {"prefill_chunk_size": 3},
    "sampled": {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_generating(way: str, scope: str, side: str) -> None:
    model = f.shared(MODEL)
    ids, mask = f.padded([7 if "leave one" in way else 8, 2, 5], side)
    check(model, greedy(model, ids, attention_mask=mask, **WAYS[way]), mask, scope)


@pytest.mark.parametrize("way", ["dynamic", "no cache", "static"])
@pytest.mark.parametrize("scope", SCOPES)
def test_sliding_windows(way: str, scope: str) -> None:
    model = f.shared("gpt_oss")
    ids, mask = f.padded([13, 3], "left")
    check(model, greedy(model, ids, attention_mask=mask, **WAYS[way]), mask, scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_beams_and_returned_sequences(scope: str) -> None:
    model = f.shared(MODEL)
    ids, mask = f.padded([6, 3], "left")
    beams = greedy(model, ids, attention_mask=mask, num_beams=4)
    for counts in ({"num_return_sequences": 4}, {"num_return_sequences": 4, "use_cache": False}):
        whole = greedy(model, ids, attention_mask=mask, num_beams=4, **counts)
        check(model, whole, mask, scope, copies=4)
    sampled = greedy(model, ids, attention_mask=mask, do_sample=True, num_return_sequences=3)
    check(model, sampled, mask, scope, copies=3)
    plan = Steering.from_experts(model, {LAYER: [EXPERT]}, scope=scope)
    with plan.apply(model) as receipt:  # one returned of four beams: all four were run
        assert beams().shape == (2, NEW)
    assert receipt.tokens[SITE] == {"all": 68, "prompt": 36, "generated": 32, "answer": 40}[scope]


@pytest.mark.parametrize("scope", SCOPES)
def test_without_a_mask(scope: str) -> None:
    model = f.shared(MODEL)
    ids, mask = f.padded([6, 3], "left")
    check(model, greedy(model, ids), mask, scope)  # padding is inferred from the pad token
    plain = f.token_ids(2, 5)
    check(model, greedy(model, plain), torch.ones_like(plain), scope)


def test_padding_that_is_also_an_end_cannot_be_inferred() -> None:
    """transformers then takes every token for real, and so do we."""
    model = f.shared(MODEL)
    ids, _ = f.padded([6, 3], "left")
    check(model, greedy(model, ids, eos_token_id=[f.PAD]), torch.ones_like(ids), "prompt")


@pytest.mark.parametrize("scope", SCOPES)
def test_inputs_embeds(scope: str) -> None:
    model = f.shared(MODEL)
    ids, mask = f.padded([7, 4], "left")
    embeds = model.get_input_embeddings()(ids).detach()

    def generate() -> Tensor:
        return model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, do_sample=False)

    check(model, generate, mask, scope)
    both = greedy(model, ids, inputs_embeds=embeds, attention_mask=mask)
    check(model, both, mask, scope)


def test_inputs_embeds_with_caching_turned_off() -> None:
    """transformers keeps a cache all the same."""
    model = f.shared(MODEL)
    ids, mask = f.padded([7, 4], "left")
    embeds = model.get_input_embeddings()(ids).detach()

    def generate() -> Tensor:
        options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": False}
        return model.generate(inputs_embeds=embeds, attention_mask=mask, **options)

    check(model, generate, mask, "answer")


def test_without_a_cache_everything_is_fed_again_but_counted_once() -> None:
    model = f.shared(MODEL)
    ids, mask = f.padded([5, 2], "left")
    generate = greedy(model, ids, attention_mask=mask, use_cache=False)
    check(model, generate, mask, "all", forwards=[(2, 5), (2, 6), (2, 7), (2, 8), (2, 9)])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("everything", f.CACHE),
        ("new only", f.CACHE),
        ("everything without mask", f.CACHE),
        ("new only", "past_key_values"),  # its older name, which transformers 5.24 still takes
    ],
)
def test_a_cache_passed_in(given: str, name: str, kind: str, scope: str) -> None:
    """The second turn of a chat: what the cache holds is not the prompt any more."""
    model = f.shared(MODEL)
    padding = given != "everything without mask"
    ids, mask = f.padded([5, 3], "left") if padding else (f.token_ids(2, 5), torch.ones(2, 5).long())
    cache = StaticCache(config=model.config, max_cache_len=40) if kind == "static" else DynamicCache()
    first = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **{f.CACHE: cache})
    cached = int(cache.get_seq_length())
    assert cached == 8
    turn = torch.cat([first, f.token_ids(2, 3, seed=9)], dim=1)
    whole = torch.cat([mask, torch.ones(2, turn.shape[1] - 5).long()], dim=1)
    new_ids = turn[:, cached:] if given == "new only" else turn
    options = {} if given == "everything without mask" else {"attention_mask": whole}
    generate = greedy(model, new_ids, **{name: cache}, **options)
    check(model, generate, whole, scope, cached=cached, forwards=[(2, 4)] + [(2, 1)] * 4)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_cache_passed_in_for_ids_without_a_mask_is_taken_for_their_beginning(scope: str) -> None:
    """transformers' own reading: of nine ids beside six cached ones, the last three are new."""
    model = f.shared("qwen3_moe")
    cache = DynamicCache()
    model.generate(f.token_ids(1, 6), max_new_tokens=1, do_sample=False, **{f.CACHE: cache})
    ids = f.token_ids(1, 9)
    generate = greedy(model, ids, **{f.CACHE: cache})
    check(model, generate, torch.ones_like(ids), scope, cached=6, forwards=[(1, 3)] + [(1, 1)] * 4)


# --------------------------------------------------------------------------- rows that end early


def lengths_until(end: int) -> Callable[[Tensor], list[int]]:
    """How many tokens each row generated: up to its first end, that included."""
    return lambda output: [row.index(end) + 1 if end in row else len(row) for row in output.tolist()]


def steered_text(model: nn.Module, ids: Tensor, mask: Tensor, scope: str) -> Tensor:
    with Steering.from_experts(model, {LAYER: [EXPERT]}, scope=scope).apply(model):
        return greedy(model, ids, attention_mask=mask, max_new_tokens=8)()


@pytest.mark.parametrize("way", ["dynamic", "no cache", "static"])
@pytest.mark.parametrize("scope", SCOPES)
def test_rows_that_end_early(way: str, scope: str) -> None:
    model = f.shared(MODEL)
    ids, mask = f.padded([6, 4, 5], "left")
    text = steered_text(model, ids, mask, scope)
    end = early_end(text)
    generate = greedy(model, ids, attention_mask=mask, eos_token_id=end, max_new_tokens=8, **WAYS[way])
    output = check(model, generate, mask, scope, new=lengths_until(end))
    assert len(set(lengths_until(end)(output))) > 1


def early_end(text: Tensor) -> int:
    """A token that ends some rows before others."""
    for token in text[:, 1:-2].flatten().tolist():
        counts = lengths_until(token)(text)
        if len(set(counts)) > 1 and max(counts) > min(counts) + 1 and min(counts) > 1:
            return token
    raise AssertionError("no token ends some rows early")


class Instant:
    """An event of a device that has none because it does all at once."""

    def __init__(self, **_options: object) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


@pytest.mark.parametrize("cache", ["dropped", "returned", "given"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_stop_that_is_seen_one_step_late(cache: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Apple's GPUs transformers runs one step past the last row's end and takes it back: that step is
    neither edited nor counted, and a second turn finds the cache as if it had not been.
    """
    deferred = getattr(transformers.generation.utils, "DeferredStopCheck", None)
    if deferred is None:
        pytest.skip("this transformers looks for the end at each step")
    model, (ids, mask) = f.shared(MODEL), f.padded([6, 4, 5], "left")
    text = steered_text(model, ids, mask, scope)
    ends = [int(text[0, 1]), int(text[1, 4]), int(text[2, 3])]

    def two_turns() -> tuple[list[Any], list[f.Step]]:
        given = {f.CACHE: DynamicCache(config=model.config)} if cache == "given" else {}
        plan = Steering.from_experts(model, {LAYER: [EXPERT]}, scope=scope)
        with plan.apply(model) as receipt, f.watching(model, LAYER) as steps:
            output = model.generate(
                ids, attention_mask=mask, eos_token_id=ends, max_new_tokens=8, do_sample=False,
                return_dict_in_generate=True if cache == "returned" else None, **given,
            )  # fmt: skip
        first = output.sequences if cache == "returned" else output
        if cache == "dropped":
            return [first.tolist(), receipt.tokens], steps
        kept = given.get(f.CACHE) or output[f.CACHE]
        turn = torch.cat([first, f.token_ids(3, 3, seed=9)], dim=1)
        with plan.apply(model) as again:
            second = greedy(model, turn, **{f.CACHE: kept})()
        return [first.tolist(), receipt.tokens, second.tolist(), again.tokens], steps

    expected, before = two_turns()
    monkeypatch.setattr(deferred, "is_supported", staticmethod(lambda *_, **__: True))
    monkeypatch.setattr(torch, "Event", Instant)
    found, steps = two_turns()
    assert len(steps) == len(before) + 1
    assert not edited_tokens(model, steps[-1]).any()
    assert found == expected


class EndsRow(StoppingCriteria):
    """A criterion of someone's own: a row ends on a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("scope", ["all", "answer"])
def test_rows_that_end_by_a_criterion_of_ones_own(scope: str) -> None:
    model = f.shared(MODEL)
    ids, mask = f.padded([6, 4, 5], "left")
    end = early_end(steered_text(model, ids, mask, scope))
    generate = greedy(
        model, ids, attention_mask=mask, stopping_criteria=[EndsRow(end)], max_new_tokens=8,
        eos_token_id=63 if end != 63 else 62,
    )  # fmt: skip
    output = check(model, generate, mask, scope, new=lengths_until(end))
    assert len(set(lengths_until(end)(output))) > 1


@pytest.mark.parametrize("scope", ["all", "answer"])
def test_rows_that_end_by_a_stop_string(scope: str) -> None:
    alphabet = sorted(ByteLevel.alphabet())
    plain = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    plain.pre_tokenizer, plain.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    model = f.shared(MODEL)
    ids, mask = f.padded([6, 4, 5], "left")
    end = early_end(steered_text(model, ids, mask, scope))
    generate = greedy(
        model, ids, attention_mask=mask, stop_strings=alphabet[end], tokenizer=tokenizer, max_new_tokens=8,
        eos_token_id=63 if end != 63 else 62,
    )  # fmt: skip
    check(model, generate, mask, scope, new=lengths_until(end))


def test_returned_sequences_that_end_early() -> None:
    model = f.shared(MODEL)
    ids, mask = f.padded([6, 4], "left")
    torch.manual_seed(3)
    sampled = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8}
    generate = greedy(model, ids, attention_mask=mask, eos_token_id=list(range(3, 12)), **sampled)

    def new(output: Tensor) -> list[int]:
        ends = [[i for i, token in enumerate(row) if 3 <= token < 12] for row in output.tolist()]
        return [found[0] + 1 if found else output.shape[1] for found in ends]

    output = check(model, generate, mask, "all", copies=3, new=new)
    assert len(set(new(output))) > 1


# --------------------------------------------------------------------------- rows with their own plans


@pytest.mark.parametrize("copies", [1, 3])
def test_rows_keep_their_plan_when_beams_multiply_them(copies: int) -> None:
    model = f.shared(MODEL)
    ids, mask = f.padded([6, 4, 5], "left")
    first = Steering.from_experts(model, {LAYER: [EXPERT]})
    third = Steering.from_experts(model, {LAYER: [3]}, scope="answer")
    with apply_rows(model, [first, None, third]) as receipt, f.watching(model, LAYER) as steps:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=3, do_sample=False, num_beams=copies,
            num_return_sequences=copies,
        )  # fmt: skip
    assert receipt.fingerprint == (first.fingerprint, None, third.fingerprint)
    assert receipt.tokens == {SITE: copies * (6 + 2 + 3)}
    for step in steps:
        scores = f.unsteered(f.router_of(model, LAYER), step)[0]
        changed = (step.scores != scores).reshape(*step.shape, f.EXPERTS).any(dim=1)
        own = torch.zeros(3, f.EXPERTS, dtype=torch.bool)
        own[0, EXPERT], own[2, 3] = True, True
        assert torch.equal(changed, own.repeat_interleave(copies, dim=0))


def test_rows_must_match_the_plans() -> None:
    """Four rows under two plans are not two beams each: nobody said which plan is whose."""
    model = f.shared(MODEL)
    plan = Steering.from_experts(model, {LAYER: [EXPERT]})
    ids = f.token_ids(4, 5)
    with pytest.raises(SteeringNotApplied, match="2 plans, but the model was given 4 rows"), two(model, plan):
        model(ids)
    with pytest.raises(SteeringNotApplied, match="2 plans, but the model was given 4 rows"), two(model, plan):
        model.generate(ids, max_new_tokens=2, do_sample=False)
    with pytest.raises(SteeringNotApplied, match="2 plans, but the model was given 3 rows"), two(model, plan):
        model(ids[:3])


def two(model: nn.Module, plan: Steering) -> AbstractContextManager[Receipt]:
    return apply_rows(model, [plan, None])


# --------------------------------------------------------------------------- refused


def test_a_scope_that_selects_nothing_is_refused() -> None:
    model = f.shared(MODEL)
    plan = Steering.from_experts(model, {LAYER: [EXPERT]}, scope="generated")
    ids = f.token_ids(2, 5)
    with pytest.raises(SteeringNotApplied, match="'generated' selects nothing"), plan.apply(model):
        model.generate(ids, max_new_tokens=1, do_sample=False)
    with pytest.raises(SteeringNotApplied, match="'generated' selects nothing"), plan.apply(model):
        model(ids)
    both = plan + Steering.from_experts(model, {2: [1]})
    with pytest.raises(SteeringNotApplied, match="'generated' selects nothing"), both.apply(model):
        model(ids)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 1.5},
        {"assistant_early_exit": 1},
        {"negative_prompt_ids": f.token_ids(1, 3), "guidance_scale": 1.5},
    ],
    ids=lambda options: "+".join(options),
)
def test_ways_that_cannot_be_followed_are_refused(options: dict[str, Any]) -> None:
    model = f.shared("qwen3_moe")
    plan = Steering.from_experts(model, {LAYER: [EXPERT]})
    before = model.config.num_hidden_layers
    with pytest.raises(SteeringNotApplied), plan.apply(model):
        model.generate(f.token_ids(1, 6), max_new_tokens=4, do_sample=False, **options)
    assert model.config.num_hidden_layers == before
    with plan.apply(model):
        model.generate(f.token_ids(1, 6), max_new_tokens=4, do_sample=False)


def test_assisted_decoding_is_refused() -> None:
    model, assistant = f.shared("qwen3_moe"), f.shared("qwen3_moe", seed=4)
    plan = Steering.from_experts(model, {LAYER: [EXPERT]})
    with pytest.raises(SteeringNotApplied, match="assistant_model"), plan.apply(model):
        model.generate(f.token_ids(1, 6), max_new_tokens=4, assistant_model=assistant)


def test_settings_of_the_caller_stay_as_they_are() -> None:
    model = f.shared("qwen3_moe")
    settings = model.generation_config
    before = settings.to_dict()
    plan = Steering.from_experts(model, {LAYER: [EXPERT]})
    with plan.apply(model):
        model.generate(f.token_ids(1, 6), generation_config=settings, max_new_tokens=4, do_sample=False)
    assert model.generation_config is settings
    assert settings.to_dict() == before
