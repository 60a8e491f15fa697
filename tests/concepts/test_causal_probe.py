"""The gate's causal probe: a concept that makes its own side likelier, one that does not, and chance."""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from concepts import twins
from experts.test_counting import WORDS, tokenizer
from steersman import (
    AffineMap,
    ConceptVector,
    ContrastPair,
    ContrastPairs,
    PlanError,
    Steering,
    check_transplant,
    refine_concept,
    transplant,
)
from steersman.certainty import SIGNIFICANT
from steersman.concepts import causal_probe, transplant_check
from steersman.concepts.causal_probe import BEYOND, NO_PROMPT, NOT_PASSED, PRINCIPAL, Probe
from steersman.concepts.dose import DEFAULT_DOSE, Strength
from steersman.concepts.fitting import fit_affine_map
from steersman.concepts.relabelling import balanced, raised


@functools.cache
def model() -> nn.Module:
    """A twin that says the words that its states point to."""
    made = copy.deepcopy(twins.source())
    with torch.no_grad():
        made.lm_head.weight.copy_(made.get_decoder().embed_tokens.weight)
    return made


@functools.cache
def bridge() -> AffineMap:
    return fit_affine_map((model(), tokenizer()), (model(), tokenizer()), twins.texts())


def pairs_of(number: int = 48, seed: int = 0, flip: bool = False, one_prompt: bool = True) -> ContrastPairs:
    """Sides that go on from one prompt with one of two words; with labels by chance, group by group."""
    draw = random.Random(seed)

    def pair(n: int) -> ContrastPair:
        prompts = [" ".join(draw.choices(WORDS[2:], k=4)) for _ in range(2)]
        one, other = prompts[0], prompts[0 if one_prompt else 1]
        first, second = (1, 0) if flip and draw.random() < 0.5 else (0, 1)
        return ContrastPair(
            f"{one} {WORDS[first]}", f"{other} {WORDS[second]}", WORDS[first], WORDS[second],
            group=f"g{n}", id=str(n),
        )  # fmt: skip

    return ContrastPairs(map(pair, range(number)), f"forks-{seed}.jsonl")


@functools.cache
def concept() -> ConceptVector:
    return refine_concept(model(), tokenizer(), pairs_of())


def turned(of: ConceptVector) -> ConceptVector:
    """One whose vectors point the other way, whatever its pairs say."""
    return replace(of, fold_vectors=-of.fold_vectors, vectors={n: -v for n, v in of.vectors.items()})


def test_a_concept_raises_its_own_side_as_a_slow_version_says() -> None:
    """The last layer: pair by pair the direction of the other folds, added to the prompt's last token."""
    pairs, layer = pairs_of(), 2
    found = check_transplant(bridge(), concept(), layers=[layer], strength="dose:0.2").layers[layer]
    assert found.probe is not None
    changes = []
    held = [n for n, pair in enumerate(pairs) if hash_of(pair) not in bridge().fitted_groups]
    for n in held:
        vector = bridge().maps[layer].weight.double() @ concept().fold_vectors[n % 5, layer].double()
        length = 0.2 * bridge().norms[layer].median
        plan = Steering.from_vectors(model(), {layer: (vector * length / vector.norm()).float()})
        ids = torch.tensor([tokenizer()(pairs[n].positive)["input_ids"][:-1]])
        words = tokenizer()(f"{WORDS[0]} {WORDS[1]}")["input_ids"][-2:]
        with torch.no_grad():
            plain = model()(ids).logits[0, -1, words]
            with plan.apply(model(), prompt_lengths=[ids.shape[1]]):
                steered = model()(ids).logits[0, -1, words]
        changes.append(float((steered - plain) @ torch.tensor([1.0, -1.0])))
    assert len(changes) == len(pairs)
    assert found.probe.change == pytest.approx(np.mean(changes), rel=1e-3)
    assert 0 < found.probe.low < found.probe.change < found.probe.high
    assert found.probe.p == 1 / (1 + causal_probe.DRAWS)
    assert found.passed


def hash_of(pair: ContrastPair) -> int:
    from steersman.models.encoding import hash_of_cluster

    return hash_of_cluster(pair.cluster)


def test_a_concept_that_lowers_its_own_side_is_refused_by_name() -> None:
    """Its pairs lie apart along it as well as they should; what adds it does the reverse."""
    other = turned(concept())
    check = check_transplant(bridge(), other)
    assert not check.passed
    asked = [one for one in check.layers.values() if one.probe is not None]
    assert asked
    assert all(one.arrives and one.probe.change < 0 and one.probe.p > 0.5 for one in asked if one.probe)
    with pytest.raises(
        PlanError, match=r"lie apart along .* but adding it does not raise the log-odds of its own side"
    ):
        transplant(bridge(), other, "dose:0.2")
    forced = transplant(bridge(), other, "dose:0.2", layers=2, pairs=pairs_of(), force=True)
    (entry,) = forced.provenance["gate"]["layers"]
    assert entry["probe"]["change"] < 0
    assert not entry["passed"]


def test_the_probe_adds_the_strength_that_is_asked_for_whatever_its_sign() -> None:
    one, less, reverse = (
        check_transplant(bridge(), concept(), layers=[2], strength=strength).layers[2].probe
        for strength in (1.0, 0.5, -1.0)
    )
    assert one is not None and less is not None  # noqa: PT018
    assert one.change > 1.2 * less.change > 0
    assert reverse == one


