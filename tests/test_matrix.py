"""Every Mixture-of-Experts model type of transformers: the promise, untouched tokens and rows, counts,
identity, restoration.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import every_family as e
import family_table
import streams
from cli.command_line import run as cli
from steersman import (
    ModelError,
    PlanError,
    Steering,
    SteeringNotApplied,
    apply_rows,
    detect_experts,
    read_architecture,
)
from steersman.models.architecture import decoder_layers, find_routers
from steersman.models.identity import weights_id

REFUSED = {"doge"}
"""Types of which no router is steered: each needs a measured reason."""

SEVERAL_STREAMS = {"deepseek_v4", "glm5_next", "hy_v4", "hy_v4_vl", "qwen4_exp", "qwen4_exp_text"}
"""Types of which no vector is added to the residual stream: a token has more than one."""

STORED = ("deepseek_v3", "ernie4_5_vl_moe", "granitemoe", "jamba", "mixtral", "qwen3_vl_moe", "zaya")
"""Types that are stored in different ways: singly, fused, two kinds of experts together."""

ROWS, COLUMNS = 3, 7
IDS = torch.randint(3, e.VOCABULARY, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(1))
VECTOR = torch.randn(e.WIDTH, generator=torch.Generator().manual_seed(5))
STEERED = [name for name in e.MODEL_TYPES if name not in REFUSED]


@pytest.fixture(params=STEERED)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A tiny model of each type."""
    return open_or_skip(request.param)


def open_or_skip(name: str) -> nn.Module:
    if reason := e.why_unrunnable(name):
        pytest.skip(reason)
    return e.shared(name)


