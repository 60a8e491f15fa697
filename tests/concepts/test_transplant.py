"""Transplantation between twins: exact where the twins are, refused by the gate where nothing arrives."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import families as f
from concepts import twins
from concepts.test_refinement import slow_states
from experts.test_counting import tokenizer
from steersman import (
    AffineMap,
    ArchitectureMismatch,
    ContrastPairs,
    ModelError,
    PairsError,
    PlanError,
    TransplantCheck,
    WeightsMismatch,
    check_transplant,
    refine_concept,
    transplant,
)
from steersman.chat_record import ChatRecord
from steersman.concepts.directions import fold_of
from steersman.concepts.relabelling import Arrival, labellings
from steersman.concepts.separation import Separation, separation
from steersman.concepts.transplant_check import LayerCheck, rank
from steersman.edits import ResidualEdit

TARGET = (twins.target(), tokenizer())


@pytest.fixture(scope="module")
def check() -> TransplantCheck:
    return check_transplant(twins.bridge(), twins.concept())


def test_a_concept_arrives_where_the_target_has_it(check: TransplantCheck) -> None:
    """h_target = Q h_source, so that W v is Q v, and the sides lie apart as at the source."""
    concept = twins.concept()
    steering = transplant(twins.bridge(), concept, 2.0, layers="all")
    (edit,) = steering.edits
    assert isinstance(edit, ResidualEdit)
    assert (edit.layers, edit.strength, edit.scope, edit.operation) == ((0, 1, 2), 2.0, "answer", "add")
    for layer, vector in edit.vectors.items():
        expected = twins.basis().double() @ concept.vectors[layer].double()
        assert (vector.double() - expected).norm() < 0.02 * expected.norm()
        found = check.layers[layer]
        assert found.separation == found.at_source == concept.separation[layer]
        assert found.share_explained > 0.99
    assert steering.weights_id == twins.bridge().weights_id
    with steering.apply(twins.target()) as receipt, torch.no_grad():
        twins.target()(torch.tensor([[5, 6, 7]]))
    assert receipt.tokens == {f"block_output:{layer}": 1 for layer in range(3)}


def test_a_steered_twin_says_what_the_steered_source_says() -> None:
    """The whole chain: adding Q v to the target is adding v to the source."""
    concept, ids = twins.concept(), torch.tensor([[20, 31, 12, 40]])
    own = concept.steering(1.5, layers=1)
    there = transplant(twins.bridge(), concept, 1.5, layers=1)
    with torch.no_grad():
        with own.apply(twins.source()):
            expected = twins.source()(ids).logits
        plain = twins.source()(ids).logits
        with there.apply(twins.target()):
            found = twins.target()(ids).logits
    moved = (expected - plain).abs().max()
    assert moved > 0.05
    assert (found - expected).abs().max() < 0.05 * moved


def test_the_check_is_that_of_a_slow_version(check: TransplantCheck) -> None:
    """Fold by fold: one text at a time, W times each fold's direction, all 99 shuffled ones."""
    concept, bridge, pairs = twins.concept(), twins.bridge(), twins.concept_pairs()
    clusters = [pair.cluster for pair in pairs]
    numbers = np.array([list(dict.fromkeys(clusters)).index(name) for name in clusters])
    folds, layer = fold_of(numbers), 1
    states = np.array(
        [
            [slow_states(twins.target(), tokenizer()(side)["input_ids"])[layer][-1].numpy() for side in sides]
            for sides in ((pair.positive, pair.negative) for pair in pairs)
        ]
    )
    weight = bridge.maps[layer].weight.numpy()
    mapped = concept.fold_vectors[:, layer].double().numpy() @ weight.T
    scores = np.array([states[n] @ mapped[folds[n]] for n in range(len(pairs))])
    expected = separation(scores[:, 0], scores[:, 1], numbers, folds)
    found = check.layers[layer]
    assert expected is not None
    assert found.separation == pytest.approx(expected)
    assert found.arrival is not None
    assert found.arrival.carried == pytest.approx((scores[:, 0] - scores[:, 1]).mean(), rel=1e-4)


