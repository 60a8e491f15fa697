"""Concept vectors: which layer is best, plans of them and their doses, saved and read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from concepts.test_refinement import model_of, refined
from steersman import ArtifactError, PlanError, Separation, Steering
from steersman.artifacts import read_manifest
from steersman.concepts.concept import ConceptVector
from steersman.concepts.dose import Strength, typical_layer
from steersman.concepts.solving import choose_source
from steersman.edits import ResidualEdit
from steersman.models.architecture import read_architecture
from steersman.models.identity import weights_id
from steersman.steering import sha256_of


@pytest.fixture(scope="module")
def concept() -> ConceptVector:
    return refined("olmoe")


def edit_of(steering: Steering, place: int = 0) -> ResidualEdit:
    edit = steering.edits[place]
    assert isinstance(edit, ResidualEdit)
    return edit


# Plans ------------------------------------------------------------------------------------------------------


def test_it_belongs_to_its_model(concept: ConceptVector) -> None:
    model = model_of("olmoe")
    steering = concept.steering(1.5, layers=[2, 0])
    assert (concept.architecture, concept.weights_id) == (read_architecture(model), weights_id(model))
    assert (steering.architecture, steering.weights_id) == (concept.architecture, concept.weights_id)
    edit = edit_of(steering)
    assert (edit.strength, edit.scope, edit.operation, edit.layers) == (1.5, "answer", "add", (0, 2))
    assert torch.equal(edit.vectors[2], concept.vectors[2])
    assert steering.provenance["concept"]["from"] == [dict(concept.made_from[0])]
    with steering.apply(model) as receipt, torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert receipt.tokens == {"block_output:0": 1, "block_output:2": 1}


def test_a_dose_is_a_share_of_the_median_norm(concept: ConceptVector) -> None:
    steering = concept.steering("dose:0.7", layers="all")
    for place, layer in enumerate(concept.layers):
        edit = edit_of(steering, place)
        assert edit.layers == (layer,)
        added = edit.strength * float(concept.vectors[layer].norm())
        assert added / concept.norms[layer].median == pytest.approx(0.7)
    assert steering.provenance["strength"] == "dose:0.7"
    assert steering.provenance["doses"] == pytest.approx({"0": 0.7, "1": 0.7, "2": 0.7})
    number = concept.steering(2.0, layers=1)
    assert number.provenance["doses"] == {"1": pytest.approx(2 * concept.length(1))}
    away = concept.steering("dose:-0.5", layers=1)
    assert edit_of(away).strength == pytest.approx(-0.5 / concept.length(1))


def test_a_direction_can_be_projected_out(concept: ConceptVector) -> None:
    edit = edit_of(concept.steering(1, layers=1, operation="project", scope="all"))
    assert (edit.operation, edit.scope, edit.strength) == ("project", "all", 1.0)
    with pytest.raises(PlanError, match="between 0 and 1"):
        concept.steering(1.5, layers=1, operation="project")
    with pytest.raises(PlanError, match="project takes a share from 0 to 1, not dose:1"):
        concept.steering("dose:1", layers=1, operation="project")


def test_the_best_layer_separates_best_and_of_equals_is_the_longest(concept: ConceptVector) -> None:
    def with_aurocs(*values: float) -> ConceptVector:
        found = {layer: Separation(auroc, 0.1, 1.0) for layer, auroc in enumerate(values)}
        return replace(concept, separation=found)

    assert with_aurocs(0.7, 0.9, 0.8).best_layer == 1
    with pytest.raises(PlanError, match="its pairs are of one group"):
        _ = replace(concept, separation=dict.fromkeys(concept.layers)).best_layer
    lengths = [concept.length(layer) for layer in concept.layers]
    assert with_aurocs(1.0, 1.0, 1.0).best_layer == int(np.argmax(lengths))
    for seed in range(6):  # one comparison more or less is no better layer
        nearly = with_aurocs(*(1.0 - np.random.default_rng(seed).uniform(0, 5e-4, 3)))
        assert nearly.best_layer == choose_source(nearly, nearly.layers) == int(np.argmax(lengths))


def test_by_default_it_steers_at_two_thirds_of_the_depth_and_says_so(concept: ConceptVector) -> None:
    assert [typical_layer(range(depth), depth) for depth in (1, 2, 3, 4, 18, 28, 30)] == [
        0, 1, 1, 2, 11, 18, 19,
    ]  # fmt: skip
    assert typical_layer([3, 7, 0], 6) == 3
    assert typical_layer([4, 2], 5) == 2  # of two as near the lower
    plan = concept.steering()
    assert (edit_of(plan).layers, plan.provenance["defaults"]) == ((1,), ["layer", "dose"])
    assert plan.provenance["doses"] == {"1": pytest.approx(0.3)}
    assert plan.fingerprint == concept.steering("dose:0.3", layers=1).fingerprint
    assert concept.steering(2.0).provenance["defaults"] == ["layer"]
    assert "defaults" not in concept.steering(2.0, layers=1).provenance


def test_of_layers_that_are_equal_up_to_rounding_the_lowest_is_best(concept: ConceptVector) -> None:
    one = concept.vectors[0]
    for seed in range(6):
        noise = 1 + 1e-6 * np.random.default_rng(seed).normal(size=3)
        alike = replace(
            concept,
            vectors={layer: one * float(noise[layer]) for layer in concept.layers},
            norms=dict.fromkeys(concept.layers, concept.norms[0]),
            separation=dict.fromkeys(concept.layers, Separation(1.0, 0.9, 1.0)),
        )
        assert alike.best_layer == choose_source(alike, (2, 0, 1)) == 0


@pytest.mark.parametrize("given", ["strong", "dose:", "dose:x", "nan", "dose:inf", float("inf"), True, ""])
def test_strengths_that_are_none(concept: ConceptVector, given: Any) -> None:
    with pytest.raises(PlanError, match=r"is not a finite number; right is .* dose:0.3"):
        concept.steering(given, layers=1)


def test_strengths_are_read_as_written() -> None:
    assert Strength.parse("1.5") == Strength.parse(1.5) == Strength(1.5)
    assert str(Strength.parse("dose:0.70")) == "dose:0.7"


def test_layers_that_it_lacks(concept: ConceptVector) -> None:
    with pytest.raises(PlanError, match="the concept has no layer 7; it has 0, 1, 2"):
        concept.steering(1.0, layers=[7])
    with pytest.raises(PlanError, match="layers='best' is unknown"):
        concept.steering(1.0, layers="best")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no layer is named"):
        concept.steering(1.0, layers=[])


def test_a_zero_vector_has_no_direction(concept: ConceptVector) -> None:
    zero = replace(concept, vectors={**concept.vectors, 1: torch.zeros(32)})
    for strength in (1.0, "dose:1"):
        with pytest.raises(PlanError, match="layer 1: its vector is zero, so it has no direction"):
            zero.steering(strength, layers=1)


# On disk ----------------------------------------------------------------------------------------------------


def same(one: ConceptVector, other: ConceptVector) -> bool:
    tensors = ("fold_vectors", "fold_clusters", "cluster_units", "unit_sums", "unit_sizes", "shuffled")
    facts = (
        "separation", "norms", "architecture", "weights_id", "method", "position", "pairs", "clusters",
        "skipped", "alike", "model", "revision", "made_from",
    )  # fmt: skip
    return (
        one.layers == other.layers
        and all(torch.equal(one.vectors[layer], other.vectors[layer]) for layer in one.layers)
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
        and all(getattr(one, name) == getattr(other, name) for name in facts)
    )


def test_saved_and_read_it_is_the_same(concept: ConceptVector, tmp_path: Path) -> None:
    concept.save_pretrained(tmp_path / "a")
    read = ConceptVector.from_pretrained(tmp_path / "a")
    assert same(read, concept)
    assert read.steering(1.5).fingerprint == concept.steering(1.5).fingerprint
    read.save_pretrained(tmp_path / "b")
    for name in ("manifest.json", "tensors.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(ArtifactError, match="not empty"):
        concept.save_pretrained(tmp_path / "a")
    with pytest.raises(ArtifactError, match="this is a concept vector, a steering is needed"):
        Steering.from_pretrained(tmp_path / "a")


def test_one_group_saved_and_read(concept: ConceptVector, tmp_path: Path) -> None:
    alone = replace(
        concept,
        separation=dict.fromkeys(concept.layers),
        fold_vectors=concept.fold_vectors[:0],
        unit_sums=concept.unit_sums[:1],
        unit_sizes=torch.tensor([concept.pairs]),
        fold_clusters=concept.fold_clusters[:1],
        cluster_units=torch.tensor([0]),
        clusters=1,
    )
    alone.save_pretrained(tmp_path / "a")
    assert same(ConceptVector.from_pretrained(tmp_path / "a"), alone)


def reseal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with hashes that fit: a forger would."""
    import hashlib

    content = (folder / "tensors.safetensors").read_bytes()
    manifest["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    manifest.pop("manifest_sha256", None)
    manifest["manifest_sha256"] = sha256_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


Tensors = dict[str, np.ndarray]
TENSOR_FORGERIES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a NaN": (lambda t: t["vectors"].__setitem__((0, 0), np.nan), "'vectors' holds NaN or infinity"),
    "another width": (lambda t: t.update(vectors=t["vectors"][:, :5].copy()), r"\[3, 5\], not \[3, 32\]"),
    "a layer short": (lambda t: t.update(unit_sums=t["unit_sums"][:, :2].copy()), "'unit_sums' has shape"),
    "layers out of order": (lambda t: t.update(layers=t["layers"][::-1].copy()), "do not ascend"),
    "a layer beyond": (lambda t: t["layers"].__setitem__(2, 9), "within the model's 0 to 2"),
    "doubles": (lambda t: t.update(vectors=t["vectors"].astype(np.float64)), "float64"),
    "a cluster twice": (
        lambda t: t["fold_clusters"].__setitem__(1, t["fold_clusters"][0]), "cluster ids do not ascend"
    ),
    "a unit beyond": (lambda t: t["cluster_units"].__setitem__(0, 99), "not numbered from 0"),
    "units short": (lambda t: t.update(unit_sums=t["unit_sums"][:5].copy()), "5 sums and"),
    "sizes of others": (lambda t: t["unit_sizes"].__setitem__(0, 50), "not those of 28 pairs"),
    "folds short": (lambda t: t.update(fold_vectors=t["fold_vectors"][:3].copy()), "in the 3 folds"),
    "negative norms": (lambda t: t["norms"].__setitem__((0, 0), -1), "at least 0"),
    "uneven norms": (lambda t: t["norms"].__setitem__((0, 0), 9), "one norm of each token"),
    "bins short": (lambda t: t.update(norms=t["norms"][:, :7].copy()), "'norms' has shape"),
    "one more": (lambda t: t.update(more=t["layers"]), "unknown tensor 'more'"),
    "one less": (lambda t: t.pop("unit_sums"), "'unit_sums' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("forgery", TENSOR_FORGERIES)
def test_forged_tensors_are_refused(concept: ConceptVector, tmp_path: Path, forgery: str) -> None:
    concept.save_pretrained(tmp_path / "a")
    change, said = TENSOR_FORGERIES[forgery]
    tensors = load_file(tmp_path / "a/tensors.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "a/tensors.safetensors")
    with pytest.raises(ArtifactError, match="does not match its sha256"):
        ConceptVector.from_pretrained(tmp_path / "a")
    reseal(tmp_path / "a", read_manifest(tmp_path / "a"))
    with pytest.raises(ArtifactError, match=said) as caught:
        ConceptVector.from_pretrained(tmp_path / "a")
    assert str(caught.value).startswith(f"{tmp_path / 'a/manifest.json'}: ")
    assert "\n" not in str(caught.value)


MANIFEST_FORGERIES: dict[str, tuple[dict[str, Any], str]] = {
    "newer": ({"format_version": 4}, "newer than this tool reads"),
    "unknown key": ({"more": 1}, "unknown key 'more'"),
    "method": ({"method": "lasso"}, "method is 'lasso', not one of mean_difference, pca, pca_diff"),
    "position": ({"position": "first"}, "position is 'first'"),
    "clusters": ({"clusters": 99}, "99 clusters and 28 pairs"),
    "no separation": ({"separation": [None] * 3}, "do not fit"),
    "separations short": ({"separation": []}, "not a list of 3 layers"),
    "beyond 1": ({"separation": [[1.2, 0.5, 1.3]] * 3}, "not an AUROC with its interval"),
    "outside": ({"separation": [[0.5, 0.6, 0.7]] * 3}, "not an AUROC with its interval"),
    "sources": ({"made_from": {"from": 3}}, "made_from.from is not a list"),
    "skipped": ({"skipped": -1}, "skipped is not a whole number"),
    "alike": ({"alike": "2"}, "alike is not a whole number"),
}


@pytest.mark.parametrize("forgery", MANIFEST_FORGERIES)
def test_forged_manifests_are_refused(concept: ConceptVector, tmp_path: Path, forgery: str) -> None:
    concept.save_pretrained(tmp_path / "a")
    change, said = MANIFEST_FORGERIES[forgery]
    reseal(tmp_path / "a", {**read_manifest(tmp_path / "a"), **change})
    with pytest.raises(ArtifactError, match=said) as caught:
        ConceptVector.from_pretrained(tmp_path / "a")
    assert "\n" not in str(caught.value)