def test_where_the_probe_cannot_be_asked_it_says_why() -> None:
    def why(of: ConceptVector, pairs: ContrastPairs) -> set[str]:
        found = check_transplant(bridge(), of, pairs=pairs)
        assert all(entry.probe is None for entry in found.layers.values())
        assert found.passed
        return {entry.unprobed for entry in found.layers.values()}

    apart = pairs_of(one_prompt=False)
    assert why(refine_concept(model(), tokenizer(), apart), apart) == {NO_PROMPT}
    top = refine_concept(model(), tokenizer(), pairs_of(), method="pca")
    assert why(top, pairs_of()) == {PRINCIPAL}
    mixed = ContrastPairs([*pairs_of(5), *pairs_of(40, 1, one_prompt=False)[5:]], "mixed.jsonl")
    found = why(refine_concept(model(), tokenizer(), mixed), mixed)
    assert found == {"of the pairs that go on from one prompt only 5 groups are held out"}
    nothing = check_transplant(bridge(), refine_concept(model(), tokenizer(), twins.noise_pairs()))
    assert {entry.unprobed for entry in nothing.layers.values()} == {NOT_PASSED}


def text_of(positive: Any, negative: Any, **targets: str) -> Any:
    pairs = ContrastPairs([ContrastPair(positive, negative, **targets)], "one")
    return causal_probe.forks(model(), tokenizer(), pairs)[1]


def test_which_pairs_go_on_from_one_prompt() -> None:
    w = WORDS
    (text,) = text_of(f"{w[2]} {w[3]} {w[4]} {w[0]} {w[7]}", f"{w[2]} {w[3]} {w[4]} {w[1]}")
    words = [tokenizer()(word)["input_ids"][-1] for word in (w[0], w[1])]
    assert [(place, token, weight) for place, token, weight in text.scored] == [
        (len(text.ids) - 1, words[0], 1.0), (len(text.ids) - 1, words[1], -1.0),
    ]  # fmt: skip
    assert text.prompt_length == len(text.ids)
    # A common first word is no prompt; a text that only goes on is no side; whole targets may be short.
    assert not text_of(f"{w[2]} {w[3]} {w[4]} {w[0]} {w[7]}", f"{w[2]} {w[5]} {w[6]} {w[1]} {w[7]}")
    assert not text_of(f"{w[2]} {w[3]} {w[4]}", f"{w[2]} {w[3]} {w[4]} {w[1]}")
    assert text_of(
        f"{w[2]} {w[0]} {w[3]} {w[4]}", f"{w[2]} {w[1]} {w[3]} {w[4]}",
        positive_target=f"{w[0]} {w[3]}", negative_target=f"{w[1]} {w[3]}",
    )  # fmt: skip
    asks = [[{"role": "user", "content": word}] for word in w[:2]]
    assert not text_of(*asks)
    (text,) = text_of(*([*asks[0], {"role": "assistant", "content": word}] for word in w[3:5]))
    assert text.prompt_length == len(text.ids)
    assert not text_of(*([*ask, {"role": "assistant", "content": w[3]}] for ask in asks))


def test_only_the_layers_with_the_largest_z_are_asked_unless_they_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transplant_check, "LAYERS", 1)
    found = check_transplant(bridge(), concept())
    asked = [layer for layer, entry in found.layers.items() if entry.probe is not None]
    best = max(found.layers.values(), key=lambda entry: entry.z)
    assert asked == [best.layer]
    others = [entry for entry in found.layers.values() if entry.layer != best.layer]
    assert all(entry.unprobed == BEYOND and entry.arrives and not entry.passed for entry in others)
    named = check_transplant(bridge(), concept(), layers=[0, 1, 2])
    assert all(entry.probe is not None for entry in named.layers.values())


# Chance -----------------------------------------------------------------------------------------------------


def probed(seed: int, layers: list[int]) -> dict[int, Probe]:
    """The probe alone, whatever the gate says, with labels that mean nothing."""
    pairs = pairs_of(24, seed, flip=True)
    of = refine_concept(model(), tokenizer(), pairs)
    asked = transplant_check._asked(bridge(), of, (model(), tokenizer()), pairs)
    dose = Strength.parse(DEFAULT_DOSE)
    return causal_probe.probe(bridge(), of, (model(), tokenizer()), asked, layers, dose, draws=19, seed=seed)


def test_a_few_nulls_hardly_pass() -> None:
    passed = sum(probed(seed, [2])[2].p <= SIGNIFICANT for seed in range(100, 106))
    assert passed <= 2


@pytest.mark.long
def test_of_200_nulls_at_most_15_pass() -> None:
    passed = sum(
        any(one.p <= SIGNIFICANT for one in probed(seed, [1, 2]).values()) for seed in range(1000, 1200)
    )
    assert passed <= 15


@pytest.mark.parametrize("null", ["both", "source", "target"])
def test_labels_that_mean_nothing_in_one_model_pass_as_rarely(null: str) -> None:
    """Pure maths: changes linear in the concept, K of a real effect; 200 draws of labels, three layers."""
    generator, passed, units = np.random.default_rng(3), 0, 20
    for seed in range(200):
        effects = generator.normal(size=(3, units, units)) + 0.5  # of unit b's difference on unit a's d
        here = generator.choice([-1.0, 1.0], units) if null != "target" else np.ones(units)
        there = {"both": here, "source": np.ones(units)}.get(null, generator.choice([-1.0, 1.0], units))
        signs = balanced(units, 19, seed)
        concepts = np.concatenate([signs[:1], signs[1:] - signs[1:].mean(1, keepdims=True)]) * here
        changes = np.einsum("lab,cb->lca", effects * (1 - np.eye(units)), concepts)
        changes /= np.linalg.norm(changes, axis=2, keepdims=True)  # one dose
        passed += bool((raised(changes * there, signs) <= SIGNIFICANT).any())
    assert passed <= 15
