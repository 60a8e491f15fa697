"""What detection can count beside the plain counts, against brute force: positions, parts, continuations,
shards, a nuisance, replicates.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import families as f
from contrasts import assert_same
from experts.test_counting import (
    IDS,
    WORDS,
    brute_force,
    example,
    experts_of,
    layer_indices,
    made_pairs,
    tokenizer,
)
from steersman import (
    ContrastPair,
    ContrastPairs,
    ModelError,
    PairsError,
    PlanError,
    RoutingContrast,
    Steering,
    detect_experts,
    merge_contrasts,
)
from steersman.experts import strata
from steersman.experts.adjustment import slope_of
from steersman.experts.bootstrap import poisson_weights
from steersman.experts.strata import POSITION_STRATA
from steersman.models.encoding import hash_of_cluster
from steersman.shards import Shard

EVERYTHING: dict[str, Any] = {"stratify": "position", "bootstrap": 7}


def clusters_of(pairs: list[ContrastPair]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(pair.cluster, []).append(place)
    return places


# Positions --------------------------------------------------------------------------------------------------


@functools.cache
def by_position() -> tuple[np.ndarray, np.ndarray]:
    """Brute-force counts [pairs, 2, strata, layers, experts] and tokens [pairs, 2, strata]."""
    model, _, known, _ = example("olmoe")
    counts, tokens = [], []
    for start, end in zip(POSITION_STRATA, [*POSITION_STRATA[1:], 10**6], strict=True):
        part = [[(ids, target[start:end]) for ids, target in sides] for sides in known]
        counts.append(brute_force(model, part))
        tokens.append([[len(target) for _, target in sides] for sides in part])
    return np.stack(counts, axis=2), np.array(tokens).transpose(1, 2, 0)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_sums_by_position_are_those_of_brute_force(batch_size: int) -> None:
    model, pairs, _, _ = example("olmoe")
    contrast = detect_experts(
        model, tokenizer(), ContrastPairs(pairs), stratify="position", batch_size=batch_size
    )
    counts, tokens = by_position()
    expected = strata.StratumSums.zeros(*counts.shape[3:])
    for places in clusters_of(pairs).values():
        expected.add(
            counts[places].sum(axis=0).reshape(1, -1, *counts.shape[3:]),
            tokens[places].sum(axis=0).reshape(1, -1),
        )
    assert contrast.strata == expected
    assert contrast.strata.starts == POSITION_STRATA
    plain = detect_experts(model, tokenizer(), ContrastPairs(pairs))
    assert contrast.sums == plain.sums
    np.testing.assert_array_equal(contrast.risk_difference, plain.risk_difference)
    np.testing.assert_array_equal(contrast.stratified, strata.estimate(expected).difference)


def test_strata_have_columns_rankings_and_their_own_errors() -> None:
    model = example("olmoe")[0]
    pairs, _ = made_pairs(30, seed=4)
    alone = [ContrastPair(pair.positive, pair.negative, id=pair.id) for pair in pairs]
    contrast = detect_experts(model, tokenizer(), ContrastPairs(alone), stratify="position")
    estimate = contrast.estimate("stratified")
    table = contrast.table().set_index(["layer", "expert"])
    for row, layer in enumerate(contrast.layers):
        found = table.loc[(layer, 3)]
        assert found["stratified"] == contrast.stratified[row, 3]
        assert found["stratified_standard_error"] == estimate.standard_error[row, 3] > 0
        assert found["stratified_low"] == estimate.interval()[0][row, 3]
    np.testing.assert_allclose(contrast.stratified.sum(axis=1), 0, atol=1e-12)
    assert contrast.ranking("stratified")[0][2] == max(contrast.stratified.flat, key=abs)
    layer, expert, delta = contrast.ranking("stratified_lower_bound")[0]
    margin = estimate.margin()[contrast.layers.index(layer), expert]
    assert abs(delta) - margin == (np.abs(contrast.stratified) - estimate.margin()).max()
    assert contrast.select(top=4, by="stratified").provenance["by"] == "stratified"


def test_what_was_not_counted_is_said() -> None:
    model, pairs, _, _ = example("olmoe")
    contrast = detect_experts(model, tokenizer(), ContrastPairs(pairs))
    for by, words in {"stratified": "--stratify position", "adjusted_lower_bound": "--adjust"}.items():
        with pytest.raises(PlanError, match=words):
            contrast.select(top=2, by=by)
    with pytest.raises(PlanError, match="--bootstrap 200"):
        contrast.stability(top=2)
    with pytest.raises(PlanError, match="by='p' is unknown: use risk_difference, lower_bound, strat"):
        contrast.select(top=2, by="p")


# Parts ------------------------------------------------------------------------------------------------------


def chats(number: int = 24, seed: int = 0) -> tuple[list[ContrastPair], list[dict[str, list[Any]]]]:
    """Chats with an answer, texts, and chats that end with the user; and their known parts, by name."""
    random = np.random.default_rng(seed)
    pairs, parts = [], []
    for place in range(number):
        sides, known = [], []
        for _ in (0, 1):
            asked = [str(word) for word in random.choice(WORDS, random.integers(1, 9))]
            answer = [str(word) for word in random.choice(WORDS, random.integers(1, 9))]
            head = [IDS["<|user|>"], *(IDS[w] for w in asked), IDS["<|end|>"], IDS["<|assistant|>"]]
            sides.append(
                [
                    {"role": "user", "content": " ".join(asked)},
                    {"role": "assistant", "content": " ".join(answer)},
                ]
            )
            ids = [*head, *(IDS[w] for w in answer), IDS["<|end|>"]]
            of_answer = list(range(len(head), len(ids) - 1))
            # Special tokens are in no part.
            known.append((ids, list(range(1, 1 + len(asked))), of_answer, head))
        pairs.append(ContrastPair(*sides, id=str(place)))
        parts.append(
            {
                "prompt": [(ids, prompt) for ids, prompt, _, _ in known],
                "answer": [(ids, answer) for ids, _, answer, _ in known],
                "head": [head for *_, head in known],
            }
        )
    return pairs, parts


@pytest.mark.parametrize("part", ["prompt", "answer"])
def test_prompts_and_answers_are_counted_apart(part: str) -> None:
    model = example("mixtral")[0]
    pairs, parts = chats()
    contrast = detect_experts(model, tokenizer(), ContrastPairs(pairs), tokens=part, batch_size=7)
    known = [of_pair[part] for of_pair in parts]
    np.testing.assert_array_equal(contrast.activations, brute_force(model, known).sum(axis=0))
    assert contrast.counted == part
    assert contrast.tokens.tolist() == [sum(len(sides[s][1]) for sides in known) for s in (0, 1)]


def test_parts_of_texts_and_of_chats_without_an_answer() -> None:
    model = example("mixtral")[0]
    for sides in (
        ("w1 w2 w3", "w4 w5"),
        [[{"role": "user", "content": text}] for text in ("w1 w2 w3", "w4 w5")],
    ):
        rows = [{**dict(zip(("positive", "negative"), sides, strict=True)), "positive_target": "w1"}]
        contrast = detect_experts(model, tokenizer(), rows, tokens="prompt")
        assert contrast.tokens.tolist() == [3, 2]
        with pytest.raises(PairsError, match="pair 1, positive side: no answer in it: right is a chat that"):
            detect_experts(model, tokenizer(), rows, tokens="answer")


# Continuations ----------------------------------------------------------------------------------------------


def continued(
    model: nn.Module, prompt: list[int], new_tokens: int, ends: set[int]
) -> tuple[np.ndarray, list[int]]:
    """One prompt alone, token by token with a cache: uses [new tokens, layers, experts], and the tokens."""
    layers = layer_indices(model)
    uses = np.zeros((new_tokens, len(layers), max(experts_of(model, i) for i in layers)), np.int64)
    written: list[int] = []
    with torch.no_grad():
        output = model(input_ids=torch.tensor([prompt]), use_cache=True)
        while True:
            token = int(output.logits[0, -1].argmax())
            if token in ends or len(written) == new_tokens:
                return uses[: len(written)], written
            with contextlib.ExitStack() as stack:
                seen = [stack.enter_context(f.watching(model, layer)) for layer in layers]
                output = model(
                    input_ids=torch.tensor([[token]]),
                    **{f.CACHE: output[f.CACHE]},
                    use_cache=True,
                )
            for row, steps in enumerate(seen):
                uses[len(written), row, steps[0].chosen[0]] += 1
            written.append(token)


def with_ends(name: str, heads: list[list[list[int]]]) -> tuple[nn.Module, set[int]]:
    """A model, and what ends its texts: one at once, one after a while."""
    model = f.tiny(name)
    written = [continued(model, head, 6, set())[1] for head in (heads[0][0], heads[1][0])]
    ends = {written[0][0], next((token for token in written[1] if token != written[1][0]), f.EOS)}
    model.generation_config.eos_token_id = sorted(ends)
    return model, ends


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("new_tokens", [1, 6])
def test_generated_tokens_are_counted_as_they_are_fed_back(name: str, new_tokens: int) -> None:
    pairs, parts = chats(16, seed=3)
    model, ends = with_ends(name, [of_pair["head"] for of_pair in parts])
    contrast = detect_experts(
        model, tokenizer(), ContrastPairs(pairs), generate=new_tokens, stratify="position", batch_size=5
    )
    total = np.zeros_like(contrast.activations)
    by_length: list[int] = []
    tokens, skipped = np.zeros(2, int), 0
    for of_pair in parts:
        sides = [continued(model, head, new_tokens, ends) for head in of_pair["head"]]
        by_length += [len(written) for _, written in sides]
        if not all(written for _, written in sides):
            skipped += 1
            continue
        for side, (uses, written) in enumerate(sides):
            total[side] += uses.sum(axis=0)
            tokens[side] += len(written)
    assert len(set(by_length)) > 1  # ends come at different places
    assert 0 < skipped < 16
    np.testing.assert_array_equal(
        contrast.activations[contrast.activations >= 0], total[contrast.activations >= 0]
    )
    assert contrast.tokens.tolist() == tokens.tolist()
    assert (contrast.pairs, contrast.skipped) == (16 - skipped, skipped)
    assert (contrast.counted, contrast.new_tokens) == ("generated", new_tokens)
    assert contrast.strata is not None
    assert sum(contrast.strata.n) == tokens.sum()


def test_a_text_is_continued_as_it_is_and_a_prompt_without_its_answer() -> None:
    model = f.tiny("olmoe")
    asked = [["w1", "w2"], ["w4", "w5"]]
    said = {"role": "assistant", "content": "w6 w7"}
    chats_ = [[{"role": "user", "content": " ".join(words)}, said] for words in asked]
    chat_ids = [["<|user|>", *words, "<|end|>", "<|assistant|>"] for words in asked]
    text_ids = [["<s>", *words] for words in asked]
    for sides, prompts in ((chats_, chat_ids), ([" ".join(words) for words in asked], text_ids)):
        contrast = detect_experts(model, tokenizer(), [tuple(sides)], generate=4)
        for side, prompt in enumerate(prompts):
            uses, written = continued(model, [IDS[word] for word in prompt], 4, {f.EOS})
            assert contrast.tokens[side] == len(written)
            np.testing.assert_array_equal(contrast.activations[side], uses.sum(axis=0))


def test_under_a_steering_its_own_words_are_counted() -> None:
    model = f.tiny("olmoe")
    pairs, _ = chats(6)
    with Steering.from_experts(model, {1: [3]}, {1: [0]}).apply(model):
        contrast = detect_experts(model, tokenizer(), ContrastPairs(pairs), generate=3)
    assert (contrast.rates[:, 1, 3] == 1).all()
    assert (contrast.rates[:, 1, 0] == 0).all()


def test_what_cannot_be_continued_is_one_line() -> None:
    model = f.tiny("olmoe")
    only = [{"role": "assistant", "content": "w6"}]

    def refused(kind: type[Exception], words: str, rows: Any, of: nn.Module = model, **options: Any) -> None:
        with pytest.raises(kind, match=words) as raised:
            detect_experts(of, tokenizer(), rows, **options)
        assert "\n" not in str(raised.value)

    good = {"positive": "w1", "negative": "w2"}
    refused(
        PairsError,
        "pair 1, positive side: only an answer",
        [(only, [{**only[0], "content": "w7"}])],
        generate=2,
    )
    long = {**good, "negative": " ".join(["w2"] * 126)}
    refused(PairsError, "pair 2, negative side: 127 tokens, .* at most 126", [good, long], generate=2)
    assert detect_experts(model, tokenizer(), [good, long], generate=2, truncate=True).skipped == 1
    refused(ModelError, "cannot generate: give a model with a", [good], model.get_decoder(), generate=2)
    refused(PairsError, "leave out tokens='answer'", [good], generate=2, tokens="answer")
    ending = f.tiny("olmoe")
    ending.generation_config.eos_token_id = list(range(f.VOCABULARY))
    refused(PairsError, "the model ends every text at once", [good], ending, generate=2)


# Shards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_merged_shards_are_the_one_run_in_everything(count: int, tmp_path: Path) -> None:
    model, pairs, _, _ = example("deepseek_v3")
    others, _ = made_pairs(14, seed=9)
    options = {**EVERYTHING, "adjust": ContrastPairs(others, name="others")}
    whole = detect_experts(model, tokenizer(), ContrastPairs(pairs), batch_size=7, **options)
    shards = []
    for number in range(1, count + 1):
        shard = detect_experts(
            model, tokenizer(), ContrastPairs(pairs), batch_size=7, shard=f"{number}/{count}", **options
        )
        assert 0 < shard.pairs < whole.pairs
        shard.save_pretrained(tmp_path / str(number))
        shards.append(RoutingContrast.from_pretrained(tmp_path / str(number)))
    merged = merge_contrasts(reversed(shards))
    assert_same(merged, whole)
    assert merged.stability(top=4, by="adjusted") == whole.stability(top=4, by="adjusted")
    with pytest.raises(PlanError, match="in two shards"):
        merge_contrasts([shards[0], *shards])


def test_shards_split_no_cluster_and_are_balanced() -> None:
    model = example("olmoe")[0]
    rows = [{"positive": f"w{i + 1}", "negative": f"w{i + 2}", "group": f"g{i % 10}"} for i in range(30)]
    shards = [detect_experts(model, tokenizer(), rows, shard=f"{number}/4") for number in (1, 2, 3, 4)]
    assert [shard.clusters for shard in shards] == [3, 3, 2, 2]
    assert [shard.pairs for shard in shards] == [9, 9, 6, 6]
    with pytest.raises(PairsError, match=r"no pair is left to count in shard 11/11 \(10 clusters\)"):
        detect_experts(model, tokenizer(), rows, shard="11/11")
    for wrong in ("0/4", "5/4", "4", "1/0", "a/b", "-1/2", "1/2/3", "¹/2"):
        with pytest.raises(PairsError, match="right is I/N"):
            Shard.parse(wrong)


def test_contrasts_of_different_things_are_not_merged() -> None:
    model, pairs, _, _ = example("olmoe")
    parts = [ContrastPairs(part) for part in (pairs[::2], pairs[1::2])]
    plain = detect_experts(model, tokenizer(), parts[0])
    for options, words in (
        ({"stratify": "position"}, r"differ in their strata \(none and \[0, 1, 2"),
        ({"bootstrap": 3}, "differ in their bootstrap"),
        ({"generate": 2}, r"differ in their .*, tokens \(target and generated\)"),
        ({"weighting": "pair"}, "differ in their weighting"),
        ({"adjust": [{"positive": "w1", "negative": "w2"}]}, "has a nuisance and another none"),
    ):
        other = detect_experts(model, tokenizer(), [{"positive": "w3", "negative": "w4"}], **options)
        with pytest.raises(PlanError, match=words):
            merge_contrasts([plain, other])
    a, b = (detect_experts(model, tokenizer(), parts[0], generate=n) for n in (1, 2))
    with pytest.raises(PlanError, match=r"number of new tokens \(1 and 2\)"):
        merge_contrasts([a, b])


# A nuisance and replicates ----------------------------------------------------------------------------------


def test_a_nuisance_is_the_contrast_of_its_own_pairs() -> None:
    model, pairs, _, _ = example("olmoe")
    others, _ = made_pairs(25, seed=9)
    both = detect_experts(model, tokenizer(), ContrastPairs(pairs), adjust=ContrastPairs(others))
    alone = detect_experts(model, tokenizer(), ContrastPairs(pairs))
    nuisance = detect_experts(model, tokenizer(), ContrastPairs(others))
    assert_same(both.nuisance, nuisance)
    assert_same(both, alone.adjusted_by(nuisance))
    np.testing.assert_array_equal(both.risk_difference, alone.risk_difference)
    slope, share = slope_of(alone.risk_difference, nuisance.risk_difference)
    assert (both.adjustment.slope, both.adjustment.share) == (slope, share)
    np.testing.assert_array_equal(both.adjusted, alone.risk_difference - slope * nuisance.risk_difference)
    assert both.table()["adjusted"].notna().all()
    steering = both.select(top=3, by="adjusted")
    assert steering.provenance["adjustment"] == {"slope": slope, "share": share}
    assert [source.get("role") for source in steering.provenance["from"]] == [None, None, "nuisance"]
    assert both.sha256 != alone.sha256


def test_the_contrast_itself_as_nuisance_leaves_nothing() -> None:
    """And its clusters are shared: the error is the sum of both."""
    model = example("olmoe")[0]
    pairs = ContrastPairs([ContrastPair(p.positive, p.negative) for p in made_pairs(25, seed=2)[0]])
    contrast = detect_experts(model, tokenizer(), pairs, adjust=pairs)
    np.testing.assert_allclose(contrast.adjusted, 0, atol=1e-15)
    assert contrast.adjustment.slope == pytest.approx(1)
    np.testing.assert_allclose(
        contrast.estimate("adjusted").standard_error, 2 * contrast.standard_error, rtol=1e-9
    )


def test_replicates_are_weighted_counts() -> None:
    model, pairs, known, counts = example("olmoe")
    lengths = np.array([[len(target) for _, target in sides] for sides in known])
    contrast = detect_experts(model, tokenizer(), ContrastPairs(pairs), bootstrap=5)
    assert contrast.replicates is not None
    ids = np.array([hash_of_cluster(pair.cluster) for pair in pairs])
    weights = poisson_weights(ids, np.arange(5))
    for r in range(5):
        np.testing.assert_array_equal(
            contrast.replicates.activations[r], np.tensordot(weights[r], counts, axes=1)
        )
        np.testing.assert_array_equal(contrast.replicates.tokens[r], weights[r] @ lengths)


def test_stability_is_the_share_of_replicates_that_choose_alike() -> None:
    model = example("olmoe")[0]
    pairs = [ContrastPair(p.positive, p.negative) for p in made_pairs(30, seed=6)[0]]
    others = [ContrastPair(p.positive, p.negative) for p in made_pairs(30, seed=7)[0]]
    contrast = detect_experts(
        model,
        tokenizer(),
        ContrastPairs(pairs),
        adjust=ContrastPairs(others),
        **{**EVERYTHING, "bootstrap": 30},
    )
    places = [hash_of_cluster(pair.cluster) for pair in pairs]
    weights = poisson_weights(np.array(places), np.arange(30))
    hits: dict[tuple[int, int], int] = {}
    chosen = contrast.choose(top=5).signs
    for r in range(30):
        again = [pair for pair, times in zip(pairs, weights[r], strict=True) for _ in range(times)]
        repeated = [
            ContrastPair(pair.positive, pair.negative, group=str(number)) for number, pair in enumerate(again)
        ]
        other = detect_experts(model, tokenizer(), ContrastPairs(repeated)).choose(top=5).signs
        for layer, experts in chosen.items():
            for expert, sign in experts.items():
                hits[layer, expert] = hits.get((layer, expert), 0) + (
                    other.get(layer, {}).get(expert) == sign
                )
    shares = contrast.stability(top=5)
    assert {(i, e): s * 30 for i, of in shares.items() for e, s in of.items()} == pytest.approx(hits)
    assert 0 < min(hits.values()) < 30
    told = contrast.select(top=5).provenance["stability"]
    assert told["replicates"] == 30
    assert {(e["layer"], e["expert"]): e["share"] * 30 for e in told["experts"]} == pytest.approx(hits)
    for by in ("lower_bound", "stratified", "stratified_lower_bound", "adjusted", "adjusted_lower_bound"):
        found = contrast.stability(activate=2, deactivate=2, by=by)
        assert all(0 <= share <= 1 for experts in found.values() for share in experts.values())
        assert max(share for experts in found.values() for share in experts.values()) > 0.1


def test_a_certain_choice_is_stable_and_reversing_keeps_it() -> None:
    """An expert that one side always uses and the other never is chosen in every replicate."""
    model = f.tiny("olmoe")
    rows = [{"positive": f"w{i}", "negative": f"w{i + 25}"} for i in range(1, 26)]
    contrast = detect_experts(model, tokenizer(), rows, bootstrap=20)
    shares = contrast.stability(top=1)
    back = contrast.stability(top=1, reverse=True)
    assert shares == back


def test_pairs_weigh_the_same_also_in_replicates() -> None:
    model, pairs, known, counts = example("olmoe")
    lengths = np.array([[len(target) for _, target in sides] for sides in known])
    contrast = detect_experts(model, tokenizer(), ContrastPairs(pairs), weighting="pair", bootstrap=4)
    weights = poisson_weights(np.array([hash_of_cluster(p.cluster) for p in pairs]), np.arange(4))
    rates = counts / lengths[:, :, None, None]
    delta = rates[:, 0] - rates[:, 1]
    expected = np.tensordot(weights / weights.sum(axis=1, keepdims=True), delta, axes=1)
    np.testing.assert_allclose(contrast._replicated("risk_difference"), expected, atol=1e-10)


def test_options_that_do_not_go_together() -> None:
    model = example("olmoe")[0]
    rows = [{"positive": "w1", "negative": "w2"}]
    for options, words in (
        ({"stratify": "length"}, "stratify='length' is unknown: use 'position'"),
        ({"tokens": "all"}, "tokens='all' is unknown"),
        ({"generate": -1}, "generate is -1"),
        ({"bootstrap": -1}, "bootstrap is -1"),
        ({"stratify": "position", "weighting": "pair"}, "strata weigh tokens"),
    ):
        with pytest.raises(PairsError, match=words):
            detect_experts(model, tokenizer(), rows, **options)


# The reference's recipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen3_moe"])
def test_softmax_routers_give_the_counts_of_the_reference(name: str) -> None:
    """One text at a time, the router logits of every token kept, top-k taken again, loops in Python."""
    model, pairs, known, _ = example(name)
    contrast = detect_experts(model, tokenizer(), ContrastPairs(pairs))
    counts = np.zeros_like(contrast.activations)
    for sides in known:
        for side, (ids, target) in enumerate(sides):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), output_router_logits=True).router_logits
            for layer, of_layer in enumerate(logits):
                for token in target:
                    for expert in of_layer[token].topk(f.TOP_K).indices.tolist():
                        counts[side, layer, expert] += 1
    np.testing.assert_array_equal(contrast.activations, counts)
