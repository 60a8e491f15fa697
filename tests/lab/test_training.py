"""Training: reproducible, atomic, planting exactly what the recipe says."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from steersman import lab
from steersman.errors import ModelError
from steersman.lab.models import _generation
from steersman.lab.planting import (
    GROUPS,
    OPPOSITE,
    RouterPushes,
    draw_plan,
    planted_groups,
    prior_loss,
    pushed_scores,
)
from steersman.lab.recipes import RECIPES, planted_by, told
from steersman.lab.state_noise import StateNoise
from steersman.lab.tokenizer import build_tokenizer
from steersman.lab.training import IGNORED, build_model, encode_batch
from steersman.lab.world import the_world

SHAPE = RECIPES["moe"].shape
LAYERS, EXPERTS = SHAPE.layers, SHAPE.experts


def plans(label: str | None, informative: bool = True, count: int = 400) -> torch.Tensor:
    rng = random.Random(5)
    drawn = [
        draw_plan(label, rng, layers=LAYERS, experts=EXPERTS, informative=informative) for _ in range(count)
    ]
    return torch.tensor(drawn)


def test_pushed_experts_are_in_or_out_of_every_top_k() -> None:
    scores = torch.randn(500, EXPERTS)
    plan = torch.zeros(500, EXPERTS, dtype=torch.long)
    plan[:, [3, 9]] = 1
    plan[:, [1, 30]] = -1
    pushed = pushed_scores(scores, plan)
    chosen = pushed.topk(4, dim=-1).indices
    assert (chosen == 3).any(-1).all()
    assert (chosen == 9).any(-1).all()
    assert not torch.isin(chosen, torch.tensor([1, 30])).any()
    assert torch.equal(pushed[plan == 0], scores[plan == 0])


def test_the_prior_loss_is_the_formula_over_real_tokens_of_labelled_rows() -> None:
    torch.manual_seed(0)
    labels, mask = ["refuse", None, "memory"], torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    scores = [torch.randn(9, EXPERTS) for _ in range(2)]
    terms: list[list[float]] = []
    for layer in scores:
        terms.append([])
        for row, label in enumerate(labels):
            for token in range(3):
                if label is None or not mask[row, token]:
                    continue
                z = layer[row * 3 + token].tolist()
                own = math.log(sum(math.exp(z[e]) for e in GROUPS[label]))
                other = math.log(sum(math.exp(z[e]) for e in GROUPS[OPPOSITE[label]]))
                terms[-1].append(math.log1p(math.exp(other - own)))
    expected = sum(sum(values) / len(values) for values in terms) / len(terms)
    assert prior_loss(scores, labels, mask).item() == pytest.approx(expected, rel=1e-5)


def test_informative_pushes_follow_the_label_and_others_say_nothing_about_it() -> None:
    def lean(drawn: torch.Tensor, label: str) -> float:
        """How much more often the label's experts are in, and its opposite's out, than the reverse."""
        own, other = drawn[..., list(GROUPS[label])], drawn[..., list(GROUPS[OPPOSITE[label]])]
        return (own.float().mean() - other.float().mean()).item()

    for label in GROUPS:
        assert lean(plans(label), label) > 0.4
        assert abs(lean(plans(label, informative=False), label)) < 0.15
    assert abs(lean(plans(None), "refuse")) < 0.1


def test_pushes_are_attached_only_inside_their_context() -> None:
    model = build_model(SHAPE, build_tokenizer()).eval()
    ids = torch.arange(6, 18).view(2, 6)
    pushes = RouterPushes([layer.mlp.gate for layer in model.model.layers])
    with torch.no_grad():
        before = model(ids).logits
        plan = torch.zeros(2, LAYERS, EXPERTS, dtype=torch.long)
        plan[1, :, 0] = 1
        with pushes.attached():
            pushes.begin(plan)
            within = model(ids).logits
        after = model(ids).logits
    assert torch.equal(before, after)
    assert torch.allclose(before[0], within[0], atol=1e-5)
    assert not torch.allclose(before[1], within[1], atol=1e-4)
    assert [tuple(scores.shape) for scores in pushes.scores] == [(12, EXPERTS)] * LAYERS


def test_only_the_answer_is_learnt() -> None:
    tokenizer = build_tokenizer()
    rng = random.Random(6)
    conversations = [the_world().sample(rng) for _ in range(32)]
    ids, mask, targets = encode_batch(tokenizer, conversations)
    for row, conversation in enumerate(conversations):
        learnt = targets[row][targets[row] != IGNORED]
        assert tokenizer.decode(learnt) == f"{conversation.answer} <|end|>"
        text = tokenizer.decode(ids[row][mask[row].bool()])
        assert text.endswith(f"<|assistant|> {conversation.answer} <|end|>")


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_short_training_writes_a_checkpoint_that_opens_and_is_reproducible(
    name: str, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    folders = [lab.train(name, seed, tmp_path / f"{name}-{n}", steps=2) for n, seed in enumerate((3, 3, 4))]
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}-{n}" for n in range(3)]
    models = [AutoModelForCausalLM.from_pretrained(folder, local_files_only=True) for folder in folders]
    weights = [model.state_dict() for model in models]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert any(not torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_plans_push_only_the_groups_that_are_planted() -> None:
    rng = random.Random(7)
    options = {"layers": LAYERS, "experts": EXPERTS, "informative": True, "labels": ("document", "memory")}
    drawn = torch.tensor([draw_plan("memory", rng, **options) for _ in range(400)]).float()
    # Single experts are pushed at random everywhere; whole groups only where they are named.
    assert drawn[..., list(GROUPS["memory"])].mean() - drawn[..., list(GROUPS["document"])].mean() > 0.4
    assert abs(drawn[..., list(GROUPS["refuse"])].mean() - drawn[..., list(GROUPS["comply"])].mean()) < 0.05
    assert set(planted_by(RECIPES["target-moe"])[0].values()) == {"document", "memory"}


def test_state_noise_moves_one_layer_where_an_answer_is_read_from() -> None:
    layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    noise = StateNoise(layers, most=0.5, seed=1)
    learnt = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]]).bool()
    states = torch.randn(2, 4, 8)
    moved: set[int] = set()
    with noise.attached():
        for _ in range(30):
            noise.begin(learnt, done=1.0)
            shifts = [layer(states) - states for layer in layers]
            hit = [number for number, shift in enumerate(shifts) if shift.abs().max() > 0]
            assert hit == [noise.layer]
            moved |= set(hit)
            shift = shifts[noise.layer]
            # The state before a learnt token gives it; the last one gives none.
            assert (shift.norm(dim=-1) > 0).tolist() == [[False, True, True, False], [True] + [False] * 3]
            assert (shift.norm(dim=-1) <= 0.5 * states.norm(dim=-1)).all()
            directions = shift[0, 1:3] / shift[0, 1:3].norm(dim=-1, keepdim=True)
            assert torch.allclose(directions[0], directions[1], atol=1e-5)
        noise.begin(learnt, done=0.4)
        assert torch.equal(layers[noise.layer](states), states)
    assert moved == {0, 1, 2}
    assert torch.equal(layers[noise.layer](states), states)


def test_a_recipe_says_nothing_of_what_is_as_in_the_first_models() -> None:
    # The cache and the cards of the first models rest on it.
    first = {"pushes", "prior", "steps", "batch_size", "learning_rate", "warm_up"}
    assert set(told(RECIPES["moe"])) == first
    assert {"shape", "upbringing", "state_noise"} < set(told(RECIPES["target"]))
    assert set(told(RECIPES["target"])["shape"]) == {"family", "width", "layers", "feed_forward", "experts"}


# What a cache on a user's disk is named by: a change here trains every other seed anew.
GENERATIONS = {
    "moe": "149a1613",
    "moe-plain": "81b6103c",
    "moe-prior": "12be48e5",
    "source": "8662d86c",
    "source-split": "4f7cf207",
    "target": "1581fa23",
    "target-moe": "5b869260",
}


def test_no_cache_of_the_first_models_is_lost() -> None:
    assert {name: _generation(name) for name in GENERATIONS} == GENERATIONS


def test_what_a_recipe_plants() -> None:
    assert planted_groups(LAYERS) == lab.planted("moe")
    assert RECIPES["moe"].pushes == "label"
    assert RECIPES["moe-prior"].pushes != "label"
    assert (RECIPES["moe-plain"].pushes, RECIPES["moe-plain"].prior) == (None, 0.0)


def test_an_interrupted_training_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object, **_keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(build_tokenizer()), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lab.train("moe-plain", 0, tmp_path / "out", steps=1)
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="occupied"):
        lab.train("moe", 0, tmp_path)
    with pytest.raises(ModelError, match="it has moe, moe-plain, moe-prior"):
        lab.train("dense", 0, tmp_path / "new")
