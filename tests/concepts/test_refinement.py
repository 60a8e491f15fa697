"""Refinement against a slow obvious version: one text at a time, hooks of our own, loops over all pairs."""

from __future__ import annotations

import functools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

import families as f
from experts.test_counting import IDS, WORDS, made_pairs, tokenizer
from steersman import (
    ArtifactError,
    ContrastPair,
    ContrastPairs,
    ModelError,
    PairsError,
    refine_concept,
)
from steersman import progress as saving
from steersman.concepts import pair_states, state_file
from steersman.concepts.concept import ConceptVector
from steersman.concepts.directions import mean_differences
from steersman.concepts.pair_states import PairStates, read_pairs
from steersman.concepts.separation import auroc
from steersman.models.encoding import hash_of_cluster
from steersman.rendering import TruncatedTarget

MODELS = ("dense", "olmoe", "gpt2")


@functools.cache
def model_of(name: str) -> nn.Module:
    if name == "olmoe":
        return f.tiny("olmoe")
    if name == "gpt2":
        torch.manual_seed(1)
        sizes = {"vocab_size": f.VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
        return AutoModelForCausalLM.from_config(GPT2Config(**sizes)).eval()
    return f.dense()


def blocks_of(model: nn.Module) -> Any:
    decoder = model.get_decoder()
    return getattr(decoder, "layers", None) or decoder.h


@functools.cache
def example() -> tuple[list[ContrastPair], list[list[tuple[list[int], list[int]]]]]:
    """Texts, chats that the assistant ends and chats that the user ends, some in groups; and of each side its
    ids and the positions in scope, the last of which is read.
    """
    pairs, known = made_pairs(number=20, seed=4, longest=20)
    random = np.random.default_rng(9)
    for place in range(8):
        contents, sides = [], []
        for _ in range(2):
            words = [str(word) for word in random.choice(WORDS, 6)]
            contents.append([{"role": "user", "content": " ".join(words)}])
            ids = [
                IDS["<|user|>"], *(IDS[word] for word in words), IDS["<|end|>"], IDS["<|assistant|>"]
            ]  # fmt: skip
            sides.append((ids, [len(ids) - 1]))
        pairs.append(ContrastPair(*contents, group="asked" if place % 2 else None, id=f"asked {place}"))
        known.append(sides)
    return pairs, known


def slow_states(model: nn.Module, ids: list[int]) -> list[torch.Tensor]:
    """What every block gives for one text, [tokens, width] each."""
    found: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _m, _i, out: found.append((out[0] if isinstance(out, tuple) else out)[0].double())
        )
        for block in blocks_of(model)
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found


@functools.cache
def slow(name: str, position: str) -> tuple[np.ndarray, list[list[float]]]:
    """States [pairs, 2, layers, width] and the norms of tokens in scope by layer."""
    model = model_of(name)
    norms: list[list[float]] = [[] for _ in blocks_of(model)]
    read = []
    for sides in example()[1]:
        for ids, target in sides:
            of_layers = slow_states(model, ids)
            for layer, states in enumerate(of_layers):
                norms[layer] += [float(states[token].norm()) for token in target]
            place = target if position == "target_mean" else target[-1:]
            read.append([states[place].mean(0).numpy() for states in of_layers])
    return np.array(read).reshape(len(example()[0]), 2, len(norms), -1), norms