def run(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """The logits of one forward."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@functools.cache
def steerable(model: nn.Module) -> dict[int, int]:
    """The layers whose router can be steered, with E."""
    return {r.layer: r.experts for r in read_architecture(model).routers if r.steerable}


def shares(model: nn.Module) -> dict[int, Tensor]:
    """How often each expert is chosen, unsteered."""
    seen = e.chosen(model, lambda: run(model))
    return {
        layer: torch.bincount(seen[layer].flatten(), minlength=experts)
        for layer, experts in steerable(model).items()
    }


usual_shares = functools.cache(shares)
"""The same for a model as it was built."""


def assert_promise(model: nn.Module, unseen: frozenset[int] = frozenset()) -> None:
    """The least used expert of each layer is put in, the most used one out, each for every token."""
    used = shares(model)
    told = {layer: sorted({*range(len(share))} - unseen) for layer, share in used.items()}
    inside = {layer: min(told[layer], key=share.__getitem__) for layer, share in used.items()}
    outside = {layer: max(told[layer], key=share.__getitem__) for layer, share in used.items()}
    assert unseen or all(share[outside[layer]] > 0 for layer, share in used.items()), "nothing to keep out"
    for experts, side, promised in ((inside, "activate", True), (outside, "deactivate", False)):
        plan = Steering.from_experts(model, **{side: {layer: [expert] for layer, expert in experts.items()}})
        with plan.apply(model) as receipt:
            seen = e.chosen(model, lambda: run(model))
        for layer, expert in experts.items():
            has = (seen[layer] == expert).any(dim=-1)
            assert has.shape == (ROWS * COLUMNS,)
            assert has.eq(promised).all(), f"layer {layer}: {int(has.sum())} of {len(has)} tokens"
        assert receipt.tokens == {f"router:{layer}": ROWS * COLUMNS for layer in experts}


def test_promise(model: nn.Module) -> None:
    assert_promise(model)


def test_promise_at_extreme_scores(model: nn.Module) -> None:
    # Zaya's expert 0 and its skipping class look alike where a weight underflows: both do nothing then.
    unseen = frozenset({0, e.EXPERTS}) if model.config.model_type == "zaya" else frozenset()
    e.scaled(model, 200.0)
    try:
        assert_promise(model, unseen)
    finally:
        e.scaled(model, 1 / 200.0)


def test_changes_are_counted(model: nn.Module) -> None:
    """In the first layer, which gets the same hidden states, by the sets of experts before and after."""
    layer = min(steerable(model))
    before = e.chosen(model, lambda: run(model))[layer]
    plan = Steering.from_experts(model, {layer: [int(usual_shares(model)[layer].argmin())]})
    with plan.apply(model, receipt="changes") as receipt:
        after = e.chosen(model, lambda: run(model))[layer]
    changed = (before.sort(dim=-1).values != after.sort(dim=-1).values).any(dim=-1)
    assert receipt.changed == {f"router:{layer}": int(changed.sum())}
    assert changed.any()


@pytest.mark.long
@pytest.mark.parametrize("name", STEERED)
def test_promise_in_bfloat16(name: str) -> None:
    model = copy.deepcopy(open_or_skip(name)).to(torch.bfloat16)
    kept = model._keep_in_fp32_modules_strict or ()  # as from_pretrained does; Inkling's gates among them
    for place, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(part in place for part in kept):
            tensor.data = tensor.data.float()
    assert_promise(model)
    if name != "zaya":
        e.scaled(model, 200.0)
        assert_promise(model)


def test_what_is_not_in_scope_is_untouched(model: nn.Module) -> None:
    base = run(model)
    before = e.chosen(model, lambda: run(model))
    layer = min(steerable(model))
    expert = int(usual_shares(model)[layer].argmin())
    plan = Steering.from_experts(model, {layer: [expert]}, scope="prompt")
    for none in (0 * (plan + vectors(model, "all")), Steering.from_experts(model)):
        with none.apply(model):
            assert torch.equal(run(model), base)
    with apply_rows(model, [None, plan, None], prompt_lengths=[COLUMNS, 4, COLUMNS]):
        seen = e.chosen(model, lambda: run(model))
        logits = run(model)
    first, unsteered = seen[layer].view(ROWS, COLUMNS, -1), before[layer].view(ROWS, COLUMNS, -1)
    assert torch.equal(first[[0, 2]], unsteered[[0, 2]])
    assert torch.equal(first[1, 4:], unsteered[1, 4:])
    assert (first[1, :4] == expert).any(dim=-1).all()
    torch.testing.assert_close(logits[[0, 2]], base[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits[1], base[1])


def test_everything_is_put_back(model: nn.Module) -> None:
    base, before = run(model), list(attributes(model))
    plan = Steering.from_experts(model, {layer: [0] for layer in steerable(model)}) + vectors(model, "all")
    with plan.apply(model):
        assert not torch.equal(run(model), base)
    assert list(attributes(model)) == before
    assert torch.equal(run(model), base)
    with pytest.raises(KeyError, match="inside"), plan.apply(model):
        raise KeyError("inside")
    assert list(attributes(model)) == before


def attributes(model: nn.Module) -> Iterator[tuple[str, str, object]]:
    """Everything that hangs on a model: each module's class and attributes, by identity; hooks by number."""
    for name, module in model.named_modules():
        yield name, "class", type(module)
        for key, value in module.__dict__.items():
            yield name, key, tuple(map(id, value.values())) if isinstance(value, dict) else id(value)


def test_counts_equal_brute_force(model: nn.Module) -> None:
    random = torch.Generator().manual_seed(2)
    texts = [
        [torch.randint(3, e.VOCABULARY, (length,), generator=random) for length in lengths]
        for lengths in ((5, 9), (3, 8), (11, 4))
    ]
    pairs = [
        {
            side: " ".join(f"w{i}" for i in ids)
            for side, ids in zip(("positive", "negative"), both, strict=True)
        }
        for both in texts
    ]
    routing = detect_experts(model, tokenizer(), pairs, batch_size=4)
    layers = steerable(model)
    assert list(routing.layers) == list(layers)
    for side in (0, 1):
        expected = {layer: torch.zeros(experts, dtype=torch.int64) for layer, experts in layers.items()}
        for both in texts:
            seen = e.chosen(model, lambda ids=both[side]: run(model, ids[None]))
            for layer, counts in expected.items():
                for expert in seen[layer].flatten().tolist():
                    counts[expert] += 1
        for row, counts in enumerate(expected.values()):
            assert routing.activations[side, row].tolist() == counts.tolist()
        assert routing.tokens[side] == sum(len(both[side]) for both in texts)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, no special tokens."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(e.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def test_identity(model: nn.Module, tmp_path: Path) -> None:
    name = model.config.model_type
    base = read_architecture(model)
    model.config.save_pretrained(tmp_path)
    again = type(model.config).from_pretrained(tmp_path)
    with torch.device("meta"):
        assert read_architecture(e.from_config(again)) == base
        changed = [e.config_of(name, **dict.fromkeys(e.EXPERTS_NAMES, 2 * e.EXPERTS))]
        if name != "zaya":  # always one expert a token
            changed.append(e.config_of(name, **dict.fromkeys(e.TOP_K_NAMES, 3)))
        if any(router.groups for router in base.routers):
            changed.append(e.config_of(name, **dict.fromkeys(e.GROUPS_NAMES, 1), topk_group=1))
        others = {read_architecture(e.from_config(config)).id for config in changed}
    assert len(others) == len(changed)
    assert base.id not in others


@pytest.mark.parametrize(
    "name", [name if name in STORED else pytest.param(name, marks=pytest.mark.long) for name in STEERED]
)
def test_weights_id_follows_the_weights(name: str, tmp_path: Path) -> None:
    """It is the same when what is saved is loaded, and another when a tensor changes."""
    model = open_or_skip(name)
    identity = weights_id(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    kept = same_values(model, loaded)
    # transformers loses Zaya's balancing biases when it loads them: those are other weights.
    assert kept or name == "zaya"
    assert (weights_id(loaded) == identity) == kept
    weight = next(parameter for parameter in reversed(list(loaded.parameters())) if parameter.dim() == 2)
    with torch.no_grad():
        weight.add_(1)
    assert weights_id(loaded) != identity


def same_values(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_promise_while_generating(model: nn.Module) -> None:
    """Left-padded prompts of two lengths, then decode steps from the model's own cache; of both levers, where
    vectors can be added.
    """
    layers, added = steerable(model), vectors(model, "answer")
    plan = Steering.from_experts(model, activate={layer: [3] for layer in layers}, scope="answer") + added
    mask = torch.ones(2, COLUMNS, dtype=torch.int64)
    mask[0, :3] = 0
    ids = IDS[:2].masked_fill(mask == 0, 0)
    forwards: list[dict[int, Tensor]] = []
    with (
        streams.watching(decoder_layers(model)) as stream,
        plan.apply(model) as receipt,
        e.watching(model) as seen,
    ):
        decoder = model.get_decoder()
        handle = getattr(decoder, "model", decoder).register_forward_hook(
            lambda *_: forwards.append(dict(seen))
        )
        try:
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None
            )
        finally:
            handle.remove()
    assert len(forwards) == 3
    for layer in layers:
        last = forwards[0][layer].view(2, COLUMNS, -1)[:, -1]
        for given in (last, forwards[1][layer], forwards[2][layer]):
            assert given.shape[0] == 2
            assert (given == 3).any(dim=-1).all()
    sites = [f"router:{layer}" for layer in layers] + [f"block_output:{streams.LAYER}"] * len(added.edits)
    assert receipt.tokens == dict.fromkeys(sites, 6)
    if added.edits:
        last = torch.arange(COLUMNS).expand(2, -1) == COLUMNS - 1
        streams.assert_added(stream, VECTOR, [last, *[torch.ones(2, 1, dtype=torch.bool)] * 2])


def vectors(model: nn.Module, scope: str) -> Steering:
    """A plan that adds a vector to the residual stream; an empty one where there is no one stream."""
    given = {streams.LAYER: VECTOR}
    if model.config.model_type in SEVERAL_STREAMS:
        with pytest.raises(PlanError, match="4 residual streams between its layers"):
            Steering.from_vectors(model, given)
        return Steering.from_experts(model)
    return Steering.from_vectors(model, given, strength=streams.STRENGTH, scope=scope)


@pytest.mark.parametrize("name", ["jetmoe", "mistral4", "qwen3_vl_moe", "doge"])
def test_opened_and_described_from_the_command_line(name: str, tmp_path: Path) -> None:
    model = open_or_skip(name)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    described = cli("describe", tmp_path, "--json").json
    facts = read_architecture(model)
    assert described["architecture"] == facts.id
    assert described["weights"] == weights_id(model)
    assert [router["reason"] for router in described["routers"]] == [r.reason for r in facts.routers]
    attention = [{"layer": layer, "reason": "it routes attention heads, not experts"} for layer in range(3)]
    assert described["beside"] == (attention if name == "jetmoe" else [])
    words = cli("describe", tmp_path).words
    assert ("not steered, because it routes attention heads" in words) == (name == "jetmoe")
    assert ("no: its experts are retrieved by two product keys" in words) == (name == "doge")


def test_what_cannot_be_steered_says_why() -> None:
    doge = e.shared("doge")
    with pytest.raises(
        PlanError, match="layer 1 cannot be steered: its experts are retrieved by two product"
    ):
        Steering.from_experts(doge, {1: [3]})
    with pytest.raises(ModelError, match=r"no router of DogeForCausalLM can be steered: its experts are"):
        detect_experts(doge, tokenizer(), [{"positive": "w5 w6", "negative": "w7 w8"}])
    if e.known("inkling2_loop_text"):
        looped = e.shared("inkling2_loop_text")
        with pytest.raises(PlanError, match="layer 3 cannot be steered: it runs 3 times in one forward"):
            Steering.from_experts(looped, {3: [3]})
        with pytest.raises(PlanError, match="layer 3: it runs 3 times in one forward"):
            Steering.from_vectors(looped, {1: VECTOR, 3: VECTOR})
    hashed = e.shared("deepseek_v4")
    with pytest.raises(PlanError, match="layer 0 cannot be steered: its experts come from token ids"):
        Steering.from_experts(hashed, {0: [3]})


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_prompts_with_images(name: str) -> None:
    """Image tokens are steered like others, but where they go to other experts: then nothing is returned."""
    image, start = 60, 61
    torch.manual_seed(0)
    model = e.from_config(
        e.config_of(name, image_token_id=image, vision_start_token_id=start, image_start_token_id=start)
    )
    ids = torch.tensor([[5, 6, start, *[image] * 4, 7, 8, 9]])
    kinds = (ids == image).long()
    vision = model.config.vision_config
    width = 3 * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1)
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(16, width),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    inputs["moe_mm_token_type_ids" if name.startswith("ernie") else "mm_token_type_ids"] = kinds
    plan = Steering.from_experts(model, {layer: [3] for layer in steerable(model)})
    if name.startswith("ernie"):
        refusal = pytest.raises(SteeringNotApplied, match="was given 6 tokens where the model was given 10")
        with torch.no_grad(), refusal, plan.apply(model):
            model(**inputs, mm_token_type_ids=kinds)
        return
    with plan.apply(model):
        seen = e.chosen(model, lambda: model(**inputs))
    for layer in steerable(model):
        assert (seen[layer] == 3).any(dim=-1).tolist() == [True] * 10


def test_vectors_where_experts_cannot_be_steered() -> None:
    model = e.shared("doge")
    streams.assert_steered(model, decoder_layers(model), e.VOCABULARY)


def test_docs_name_the_types_of_several_streams() -> None:
    line = (
        family_table.PAGE.read_text(encoding="utf-8").partition("between the layers: ")[2].partition(" (")[0]
    )
    assert set(line.replace("`", "").split(", ")) == SEVERAL_STREAMS


def test_at_least_48_types() -> None:
    assert sum(map(e.known, STEERED)) >= 48


def test_nothing_else_is_refused() -> None:
    """Doge, layers whose experts come from token ids, JetMoe's attention, ERNIE's image tokens, Inkling 2
    Loop's layers that run several times.
    """
    refused = {
        (name, type(site.module).__name__)
        for name in filter(e.known, e.MODEL_TYPES)
        for site in find_routers(e.shared(name))
        if not site.facts.steerable
    }
    assert refused == {
        ("doge", "DogeCDMoE"),
        ("deepseek_v4", "DeepseekV4HashRouter"),
        ("jetmoe", "JetMoeTopKGating"),
        ("ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeTopKRouter"),
        *(
            (name, "Inkling2LoopTopKRouter")
            for name in ("inkling2_loop", "inkling2_loop_text")
            if e.known(name)
        ),
    }


@pytest.mark.parametrize("name", e.MODEL_TYPES)
def test_table_says_what_the_library_says(name: str) -> None:
    """The docs list every type, in order; what the installed transformers has is compared word for word."""
    assert tuple(family_table.written()) == e.MODEL_TYPES
    if not e.known(name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    assert family_table.written()[name] == family_table.as_line(family_table.row(name))


def test_types_came_with_the_release_that_the_table_says() -> None:
    here = release(transformers.__version__)
    for name in e.MODEL_TYPES:
        assert e.known(name) == (release(e.SINCE.get(name, "5.19")) <= here), name


def release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
