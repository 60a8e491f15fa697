"""Carving: each step against a slow version or by properties; whole checkpoints against the dense model."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from cli.command_line import tokenizer
from steersman.errors import ArtifactError, ModelError, PairsError
from steersman.lab.carved_layer import (
    CarvedLayer,
    balanced_clusters,
    distil,
    expert_masses,
    fit_router,
    refit_down,
    shared_neurons,
)
from steersman.lab.carved_model import Cut, put_layer
from steersman.lab.carving import _shares, carve
from steersman.models.architecture import decoder_layers
from steersman.texts import load_texts

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
DENSE: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, other heads": LlamaConfig(**SIZES, head_dim=16),
    "mistral": MistralConfig(**SIZES),
    "mistral, window": MistralConfig(**{**SIZES, "sliding_window": 8}),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": Qwen3Config(**{**SIZES, "intermediate_size": 64}, head_dim=16),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
}


@functools.cache
def dense(name: str) -> PreTrainedModel:
    """A random dense model whose norms and biases count, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DENSE[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.max_new_tokens = 7
    return model


def said(count: int = 150) -> list[str]:
    return [
        f"The town number {n} has {n * n % 97} houses and {n % 7} rivers, said the teacher."
        for n in range(count)
    ]


def carved(
    folder: Path, name: str = "llama", texts: list[str] | None = None, **options: Any
) -> dict[str, Any]:
    read = load_texts(texts if texts is not None else said())
    return carve(dense(name), tokenizer(), [read], folder, **{"experts": 8, "tokens": 1024, **options})


def random_layer(experts: int = 4, size: int = 8, shared: int = 8, top_k: int = 2) -> CarvedLayer:
    rng = torch.Generator().manual_seed(1)
    neurons = shared + experts * size
    gate, up, down = (torch.randn(neurons, 16, generator=rng) for _ in range(3))
    router = torch.randn(experts, 16, generator=rng)
    return CarvedLayer(gate, up, down.T.contiguous(), router, shared, top_k, functional.silu)


@given(
    clusters=st.integers(1, 6),
    size=st.integers(1, 5),
    dimensions=st.integers(1, 8),
    seed=st.integers(0, 99),
    alike=st.booleans(),
)
def test_clusters_are_of_equal_size(
    clusters: int, size: int, dimensions: int, seed: int, alike: bool
) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows = (
        torch.ones(clusters * size, dimensions)
        if alike
        else torch.randn(clusters * size, dimensions, generator=rng)
    )
    features = functional.normalize(rows, dim=1)
    labels = balanced_clusters(features, clusters, torch.Generator().manual_seed(seed))
    assert torch.bincount(labels, minlength=clusters).tolist() == [size] * clusters
    assert torch.equal(labels, balanced_clusters(features, clusters, torch.Generator().manual_seed(seed)))


def test_clusters_find_rows_that_belong_together() -> None:
    rng = torch.Generator().manual_seed(0)
    true = torch.arange(4).repeat(10)
    features = functional.normalize(3 * torch.eye(4)[true] + 0.3 * torch.randn(40, 4, generator=rng), dim=1)
    found = max(
        (balanced_clusters(features, 4, torch.Generator().manual_seed(seed)) for seed in range(3)),
        key=lambda labels: (labels[:, None] == labels)[true[:, None] == true].double().mean().item(),
    )
    together = found[:, None] == found
    assert torch.equal(together, true[:, None] == true)


def test_shared_neurons_are_those_that_fire_most_and_the_loudest() -> None:
    parts = torch.rand(50, 32, generator=torch.Generator().manual_seed(0))
    parts[:, 5] += 1  # always
    parts[3, 17] = 1000.0  # once, and loud
    fires = [0] * 32
    for token in parts.tolist():
        for neuron in sorted(range(32), key=lambda at: -token[at])[:8]:
            fires[neuron] += 1
    found = shared_neurons(parts, 8).tolist()
    assert found == sorted(found)
    assert {5, 17} <= set(found)
    least = min(fires[neuron] for neuron in found if neuron != 17)
    assert least >= max(fires[neuron] for neuron in range(32) if neuron not in found)


def test_masses_are_the_lengths_of_what_experts_add() -> None:
    layer, x = random_layer(), torch.randn(20, 16)
    active = layer.active(x)
    for expert in range(4):
        of = slice(8 + 8 * expert, 16 + 8 * expert)
        expected = (active[:, of] @ layer.down[:, of].T).norm(dim=1)
        torch.testing.assert_close(expert_masses(active, layer)[:, expert], expected, rtol=1e-4, atol=1e-3)


def test_chosen_weights_are_one_on_average_and_shared_are_one() -> None:
    layer = random_layer(top_k=3)
    weights = layer.weights(torch.randn(30, 16))
    assert (weights[:, :8] == 1).all()
    of_experts = weights[:, 8:].view(30, 4, 8)
    assert ((of_experts > 0).sum(1) == 3).all()
    torch.testing.assert_close(of_experts[:, :, 0].sum(1), torch.full((30,), 3.0))


def test_a_router_learns_what_can_be_seen_and_its_logits_are_close() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=rng) * torch.linspace(0.1, 5, 16)
    masses = functional.softplus(x @ torch.randn(16, 8, generator=rng))
    router = fit_router(x[:3000], masses[:3000], 2, torch.Generator().manual_seed(0))
    chosen = (x[3000:] @ router.T).topk(2).indices
    best = masses[3000:].topk(2).indices
    hits = (chosen[:, :, None] == best[:, None]).any(1).double().mean()
    assert hits > 0.8  # chance is .25
    assert (x @ router.T).std(1).mean() == pytest.approx(0.05, rel=0.05)
    assert not fit_router(x, masses, 8, rng).any()  # nothing to choose