def test_relabelled_groups_are_refitted_and_judged_like_the_true_ones() -> None:
    """The p-value of one layer by loops: sides swapped, the concept refined and looked at anew by folds."""
    pairs = twins.noise_pairs(24)
    concept = refine_concept(twins.source(), tokenizer(), pairs)
    (found,) = check_transplant(twins.bridge(), concept, layers=[1]).layers.values()
    weight = twins.bridge().maps[1].weight.numpy()
    states = np.array(
        [
            [
                [slow_states(model, tokenizer()(side)["input_ids"])[1][-1].numpy() for side in sides]
                for sides in ((pair.positive, pair.negative) for pair in pairs)
            ]
            for model in (twins.source(), twins.target())
        ]
    )
    (at_source, at_target) = states[:, :, 0] - states[:, :, 1]
    groups = np.arange(24) // 2
    signs = labellings(12)

    def arriving(source: np.ndarray, target: np.ndarray) -> float:
        """The mean held-out projection, labels of groups at the source and at the target."""
        total = 0.0
        for fold in range(5):
            others, own = groups % 5 != fold, groups % 5 == fold
            vector = (source[groups[others], None] * at_source[others]).mean(0)
            total += (target[groups[own], None] * at_target[own] @ (weight @ vector)).sum()
        return total / 24

    one = np.ones(12)
    shares = []
    for kind in ((lambda s: (s, s)), (lambda s: (one, s)), (lambda s: (s, one))):
        all_of = np.array([arriving(*kind(s)) for s in signs])
        shares.append((all_of >= all_of[0] - 1e-9).mean())
    assert found.arrival is not None
    assert found.arrival.p == pytest.approx(max(shares), abs=0.003)  # near ties, in float32


def test_pairs_that_it_was_not_refined_from_are_looked_at_along_the_whole_direction() -> None:
    other = twins.concept_pairs(number=40, seed=8)
    renamed = ContrastPairs((replace(p, group=f"new {p.group}") for p in other), "other.jsonl")
    found = check_transplant(twins.bridge(), twins.concept(), pairs=renamed, layers=[1]).layers[1]
    whole = replace(twins.concept(), fold_vectors=twins.concept().vectors[1].repeat(5, 3, 1))
    same = check_transplant(twins.bridge(), whole, pairs=renamed, layers=[1]).layers[1]
    assert found.separation == same.separation
    assert found.separation is not None
    assert found.separation.auroc > 0.95


@pytest.mark.parametrize("noise", [False, True])
def test_the_gate_refuses_what_does_not_arrive(noise: bool) -> None:
    """Noise; and a concept that the target has forgotten, through a map that is perfect otherwise."""
    bridge = twins.bridge(forgets=not noise)
    assert min(of_layer.r2 for of_layer in bridge.maps.values()) > 0.99
    with pytest.raises(PlanError, match=r"not transplanted: at layer \d .* force it to try"):
        transplant(bridge, twins.concept(noise), 1.0)
    forced = transplant(bridge, twins.concept(noise), 1.0, layers=2, pairs=_pairs(noise), force=True)
    gate = forced.provenance["gate"]
    assert (gate["asked"], gate["passed"], gate["forced"]) == (True, False, True)
    assert gate["layers"][0]["layer"] == 2
    unasked = transplant(bridge, twins.concept(noise), 1.0, layers=2, force=True)
    assert unasked.provenance["gate"] == {"asked": False, "passed": False, "forced": True}
    assert unasked.fingerprint == forced.fingerprint


def _pairs(noise: bool) -> ContrastPairs:
    return twins.noise_pairs() if noise else twins.concept_pairs()


def test_doses_are_shares_of_the_targets_norms() -> None:
    for strength, dose in (("dose:0.7", 0.7), ("dose:-0.2", -0.2)):
        steering = transplant(twins.bridge(), twins.concept(), strength, layers=[1])
        (edit,) = steering.edits
        assert isinstance(edit, ResidualEdit)
        added = edit.strength * float(edit.vectors[1].norm())
        assert added / twins.bridge().norms[1].median == pytest.approx(dose)
        assert steering.provenance["doses"] == {"1": pytest.approx(dose)}
        assert steering.provenance["map"]["layers"]["1"]["source_layer"] == 1


# The gate, from what was found ------------------------------------------------------------------------------


def layer_check(
    p: float | None, *, layer: int = 0, z: float = 9.0, low: float = 0.6, **changes: Any
) -> LayerCheck:
    values = {
        "layer": layer,
        "source_layer": 0,
        "arrival": None if p is None else Arrival(1.0, z, p),
        "map_p": 0.001,
        "separation": Separation(min(1.0, low + 0.05), low, 1.0),
        "at_source": None,
        "share_explained": 0.5,
        "length": 1.0,
        "gap": 0.5,
    }
    return LayerCheck(**{**values, **changes})  # type: ignore[arg-type]


def check_of(*layers: LayerCheck, depth: int = 4) -> TransplantCheck:
    return TransplantCheck({one.layer: one for one in layers}, {"name": "p", "sha256": ""}, 9, 9, 0, 0, depth)


def test_both_the_concept_and_the_map_must_be_beyond_chance() -> None:
    assert layer_check(0.05).passed
    assert not layer_check(0.051).passed
    assert not layer_check(None).passed
    assert layer_check(0.001, map_p=0.05).passed
    assert not layer_check(0.001, map_p=0.06).passed
    assert layer_check(0.001, low=0.1).passed  # an AUROC describes
    assert [layer_check(p, low=low).verdict for p, low in ((0.01, 0.1), (0.5, 0.1), (0.5, 0.46))] == [
        "shown", "cannot tell", "cannot tell",
    ]  # fmt: skip
    assert layer_check(0.5, separation=Separation(0.5, 0.47, 0.53)).verdict == "not shown"


