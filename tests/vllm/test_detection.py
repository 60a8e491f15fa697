"""Counts made inside the engine equal those of transformers, whatever the engine does with a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from engine import closing, open_engine, params, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from worded import CONTEXT, save_worded

import steersman
from steersman import ContrastPairs, RoutingContrast
from steersman.errors import ArtifactError, RequestError, ServingError, SteeringNotApplied
from steersman.vllm.bank import RouterPlace
from steersman.vllm.counting import CountedText, Counter, counted_key, merged
from steersman.vllm.detection import InEngine, detect_experts, runs_of

COUNT = 48
OPTIONS = {"max_model_len": CONTEXT, "max_num_batched_tokens": 64, "block_size": 32}
"""Prompts of up to 150 tokens come in chunks."""


class Opened(NamedTuple):
    """A model in transformers, and the same one in the engine."""

    model: Any
    tokenizer: Any
    llm: Any
    folder: Path


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp("olmoe")
    model, tokenizer = save_worded("olmoe", folder)
    with closing(open_engine(folder, "olmoe", {"count": COUNT}, **OPTIONS)) as llm:
        yield Opened(model, tokenizer, llm, folder)


@pytest.fixture(scope="module")
def pairs() -> ContrastPairs:
    """Sides with one long prompt in common, of which two answers are the targets, and groups of pairs."""
    return long_pairs()


def long_pairs(*, prompts_differ: bool = False) -> ContrastPairs:
    """Pairs in groups of two; where what comes before the answers is compared, the sides differ there."""
    lab = list(steersman.load_pairs("lab:refusal/train"))
    said = [" ".join(m["content"] for pair in lab[i : i + 4] for m in pair.positive) for i in range(0, 60, 2)]
    rows = []
    for number, (text, pair) in enumerate(zip(said, lab, strict=False)):
        words = text.split()[:90]
        sides = {
            name: [{"role": "system", "content": " ".join(system)}, *side]
            for name, system, side in (
                ("positive", words, pair.positive),
                ("negative", words[::-1] if prompts_differ else words, pair.negative),
            )
        }
        rows.append({**sides, "group": str(number // 2), "id": str(number)})
    return steersman.load_pairs(rows)


def assert_equal(seen: RoutingContrast, expected: RoutingContrast) -> None:
    """All that was counted, and every statistic of it."""
    assert (seen.activations == expected.activations).all()
    assert (seen.tokens == expected.tokens).all()
    assert (seen.pairs, seen.skipped, seen.alike) == (expected.pairs, expected.skipped, expected.alike)
    assert (seen.cluster_ids == expected.cluster_ids).all()
    assert seen.table().equals(expected.table())
    for part in ("sums", "strata", "replicates"):
        ours, theirs = getattr(seen, part), getattr(expected, part)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            tensors, others = ours.to_tensors()[0], theirs.to_tensors()[0]
            assert all((tensors[key] == others[key]).all() for key in others)


@pytest.mark.parametrize(
    "how",
    [
        {"bootstrap": 8},
        {"tokens": "prompt", "weighting": "pair"},
        {"stratify": "position"},
        {"generate": 5},
        {"shard": "2/3", "adjust": "lab:faithfulness/dev"},
    ],
    ids=lambda how: "-".join(how),
)
def test_equals_transformers(opened: Opened, how: dict[str, Any]) -> None:
    pairs = long_pairs(prompts_differ="tokens" in how or "generate" in how)
    expected = steersman.detect_experts(opened.model, opened.tokenizer, pairs, **how)
    seen = detect_experts(opened.llm, pairs, **how)
    assert_equal(seen, expected)
    assert seen.nuisance is None or (seen.nuisance.activations == expected.nuisance.activations).all()
    assert seen.weights_id == expected.weights_id
    assert seen.made_from[0]["engine"].startswith("vllm 0.")


def test_what_is_before_the_target_comes_from_the_cache(opened: Opened) -> None:
    (prompt,) = prompts(1, 100)
    ends = prompts(3, 20, seed=1)
    reader = InEngine(opened.llm, opened.model, opened.tokenizer)
    opened.llm.reset_prefix_cache()

    def read(ids: list[int], runs: list[tuple[int, int, int]]) -> int:
        (output,) = opened.llm.generate(
            [{"prompt_token_ids": ids}],
            params(tokens=1, extra_args={"steersman": CountedText(tuple(runs))}),
            use_tqdm=False,
        )
        return int(output.num_cached_tokens)

    assert read(prompt + ends[0], [(100, 120, 0)]) == 0
    assert read(prompt + ends[1], [(100, 120, 1)]) == 96  # three blocks of 32
    # The same text again: its target tokens are computed anew.
    assert read(prompt + ends[1], [(100, 120, 2)]) == 96
    assert read(prompt + ends[1], [(70, 72, 3), (119, 120, 4)]) == 64
    (plain,) = opened.llm.generate([{"prompt_token_ids": prompt + ends[2]}], params(tokens=1), use_tqdm=False)
    assert plain.num_cached_tokens == 96
    (answer,) = opened.llm.collective_rpc("steersman_counts", args=(5,))
    counts = merged([answer], [site.facts.layer for site in reader.sites], 5, 8)
    assert (counts.sum(axis=-1) == 2 * np.array([20, 20, 20, 2, 1])[:, None]).all()
    assert (counts[1] == counts[2]).all()


def test_nobody_asks_from_outside(opened: Opened) -> None:
    told = CountedText(((0, 4, 0),)).told()
    with pytest.raises(RequestError, match="ask by name"):
        opened.llm.generate([{"prompt_token_ids": [5, 6]}], params(extra_args={"steersman": told}))
    extra = {"steersman": CountedText(()), "steering": "none"}
    with pytest.raises(RequestError, match="not steered"):
        opened.llm.generate([{"prompt_token_ids": [5, 6]}], params(extra_args=extra))


def test_resumes(opened: Opened, pairs: ContrastPairs, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    expected = detect_experts(opened.llm, pairs)
    reader_count, calls = InEngine.count, []

    def count(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Stop
        return reader_count(self, *args)

    try:
        InEngine.count = count  # type: ignore[method-assign]
        with pytest.raises(Stop):
            detect_experts(opened.llm, pairs, checkpoint=tmp_path / "saved")
    finally:
        InEngine.count = reader_count  # type: ignore[method-assign]
    assert_equal(detect_experts(opened.llm, pairs, checkpoint=tmp_path / "saved", resume=True), expected)
    with pytest.raises(ArtifactError, match=r"differs in .*engine"):
        steersman.detect_experts(
            opened.model, opened.tokenizer, pairs, checkpoint=tmp_path / "saved", resume=True
        )


# ---------------------------------------------------------------- the table alone


SCHEDULES = st.lists(
    st.tuples(
        st.integers(1, 40),  # tokens of a text
        st.sets(st.integers(0, 39), max_size=40),  # its target positions
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 15)), min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("on_host", [True, False])
@given(SCHEDULES, st.integers(0, 1 << 30))
@settings(max_examples=30)
def test_each_target_token_is_counted_once(on_host: bool, texts: list[Any], seed: int) -> None:
    """Against a slow version: chunks of any size, positions computed anew, the model run on nothing."""
    experts, top_k, layers = 6, 2, (0, 2)
    random = np.random.default_rng(seed)
    routers = [RouterPlace(layer, experts) for layer in layers]
    counter = Counter(routers, 2 * len(texts), 64, torch.device("cpu"))
    counter._on_host = on_host  # the other way is the device's, here with the host's tensors
    chosen = [np.argsort(random.random((len(layers), 40, experts)))[..., :top_k] for _ in texts]
    expected = np.zeros((2 * len(texts), len(layers), experts), np.int64)
    places, queues = [0] * len(texts), []
    for number, (length, positions, chunks) in enumerate(texts):
        target = np.array(sorted(p for p in positions if p < length), np.int64)
        strata = (target >= 7).astype(np.int64)
        text = CountedText(runs_of(target, strata, 2 * number))
        counter.add(str(number), {"steersman": text.told()})
        for position, stratum in zip(target, strata, strict=True):
            for layer in range(len(layers)):
                np.add.at(expected[2 * number + stratum, layer], chosen[number][layer, position], 1)
        queues.append([*chunks, *[(0, 15)] * 40])
    while any(place < texts[number][0] for number, place in enumerate(places)):
        step = []
        for number, (length, *_) in enumerate(texts):
            back, size = queues[number].pop(0)
            if places[number] < length:
                first = 0 if back == 2 else places[number]  # preempted, and computed from the start
                step.append((number, first, min(size, length - first)))
                places[number] = first + step[-1][2]
        counter.lay_out(
            [str(n) for n, *_ in step], [size for *_, size in step], [first for _, first, _ in step]
        )
        rows = [chosen[n][:, first : first + size] for n, first, size in step]
        for site in range(len(layers)):
            ids = torch.from_numpy(np.concatenate([row[site] for row in rows]))
            counter.count(torch.cat([ids, ids[:3]]), torch.tensor([site]))  # padded
            if on_host:
                counter.count(ids, torch.tensor([site]))  # a forward on nothing that nobody laid out
        if not on_host:
            counter.rest()
            counter.count(ids, torch.tensor([0]))
    taken = {"layers": list(layers), "counts": counter.take(2 * len(texts))}
    assert (merged([taken], layers, 2 * len(texts), experts) == expected).all()
    assert not any(counter.take(2 * len(texts)))


def test_a_router_that_is_not_counted_is_heard() -> None:
    counter = Counter([RouterPlace(layer, 4) for layer in (1, 3)], 2, 64, torch.device("cpu"))

    def forward(tokens: int, sites: tuple[int, ...]) -> None:
        for site in sites:
            counter.count(torch.zeros(tokens, 2, dtype=torch.int64), torch.tensor([site]))

    counter.listen(lambda tokens: forward(tokens, (0, 1)))
    assert not any(counter.take(2))
    with pytest.raises(SteeringNotApplied, match=r"layers \[3\]"):
        counter.listen(lambda tokens: forward(tokens, (0,)))


def test_ranks_are_merged() -> None:
    def answer(layers: list[int], values: list[int], places: int = 2) -> dict[str, Any]:
        counts = np.repeat(np.array(values, np.int32), places * 3).reshape(len(layers), places, 3)
        return {"layers": layers, "counts": counts.transpose(1, 0, 2).tobytes()}

    silent = {"layers": [0, 1], "counts": b""}
    both = merged([answer([0, 1], [5, 7]), silent, answer([3], [2]), answer([3], [4])], [0, 1, 3], 2, 4)
    assert (both[:, :, :3] == np.array([5, 7, 6])[None, :, None]).all()
    assert not both[:, :, 3].any()
    with pytest.raises(ServingError, match=r"layers \[3\]"):
        merged([answer([0, 1], [5, 7])], [0, 1, 3], 2, 3)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 40))
def test_blocks_are_shared_up_to_the_first_target_token(first: int, block: int, size: int) -> None:
    told = CountedText(((first, first + 3, 0), (first + 9, first + 10, 0))).told()
    key = counted_key(told, (block + 1) * size)
    assert (key is None) == all(position < first for position in range(block * size, (block + 1) * size))
    if key is not None:
        assert key != counted_key(CountedText(((first, first + 3, 0),)).told(), (block + 1) * size)


# ------------------------------------------------------------ engines of their own, which end the one above


def test_preempted_texts_are_counted_once(opened: Opened) -> None:
    texts, others = prompts(8, 150), prompts(2, 31, seed=1)
    runs = [((20, 60, number), (61, 150, number)) for number in range(len(texts))]
    given = [{"prompt_token_ids": ids} for text in texts for ids in (others[0], text, others[1])]
    asked = [
        one
        for of_text in runs
        for one in (
            params(tokens=90),
            params(tokens=1, extra_args={"steersman": CountedText(of_text)}),
            params(),
        )
    ]
    reader = InEngine(opened.llm, opened.model, opened.tokenizer)
    expected = reader._read(texts, [CountedText(of_text) for of_text in runs], len(texts))
    options = {**OPTIONS, "num_gpu_blocks_override": 9, "max_num_batched_tokens": 32}
    with closing(open_engine(opened.folder, "olmoe", {"count": COUNT}, **options)) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempt, preempted = scheduler._preempt_request, []

        def noted(request: Any, *rest: Any, **more: Any) -> Any:
            preempted.append((request.num_prompt_tokens, request.num_computed_tokens))
            return preempt(request, *rest, **more)

        scheduler._preempt_request = noted
        llm.generate(given, asked, use_tqdm=False)
        answers = llm.collective_rpc("steersman_counts", args=(len(texts),))
    assert any(length == 150 and computed > 60 for length, computed in preempted)
    seen = merged(answers, [0, 1, 2], len(texts), 8)
    assert (seen.sum(axis=-1) == 2 * 129).all()
    assert (seen == expected).all()


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("eager", [True, False])
def test_families(family: str, eager: bool, pairs: ContrastPairs, tmp_path: Path) -> None:
    model, tokenizer = save_worded(family, tmp_path)
    options = {**OPTIONS, "enforce_eager": eager}
    if family == "deepseek_v3":
        options.pop("block_size")
    with closing(open_engine(tmp_path, family, {"count": COUNT}, **options)) as llm:
        assert_equal(detect_experts(llm, pairs), steersman.detect_experts(model, tokenizer, pairs))