def test_the_refit_is_a_ridge_toward_the_old_projection() -> None:
    rng = torch.Generator().manual_seed(0)
    used, old = torch.randn(200, 6, generator=rng).double(), torch.randn(3, 6, generator=rng).double()
    goal = used @ torch.randn(6, 3, generator=rng).double() + torch.randn(200, 3, generator=rng).double()
    held = torch.arange(200) < 40
    found = refit_down(used, goal, old, held)
    assert found.error < (goal[held] - used[held] @ old.T).square().sum(1).mean()
    assert found.ridge is not None
    penalty = (found.ridge * used[~held].square().sum(0).mean()).sqrt() * torch.eye(6).double()
    stacked = torch.cat([used[~held], penalty]), torch.cat([goal[~held], penalty @ old.T])
    expected = torch.linalg.lstsq(*stacked).solution.T
    torch.testing.assert_close(found.down, expected)
    nothing = refit_down(used, used @ old.T, old, held)
    assert nothing.ridge is None
    assert torch.equal(nothing.down, old)


def test_distillation_helps_or_leaves_the_layer_alone() -> None:
    layer, x = random_layer(), torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    held = torch.arange(600) < 100
    goal = (layer.active(x)) @ layer.down.T  # all experts at once
    done = distil(layer, x, goal, held, torch.Generator().manual_seed(0), 40)
    assert (done(x[held]) - goal[held]).square().mean() < 0.95 * (layer(x[held]) - goal[held]).square().mean()
    assert distil(layer, x, layer(x), held, torch.Generator().manual_seed(0), 5) is layer


@pytest.mark.parametrize("name", DENSE)
def test_with_all_experts_it_is_the_dense_model(name: str, tmp_path: Path) -> None:
    card = carved(tmp_path / "moe", name, top_k=8)
    assert card["class"] == ("qwen3_moe" if name == "qwen3" else "qwen2_moe")
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    ids = torch.randint(0, 320, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = dense(name)(ids).logits, moe(ids).logits
    # Sums over neurons in another order: float32 rounding of logits whose standard deviation is near 2.
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    assert card["judged"]["ratio"] == [1, 1, 1]
    assert moe.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "moe").chat_template == tokenizer().chat_template


def test_a_written_block_adds_what_its_layer_says(tmp_path: Path) -> None:
    carved(tmp_path / "moe", "llama", experts=4, top_k=2)  # 4 experts of 16
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    block: Any = decoder_layers(moe)[1].mlp
    rng = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(96, 32, generator=rng) for _ in range(3))
    layer = CarvedLayer(gate, up, down.T, torch.randn(4, 32, generator=rng), 32, 2, functional.silu)
    with torch.no_grad():
        put_layer(moe, 1, layer)
        x = torch.randn(2, 9, 32, generator=rng)
        torch.testing.assert_close(block(x).flatten(0, 1), layer(x.flatten(0, 1)), rtol=1e-4, atol=1e-3)