def refined(name: str, **options: Any) -> ConceptVector:
    pairs = ContrastPairs(example()[0])
    return refine_concept(model_of(name), tokenizer(), pairs, **{"batch_size": 5, **options})


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_mean_difference_of_a_slow_version(name: str) -> None:
    concept, (states, norms) = refined(name), slow(name, "last")
    pairs = example()[0]
    differences = states[:, 0] - states[:, 1]
    assert concept.layers == tuple(range(len(norms)))
    assert (concept.pairs, concept.skipped) == (28, 0)
    order = list(dict.fromkeys(pair.cluster for pair in pairs))
    fold = np.array([order.index(pair.cluster) % 5 for pair in pairs])
    assert concept.clusters == len(order)
    ids = concept.fold_clusters.tolist()
    for pair, number in zip(pairs, fold, strict=True):
        assert concept.fold_numbers[ids.index(hash_of_cluster(pair.cluster))] == number
    for layer in concept.layers:
        close(concept.vectors[layer], differences[:, layer].mean(0))
        won = total = 0.0
        for number in range(5):
            rest, own = differences[fold != number, layer].mean(0), states[fold == number][:, :, layer]
            close(concept.fold_vectors[number, layer], rest)
            above, below = own[:, 0] @ rest, own[:, 1] @ rest
            won += sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in above for b in below)
            total += len(own) ** 2
        found = concept.separation[layer]
        assert found is not None
        assert found.auroc == pytest.approx(won / total, abs=2 / total)  # rounding may turn a near tie
        assert found.low < found.auroc < found.high
        assert concept.norms[layer].count == len(norms[layer])
        assert concept.norms[layer].median == pytest.approx(np.median(norms[layer]), rel=0.02)
    numbers = np.array([order.index(pair.cluster) for pair in pairs])
    assert concept.unit_sizes.tolist() == np.bincount(numbers).tolist()
    for number in range(len(order)):
        close(concept.unit_sums[number], differences[numbers == number].sum(0))
    assert concept.shuffled.shape == (99, *concept.unit_sums.shape[1:])


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5 * scale)


def test_target_mean_is_the_mean_over_the_targets_tokens() -> None:
    """Of texts and chats that the assistant ends; where the user ends, the target is the user's words."""
    pairs = ContrastPairs(example()[0][:20])
    concept = refine_concept(model_of("dense"), tokenizer(), pairs, position="target_mean")
    states, _ = slow("dense", "target_mean")
    for layer in concept.layers:
        close(concept.vectors[layer], (states[:20, 0] - states[:20, 1])[:, layer].mean(0))
    asked = ContrastPairs(example()[0][20:])
    found = refine_concept(model_of("dense"), tokenizer(), asked, position="target_mean")
    model, expected = model_of("dense"), []
    for sides in example()[1][20:]:
        means = [[s[1:7].mean(0).numpy() for s in slow_states(model, ids)] for ids, _ in sides]
        expected.append(np.array(means[0]) - np.array(means[1]))
    for layer in found.layers:
        close(found.vectors[layer], np.mean(expected, axis=0)[layer])


def test_pca_is_the_top_direction_of_the_differences() -> None:
    concept, (states, _) = refined("dense", method="pca"), slow("dense", "last")
    differences = states[:, 0] - states[:, 1]
    for layer in concept.layers:
        some, mean = differences[:, layer], differences[:, layer].mean(0)
        top = np.linalg.eigh(some.T @ some)[1][:, -1]
        expected = top * (top @ mean)
        np.testing.assert_allclose(
            concept.vectors[layer].numpy(), expected, atol=1e-3 * np.linalg.norm(expected)
        )
    plain = refined("dense")
    assert torch.equal(concept.shuffled, plain.shuffled)
    assert concept.method == "pca"


def test_pca_diff_takes_the_mean_off_first() -> None:
    concept, (states, _) = refined("dense", method="pca_diff"), slow("dense", "last")
    differences = states[:, 0] - states[:, 1]
    for layer in concept.layers:
        mean = differences[:, layer].mean(0)
        top = np.linalg.svd(differences[:, layer] - mean, full_matrices=False)[2][0]
        expected = top * (top @ mean)
        found = concept.vectors[layer].numpy()
        assert abs(found @ top) > 0.999 * np.linalg.norm(found)
        np.testing.assert_allclose(found, expected, atol=5e-3 * np.linalg.norm(mean))
    assert concept.method == "pca_diff"


def test_batches_windows_and_layers_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = refined("olmoe")
    monkeypatch.setattr(pair_states, "WINDOW_BATCHES", 2)
    monkeypatch.setattr(pair_states, "CHUNK_BYTES", 1000)
    part = refined("olmoe", layers=[2, 0, 2], batch_size=3)
    assert part.layers == (0, 2)
    for place, layer in enumerate(part.layers):
        close(part.vectors[layer], whole.vectors[layer].numpy())
        close(part.shuffled[:, place], whole.shuffled[:, layer].numpy())
        assert part.norms[layer].count == whole.norms[layer].count
        assert part.separation[layer] == pytest.approx(whole.separation[layer])