def test_of_the_layers_that_pass_one_of_the_best_at_two_thirds_of_the_depth_is_taken() -> None:
    layers = [layer_check(0.001, layer=n, z=z) for n, z in enumerate((10.0, 9.5, 9.2, 5.0))]
    assert check_of(*layers).best_layer == 2  # less than a tenth below the largest is as good
    assert check_of(*layers[:2], layers[3]).best_layer == 1
    refused = replace(layers[2], arrival=Arrival(1.0, 30.0, 0.2))
    assert check_of(*layers[:2], refused, layers[3]).best_layer == 1
    none = [layer_check(0.2, layer=n, z=z) for n, z in enumerate((1.0, 3.0, 2.0))]
    assert not check_of(*none).passed
    assert check_of(*none).best_layer == 1
    with pytest.raises(PlanError, match="so none are held out; give pairs of other groups"):
        _ = check_of(layer_check(None, separation=None)).best_layer


def test_a_map_of_rows_paired_between_texts_carries_nothing_whatever_the_labels_say() -> None:
    """A map that explains no more than its control: half of all directions tell the sides apart."""
    bridge = twins.bridge()
    maps = {n: replace(of, r2=of.r2_control + of.control_sd) for n, of in bridge.maps.items()}
    found = check_transplant(replace(bridge, maps=maps), twins.concept())
    assert all(entry.arrival is not None and entry.arrival.p <= 0.05 for entry in found.layers.values())
    assert not found.passed
    with pytest.raises(
        PlanError, match=r"the map to layer \d of the target explains no more of held-out texts"
    ):
        transplant(replace(bridge, maps=maps), twins.concept(), 1.0)


@pytest.mark.parametrize("method", ["pca", "pca_diff"])
def test_top_directions_are_judged_too(method: Any) -> None:
    pairs = twins.concept_pairs()
    concept = refine_concept(twins.source(), tokenizer(), pairs, method=method)
    plain = check_transplant(twins.bridge(), concept, layers=[1]).layers[1]
    noise = refine_concept(twins.source(), tokenizer(), twins.noise_pairs(), method=method)
    assert not check_transplant(twins.bridge(), noise).passed
    assert plain.arrival is not None
    scores = plain.gap * plain.length * twins.bridge().norms[1].median ** 2
    assert plain.arrival.carried == pytest.approx(scores, rel=1e-4)
    assert plain.passed


def test_ranking_puts_what_passes_first_and_noise_last() -> None:
    source = Separation(0.8, 0.7, 0.9)
    checks = {
        "noise": check_of(layer_check(0.9, low=0.4)),
        "weak": check_of(layer_check(0.01, low=0.7)),
        "far apart": check_of(layer_check(0.01, low=0.898, gap=0.6)),
        "strong": check_of(layer_check(0.01, low=0.9)),
        "lost on the way": check_of(layer_check(0.9, low=0.4, at_source=source)),
        "unknown": check_of(layer_check(None, separation=None)),
    }
    order = ["far apart", "strong", "weak", "lost on the way", "noise", "unknown"]
    assert rank(checks) == order


# Bad input --------------------------------------------------------------------------------------------------


def said(*arguments: Any, **options: Any) -> str:
    with pytest.raises((PlanError, PairsError, ModelError, ArchitectureMismatch, WeightsMismatch)) as caught:
        transplant(*arguments, **options)
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_concept_of_another_model_is_refused() -> None:
    pairs = twins.concept_pairs()
    other = refine_concept(twins.target(), tokenizer(), pairs)
    assert said(twins.bridge(), other, 1.0).startswith("WeightsMismatch: the concept is of a model without a")
    moe = refine_concept(f.tiny("olmoe"), tokenizer(), pairs)
    found = said(twins.bridge(), moe, 1.0)
    assert found.startswith("ArchitectureMismatch: the concept is of a model without a name")
    assert found.endswith("of another architecture; refine it there, or fit a map from its model")


@pytest.mark.parametrize("side", ["source", "target"])
def test_chats_that_are_not_rendered_as_the_maps_are_said(side: str) -> None:
    words = [[{"role": "user", "content": pair.positive}] for pair in twins.concept_pairs(24)]
    other = [[{"role": "user", "content": pair.negative}] for pair in twins.concept_pairs(24)]
    pairs = [*zip(words, other, strict=True)]
    concept = refine_concept(twins.source(), tokenizer(), pairs)
    record = concept.chat
    assert record is not None

    def bridge(chat: ChatRecord) -> AffineMap:
        made = twins.bridge()
        chats = {"source": record, "target": record, side: chat}
        return replace(
            made, **{key: replace(getattr(made, key), chat=chats[key]) for key in ("source", "target")}
        )

    told = (
        rf"chats of the {side} differ .* in the chat template \(sha256 f+… of the map, .*--chat-template FILE"
    )
    with pytest.warns(UserWarning, match=told) as said:
        check_transplant(bridge(replace(record, template_sha256="f" * 64)), concept, TARGET, pairs)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transplant(bridge(record), concept, TARGET, pairs)