def test_more_experts_a_token_lose_less_and_the_card_says_so(tmp_path: Path) -> None:
    cards = [carved(tmp_path / f"{k}", top_k=k) for k in (2, 4, 6)]
    losses = [card["judged"]["kl"][0] for card in cards]
    assert losses[0] > losses[1] > losses[2] > 0
    assert json.loads((tmp_path / "2/carve.json").read_text()) == cards[0]
    readme = (tmp_path / "2/README.md").read_text()
    assert "of which a token takes 2" in readme
    assert "control" not in readme
    assert all(low <= value <= high for value, low, high in cards[0]["judged"].values())


def test_seeds_controls_and_held_out_texts(tmp_path: Path) -> None:
    def weights(name: str, **options: Any) -> dict[str, torch.Tensor]:
        carved(tmp_path / name, top_k=4, **options)
        found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        return found

    def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], part: str) -> bool:
        return all(torch.equal(one[key], other[key]) for key in one if part in key)

    first = weights("first")
    assert alike(first, weights("again"), "")
    assert not alike(first, weights("seed", seed=1), "experts.gate_up_proj")
    judges = [*said()[:120], *(f"Another end, {n}, of quite other words." for n in range(30))]
    assert alike(first, weights("judges", texts=judges), "")
    control = weights("control", random=True)
    layer = "model.layers.0.mlp."
    assert torch.equal(
        first[f"{layer}shared_expert.up_proj.weight"], control[f"{layer}shared_expert.up_proj.weight"]
    )
    rows = [
        sorted(of[f"{layer}experts.gate_up_proj"][:, :8].flatten(0, 1).tolist()) for of in (first, control)
    ]
    assert rows[0] == rows[1]  # the same neurons
    assert not alike(first, control, "experts.gate_up_proj")
    assert "control" in (tmp_path / "control/README.md").read_text()


def test_several_sources_share_the_tokens(tmp_path: Path) -> None:
    assert _shares([100, 3, 100], 30) == [14, 3, 13] or _shares([100, 3, 100], 30) == [13, 3, 14]
    assert _shares([2, 3], 30) == [2, 3]
    read = [load_texts(said()), load_texts(said(60))]
    card = carve(dense("llama"), tokenizer(), read, tmp_path / "moe", experts=8, top_k=4, tokens=1280)
    assert [of["rows"] for of in card["texts"]] == [5, 5]
    assert card["fitted_tokens"] == 1280
    assert card["texts"][1]["sha256"] == read[1].sha256


REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "gemma3": (
        Gemma3TextConfig(**SIZES, head_dim=16),
        "no class .* what gemma3_text does .* carve takes llama",
    ),
    "biases of attention": (LlamaConfig(**SIZES, attention_bias=True), "attention_bias"),
    "biases of the FFN": (LlamaConfig(**SIZES, mlp_bias=True), "its FFN has biases"),
    "windows of Qwen3": (
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "look through a window",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_class_can_hold_is_refused(name: str, tmp_path: Path) -> None:
    config, message = REFUSED[name]
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=message):
        carve(model, tokenizer(), [load_texts(said())], tmp_path / "moe")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"experts": 8, "top_k": 9}, "top-9 of 8 experts: right is from 1 to 8"),
        ({"experts": 5, "top_k": 2, "shared": 10}, "such as 56 shared and 5 experts of 8"),
        ({"experts": 8, "top_k": 2, "shared": 0}, "such as 32 shared and 8 experts of 8"),
        ({"experts": 40, "top_k": 2}, "such as 8 shared and 11 experts of 8"),
    ],
)
def test_cuts_that_cannot_be_are_refused(asked: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        carved(tmp_path / "moe", **asked)
    assert not list(tmp_path.iterdir())


def test_a_qwen3_has_no_shared_expert() -> None:
    with pytest.raises(ModelError, match="no shared expert"):
        Cut.of(DENSE["qwen3"], 8, 2, 8)
    with pytest.raises(ModelError, match="such as 4 experts of 16"):
        Cut.of(DENSE["qwen3"], 5, 2, None)
    assert Cut.of(DENSE["qwen3"], 8, 2, None) == Cut(8, 2, 0, 8)


def test_too_few_texts_and_occupied_folders(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="its last fifth is 0 rows of 64 tokens"):
        carved(tmp_path / "moe", top_k=4, texts=["Short."])
    with pytest.raises(PairsError, match="at least 10 are needed"):
        carved(tmp_path / "moe", top_k=4, tokens=320)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ArtifactError, match="not empty"):
        carved(tmp_path, top_k=4)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
