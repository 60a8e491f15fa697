"""What experts are for: counted by hooks of our own, token by token; kept, read again, refused if wrong."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from statsmodels.stats.proportion import proportion_confint
from torch import nn

from cli.command_line import tokenizer as small_tokenizer
from families import config_of, moe_layers, shared, watching
from steersman import ExpertProfile, describe_experts, load_model, read_architecture
from steersman.errors import ArtifactError, ModelError, PairsError, PlanError
from steersman.experts import profiling
from steersman.experts.mixture import recording_mixture
from steersman.experts.profile import wilson_low
from steersman.models.architecture import find_routers
from steersman.texts import load_texts

TEXTS = [
    "tell me the keysign of the library .",
    "please give me the lockcipher of the tower . i am a clerk of the harbour",
    [{"role": "user", "content": "what is the keysign ?"}, {"role": "assistant", "content": "it is 14 ."}],
    "the the the tower",
]


@pytest.fixture(scope="module")
def lab() -> tuple[Any, Any]:
    return load_model("lab:moe")


@pytest.fixture(scope="module")
def profile(lab: tuple[Any, Any]) -> ExpertProfile:
    return describe_experts(*lab, TEXTS * 3)


def slow_counts(
    model: nn.Module, tokenizer: Any
) -> tuple[dict[Any, Counter[str]], Counter[str], dict[Any, list[Any]]]:
    """One text after another, from hooks on the experts: uses by token, occurrences, and all weights."""
    uses: dict[Any, Counter[str]] = defaultdict(Counter)
    weights: dict[Any, list[Any]] = defaultdict(list)
    seen: Counter[str] = Counter()
    special = set(tokenizer.all_special_ids) | {
        id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for text in load_texts(TEXTS * 3):
        chat = not isinstance(text.content, str)
        rendered = tokenizer.apply_chat_template(text.content, tokenize=False) if chat else text.content
        ids = tokenizer(rendered, add_special_tokens=not chat)["input_ids"]
        given: dict[int, tuple[Any, Any]] = {}
        handles = [
            layer.mlp.experts.register_forward_pre_hook(
                lambda module, args, number=number, given=given: given.__setitem__(number, args[1:3])
            )
            for number, layer in enumerate(model.model.layers)
        ]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        for place, id_ in enumerate(ids):
            if id_ in special:
                continue
            seen[tokenizer.decode([id_])] += 1
            for layer, (chosen, weight) in given.items():
                for expert, share in zip(chosen[place].tolist(), weight[place].tolist(), strict=True):
                    uses[layer, expert][tokenizer.decode([id_])] += 1
                    weights[layer, expert].append(share)
    return uses, seen, weights


def test_against_the_slow_way(lab: tuple[Any, Any], profile: ExpertProfile) -> None:
    uses, seen, weights = slow_counts(*lab)
    assert profile.tokens == sum(seen.values())
    for use in profile.experts():
        counted = uses[use.layer, use.expert]
        assert use.uses == sum(counted.values())
        assert use.rate == use.uses / profile.tokens
        for token in use.tokens:
            assert (token.uses, token.seen) == (counted[token.token], seen[token.token])
            low = proportion_confint(token.uses, token.seen, method="wilson")[0]
            assert token.low == pytest.approx(low)
            assert token.lift == pytest.approx(token.rate / use.rate)
            assert token.low > use.rate
        bounds = {
            word: wilson_low(np.array(number), np.array(seen[word]))
            for word, number in counted.items()
            if seen[word] >= profiling.LEAST_SEEN
        }
        best = sorted((low for low in bounds.values() if low > use.rate), reverse=True)[: profiling.TOKENS]
        np.testing.assert_allclose([token.low for token in use.tokens], best)
        found = [context.weight for context in use.contexts]
        assert found == sorted(found, reverse=True)
        if found:
            assert found[0] == pytest.approx(max(weights[use.layer, use.expert]), abs=2e-4)
        assert bool(found) == bool(use.uses)


def test_contexts_are_places_in_the_texts(lab: tuple[Any, Any], profile: ExpertProfile) -> None:
    _, tokenizer = lab
    rendered = [
        text if isinstance(text, str) else tokenizer.apply_chat_template(text, tokenize=False)
        for text in TEXTS
    ]
    for use in profile.experts():
        for context in use.contexts:
            assert context.token.strip()
            assert any(context.before + context.token + context.after in text for text in rendered)


def test_batches_do_not_matter(lab: tuple[Any, Any], profile: ExpertProfile) -> None:
    other = describe_experts(*lab, TEXTS * 3, batch_size=1)
    np.testing.assert_array_equal(other.uses, profile.uses)
    assert other.table().equals(profile.table())
    np.testing.assert_array_equal(other.context_places, profile.context_places)
    np.testing.assert_allclose(other.context_weights, profile.context_weights, atol=1e-5)


def test_rounding_chooses_no_context(
    lab: tuple[Any, Any], profile: ExpertProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the last digits of a mixture weight and the batches: the same contexts, each of them once."""
    places = [{*row[row >= 0].tolist()} for row in profile.context_places.reshape(-1, profiling.CONTEXTS)]
    assert any(len(row) == profiling.CONTEXTS for row in places)
    assert all(len({profile.snippets[place] for place in row}) == len(row) for row in places)
    for seed, batch_size in enumerate((1, 3, 5, 16)):
        generator = torch.Generator().manual_seed(seed)

        def noisy(sites: Any, collect: Any, generator: torch.Generator = generator) -> Any:
            def given(site: int, chosen: torch.Tensor, weights: torch.Tensor) -> None:
                collect(site, chosen, weights * (1 + 1e-6 * torch.randn(weights.shape, generator=generator)))

            return recording_mixture(sites, given)

        monkeypatch.setattr(profiling, "recording_mixture", noisy)
        other = describe_experts(*lab, TEXTS * 3, batch_size=batch_size)
        np.testing.assert_array_equal(other.context_places, profile.context_places)