def test_another_target_is_refused() -> None:
    concept, bridge = twins.concept(), twins.bridge()
    wrong = said(bridge, concept, 1.0, target=(twins.source(), tokenizer()))
    assert wrong.startswith("WeightsMismatch: the map leads to a model without a name, but the target is")
    foreign = said(bridge, concept, 1.0, target=(f.tiny("olmoe"), tokenizer()))
    assert foreign.startswith("ArchitectureMismatch: the map leads to")
    assert "nowhere/at/all" in said(bridge, concept, 1.0, target="nowhere/at/all")


def test_a_target_that_is_gone_must_be_given() -> None:
    gone = replace(twins.bridge(), _live={})
    found = said(gone, twins.concept(), 1.0)
    assert found.startswith(
        "ModelError: the map's target has no name to open it by: give the target (model, "
    )
    assert transplant(gone, twins.concept(), 1.0, target=TARGET).edits
    named = replace(gone, target=replace(gone.target, model="/no/such/folder"))
    assert "the map's target cannot be opened (/no/such/folder: no such folder)" in said(
        named, twins.concept(), 1.0
    )


def test_pairs_that_are_gone_must_be_given() -> None:
    gone = replace(twins.concept(), _pairs=None)
    found = said(twins.bridge(), gone, 1.0)
    assert found.startswith(
        "PairsError: the concept's pairs cannot be read again (words.jsonl: no such file, looked for from "
    )
    assert found.endswith(": give pairs (--pairs FILE), or force it (--force)")
    silent = replace(gone, made_from=())
    assert "does not say which pairs it was refined from" in said(twins.bridge(), silent, 1.0)
    assert transplant(twins.bridge(), gone, 1.0, pairs=twins.concept_pairs()).edits


def test_layers_that_are_lacking() -> None:
    bridge, concept = twins.bridge(), twins.concept()
    assert (
        said(bridge, concept, 1.0, layers=[7]) == "PlanError: the map has no target layer 7: it has 0, 1, 2"
    )
    assert "layers='best' is unknown" in said(bridge, concept, 1.0, layers="best")
    assert "no layer is named" in said(bridge, concept, 1.0, layers=[])
    part = refine_concept(twins.source(), tokenizer(), twins.concept_pairs(), layers=[0])
    assert said(bridge, part, 1.0, layers=2) == (
        "PlanError: target layer 2 is mapped from source layer 2, which the concept lacks: it has 0"
    )
    assert tuple(check_transplant(bridge, part).layers) == (0,)
    only = replace(bridge, maps={2: bridge.maps[2]})
    assert "the map takes its layers from the source's 2, but the concept has 0" in said(only, part, 1.0)


@pytest.mark.parametrize("strength", [float("inf"), float("nan"), "dose:", "some", "dose:1e999"])
def test_strengths_that_are_none(strength: Any) -> None:
    assert "is not a finite number; right is a number such as 1.5" in said(
        twins.bridge(), twins.concept(), strength
    )


def test_too_few_groups_cannot_open_the_gate() -> None:
    few = refine_concept(twins.source(), tokenizer(), twins.concept_pairs()[:10])
    found = said(twins.bridge(), few, 1.0)
    assert found.startswith(
        "PlanError: words.jsonl: not transplanted: of 5 groups of held-out pairs no relabelling can tell: "
    )
    assert transplant(
        twins.bridge(), refine_concept(twins.source(), tokenizer(), twins.concept_pairs()[:12]), 1.0
    ).edits


def test_a_concept_without_its_groups_differences_cannot_open_the_gate() -> None:
    concept = twins.concept()
    old = replace(concept, unit_sums=concept.unit_sums[:0], unit_sizes=concept.unit_sizes[:0])
    assert "the concept was written before its groups' differences were kept: refine it again" in said(
        twins.bridge(), old, 1.0
    )


def test_one_group_cannot_open_the_gate() -> None:
    alone = ContrastPairs((replace(p, group="one") for p in twins.concept_pairs()), "one.jsonl")
    concept = refine_concept(twins.source(), tokenizer(), alone)
    assert "one.jsonl: the concept was refined from this one group of pairs" in said(
        twins.bridge(), concept, 1.0
    )
    assert "give pairs of other groups, or force it" in said(twins.bridge(), concept, 1.0, layers=1)