def test_noise_does_not_separate_what_was_held_out() -> None:
    """Directions of all pairs would: with 28 pairs in 32 dimensions they learn the pairs by heart."""
    concept, (states, _) = refined("dense"), slow("dense", "last")
    inside = [
        auroc(states[:, 0, layer] @ v.numpy(), states[:, 1, layer] @ v.numpy())
        for layer, v in concept.vectors.items()
    ]
    assert min(inside) > 0.75
    for found in concept.separation.values():
        assert found is not None
        assert found.low < 0.5


def test_one_group_has_no_held_out_pairs() -> None:
    pairs = ContrastPairs(ContrastPair(f"w{n} w1", f"w{n} w2", group="one", id=str(n)) for n in range(10, 16))
    concept = refine_concept(model_of("dense"), tokenizer(), pairs)
    assert set(concept.separation.values()) == {None}
    assert concept.fold_vectors.shape[0] == concept.shuffled.shape[0] == 0
    assert concept.fold_numbers.tolist() == [-1]
    assert concept.steering(1.0, layers=1).edits[0].layers == (1,)


def test_memory_does_not_grow_with_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Analysis holds a chunk and a few numbers a pair, wherever the states of all pairs would be too many."""
    monkeypatch.setattr(pair_states, "CHUNK_BYTES", 1 << 18)
    peaks = []
    for pairs in (1000, 10_000):
        with PairStates((0, 1), 256, np.arange(pairs), 0) as states:
            generator = np.random.default_rng(0)
            for _ in range(0, pairs, 500):
                block = generator.normal(size=(500, 2, 256)).astype(np.float32)
                states.append({0: block, 1: block})
            numbers = np.arange(pairs)
            tracemalloc.start()
            mean_differences(lambda: states.chunks(1), numbers)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 100 * 9000  # bytes a pair; its states are 2048


# Bad input --------------------------------------------------------------------------------------------------


def failing(*pairs: tuple[Any, ...], **options: Any) -> str:
    rows = ContrastPairs((ContrastPair(*pair) for pair in pairs), name="some.jsonl")
    with pytest.raises((PairsError, ModelError)) as caught:
        refine_concept(model_of("dense"), tokenizer(), rows, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pairs_that_are_alike_where_they_are_read() -> None:
    alike = [(f"w{n} w1 w2", f"w{n} w1 w3", f"w{n} w1", f"w{n} w1") for n in range(20, 26)]
    said = failing(*alike)
    assert said.startswith("some.jsonl: no pair is a contrast, as both sides are the same tokens: pair, ")
    assert said.endswith("right are sides, or targets, whose tokens differ")
    keys = ("positive", "negative", "positive_target", "negative_target")
    rows = [dict(zip(keys, pair, strict=False)) for pair in [*alike, ("w1", "w2")]]
    with pytest.warns(UserWarning, match="6 pairs left out"):
        concept = refine_concept(model_of("dense"), tokenizer(), rows)
    assert concept.vectors[0].any()  # one that differs is enough
    assert (concept.pairs, concept.alike) == (1, 6)


def test_constant_states_are_pairs_alike() -> None:
    """A model that gives every token the same state knows nothing of any concept."""
    model = f.tiny("olmoe")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.get_decoder().embed_tokens.weight.fill_(0.5)
    with pytest.raises(PairsError, match="have the same state at the last token that is read"):
        refine_concept(model, tokenizer(), [{"positive": "w1 w2", "negative": "w3"}] * 2)


def test_sides_that_change_places_cancel_out() -> None:
    said = failing(("w1", "w2"), ("w2", "w1"))
    assert said.startswith("some.jsonl: at every layer the differences of the pairs cancel out")
    assert said.endswith("right is one and the same side as positive throughout")


def test_pairs_of_one_side() -> None:
    for row, said in (
        ({"positive": "w1"}, '"negative" is missing; a pair has both sides'),
        ({"positive": "w1", "negative": "w1"}, "both sides are the same, so there is nothing to compare"),
    ):
        with pytest.raises(PairsError, match=said):
            refine_concept(model_of("dense"), tokenizer(), [row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_states_that_overflow_name_their_layer(dtype: torch.dtype) -> None:
    model = f.tiny("olmoe", dtype=dtype)
    with torch.no_grad():
        blocks_of(model)[1].self_attn.o_proj.weight.fill_(float("inf"))
    with pytest.raises(ModelError) as caught:
        refine_concept(model, tokenizer(), [{"positive": "w1 w2", "negative": "w3 w4"}])
    said = str(caught.value)
    assert said.startswith("layer 1 gives states that are not finite")
    assert ("float16 ends at 65504; open the model in bfloat16 or float32" in said) == (
        dtype == torch.float16
    )


def test_layers_that_do_not_exist() -> None:
    assert failing(("w1", "w2"), layers=[0, 3]) == "layer 3 does not exist: the model has layers 0 to 2"
    assert failing(("w1", "w2"), layers=[-1]).startswith("layer -1 does not exist")
    assert failing(("w1", "w2"), layers=[]) == "no layer is named; leave layers out for all of them"


def test_texts_that_are_too_long() -> None:
    long = " ".join(["w5"] * 400)
    rows = [{"positive": "w1", "negative": "w2"}, {"positive": long, "negative": "w3"}]
    with pytest.raises(TruncatedTarget, match="pair 2, positive side: 401 tokens"):
        refine_concept(model_of("gpt2"), tokenizer(), rows)
    concept = refine_concept(model_of("gpt2"), tokenizer(), rows, truncate=True)
    assert (concept.pairs, concept.skipped) == (1, 1)


def test_unknown_options() -> None:
    assert failing(("w1", "w2"), position="first") == (
        "position='first' is unknown: use 'last' or 'target_mean'"
    )
    assert failing(("w1", "w2"), method="mean").startswith("method='mean' is unknown: use 'mean_difference'")
    assert failing(("w1", "w2"), batch_size=0) == "batch_size is 0: give a whole number, 1 or more"


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("the system has no device that is full")
    full = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115 - what uses it closes it
    monkeypatch.setattr(state_file.tempfile, "TemporaryFile", lambda: full)
    with pytest.raises(ModelError, match=r"states cannot be kept there \(No space left on device\)"):
        refine_concept(model_of("dense"), tokenizer(), [{"positive": "w1 w2", "negative": "w3 w4"}])


class Stop(BaseException):
    """Stands for whatever ends a process."""


def test_stops_at_any_place_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_states, "WINDOW_BATCHES", 2)
    monkeypatch.setattr(saving, "SHARE", float("inf"))
    whole, folder = refined("dense"), tmp_path / "c.partial"
    original, calls = pair_states.states_at, iter(range(1000))
    places, stops = [], iter((4, 9, 10, 12))
    stop_at = [0]

    def counted(*arguments: Any) -> Any:
        if next(calls) == stop_at[0]:
            raise Stop
        return original(*arguments)

    monkeypatch.setattr(pair_states, "states_at", counted)
    for stop_at[0] in stops:
        with pytest.raises(Stop):
            refined("dense", checkpoint=folder, resume=True)
        places.append(saving.units_done(folder))
    assert 0 < places[0] < places[-1] < 28
    with pytest.raises(ArtifactError, match="go on from it with --resume"):
        refined("dense", checkpoint=folder)
    with pytest.raises(ArtifactError, match=r"differs in position \(last there, target_mean here\), tokens"):
        refined("dense", checkpoint=folder, resume=True, position="target_mean")
    found = refined("dense", checkpoint=folder, resume=True, method="pca")  # of the same states
    other = refined("dense", method="pca")
    for layer, vector in other.vectors.items():
        close(found.vectors[layer], vector.numpy())
    found = refined("dense", checkpoint=folder, resume=True)
    assert found.norms == whole.norms
    assert all(torch.equal(found.vectors[layer], vector) for layer, vector in whole.vectors.items())
    assert torch.equal(found.shuffled, whole.shuffled)
    (folder / "states.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"states\.bin: damaged"):
        refined("dense", checkpoint=folder, resume=True)


def test_what_gives_no_concept_leaves_no_progress(tmp_path: Path) -> None:
    rows = [{"positive": "w1 w2", "negative": "w3 w2"}, {"positive": "w3 w2", "negative": "w1 w2"}]
    with pytest.raises(PairsError, match="cancel out"):
        refine_concept(model_of("dense"), tokenizer(), rows, checkpoint=tmp_path / "c.partial")
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_as_it_was() -> None:
    model = f.tiny("olmoe").train()
    with read_pairs(model, tokenizer(), ContrastPairs(example()[0][:3]), [1], "last"):
        pass
    assert model.training
    assert not any(block._forward_hooks for block in blocks_of(model))