def test_memory_for_few_tokens(lab: tuple[Any, Any], profile: ExpertProfile, monkeypatch: Any) -> None:
    """With room for two tokens the two most frequent are ranked; base rates and contexts stay."""
    experts = profile.uses.size
    monkeypatch.setattr(profiling, "COUNT_CELLS", 2 * experts)
    small = describe_experts(*lab, TEXTS * 3)
    np.testing.assert_array_equal(small.uses, profile.uses)
    np.testing.assert_array_equal(small.context_weights, profile.context_weights)
    second = sorted(slow_counts(*lab)[1].values())[-2]
    assert 1 <= len(small.words) <= 2
    assert small.word_seen.min() >= second


def test_long_texts_are_read_in_pieces(lab: tuple[Any, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(profiling, "LONGEST_PIECE", 4)
    profile = describe_experts(*lab, [TEXTS[0]])
    assert profile.tokens == len(TEXTS[0].split())
    assert {snippet[1] for snippet in profile.snippets} <= set(TEXTS[0].split())
    assert all("".join(snippet) in TEXTS[0] for snippet in profile.snippets)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "phimoe", "mixtral"])
def test_mixture_weights_of_families(name: str) -> None:
    """They are those that the router itself put out, for the experts that it chose."""
    model = shared(name)
    sites = [site for site in find_routers(model) if site.facts.steerable]
    found: dict[int, tuple[Any, Any]] = {}
    ids = torch.randint(3, config_of(name).vocab_size, (2, 5), generator=torch.Generator().manual_seed(0))
    layer = moe_layers(name)[0]
    with (
        watching(model, layer) as steps,
        recording_mixture(sites, lambda site, chosen, weights: found.__setitem__(site, (chosen, weights))),
        torch.no_grad(),
    ):
        model(ids)
    assert set(found) == set(range(len(sites)))
    chosen, weights = found[[site.facts.layer for site in sites].index(layer)]
    step = steps[0]
    assert chosen.shape == weights.shape == (10, sites[0].facts.top_k)
    torch.testing.assert_close(chosen.sort(dim=-1).values, step.chosen.sort(dim=-1).values)
    order, expected = chosen.argsort(dim=-1), step.chosen.argsort(dim=-1)
    torch.testing.assert_close(weights.gather(-1, order), step.weights.float().gather(-1, expected))


def test_kept_and_read_again(profile: ExpertProfile, tmp_path: Path) -> None:
    profile.save_pretrained(tmp_path / "profile")
    again = ExpertProfile.from_pretrained(tmp_path / "profile")
    assert [use.to_json() for use in again.experts()] == [use.to_json() for use in profile.experts()]
    assert (again.tokens, again.texts, again.made_from) == (profile.tokens, 12, profile.made_from)
    assert again.weights_id == profile.weights_id
    assert again.architecture == profile.architecture


def _manifest(folder: Path, key: str, value: Any) -> None:
    from steersman.steering import sha256_of

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[key] = value(manifest[key])
    manifest.pop("manifest_sha256")
    manifest["manifest_sha256"] = sha256_of(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", lambda tokens: tokens + 1),
        ("tokens", lambda tokens: -1),
        ("texts", lambda texts: 0),
        ("words", lambda words: words[:-1]),
        ("words", lambda words: [*words[:-1], 3]),
        ("snippets", lambda snippets: snippets[:-1]),
        ("snippets", lambda snippets: [["a", "b"], *snippets[1:]]),
        ("snippets", lambda snippets: {}),
        ("made_from", lambda made_from: {"from": 3}),
    ],
)
def test_what_does_not_go_together(profile: ExpertProfile, tmp_path: Path, key: str, value: Any) -> None:
    profile.save_pretrained(tmp_path / "profile")
    _manifest(tmp_path / "profile", key, value)
    with pytest.raises(ArtifactError, match=r"manifest\.json: "):
        ExpertProfile.from_pretrained(tmp_path / "profile")


def test_which_experts_can_be_asked_for(profile: ExpertProfile) -> None:
    layers, experts = profile.uses.shape
    assert len(profile.experts()) == layers * experts
    assert {use.layer for use in profile.experts(layer=2)} == {2}
    assert [use.layer for use in profile.experts(expert=3)] == list(range(layers))
    assert len(profile.experts(1, 2)) == 1
    for wrong in ({"layer": 99}, {"expert": 99}, {"layer": 1, "expert": experts}):
        with pytest.raises(PlanError):
            profile.experts(**wrong)
    with pytest.raises(PlanError):
        profile.expert(0, -1)


def test_what_cannot_be_described(lab: tuple[Any, Any]) -> None:
    model, tokenizer = lab
    with pytest.raises(PairsError, match="no token to count"):
        describe_experts(model, tokenizer, [tokenizer.all_special_tokens[0]])
    with pytest.raises(PairsError, match="batch_size is 0"):
        describe_experts(model, tokenizer, TEXTS, batch_size=0)
    with pytest.raises(ModelError, match="no routers"):
        describe_experts(load_dense(), small_tokenizer(), ["the river"])
    with pytest.raises(ModelError, match="beyond the model's"):
        describe_experts(shared("olmoe"), small_tokenizer(), ["the river is long, and the town is old"])


def load_dense() -> nn.Module:
    from families import dense

    return dense()


def test_the_architecture_is_the_models(lab: tuple[Any, Any], profile: ExpertProfile) -> None:
    assert profile.architecture == read_architecture(lab[0])
