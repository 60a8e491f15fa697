"""Fitting maps between tiny models: what is known to be true of them, and every way of doing the work."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from concepts.mapped import WORDS, big, gpt2, llama, rotated, small, texts, tokenizer
from steersman import (
    AffineMap,
    ArtifactError,
    ConceptVector,
    ModelError,
    PairsError,
    PlanError,
    WeightsMismatch,
    fit_affine_map,
    merge_affine_maps,
    refine_concept,
)
from steersman import progress as saving
from steersman.concepts import fitting, passes
from steersman.concepts.aligned_texts import AlignedTexts
from steersman.concepts.alignment import Reader
from steersman.concepts.joint_moments import Sides
from steersman.concepts.rows import MASSIVE
from steersman.concepts.states import block_outputs
from steersman.concepts.transplant import transplant
from steersman.concepts.transplant_check import check_transplant
from steersman.models.encoding import hash_of_cluster
from steersman.progress import units_done
from steersman.texts import load_texts

MANY = texts(200, seed=2)


def assert_same(one: AffineMap, other: AffineMap, within: float = 1e-6) -> None:
    """Sums in another order, other chunks of float32 products, batches of another size: last digits."""
    assert (one.rows, one.texts, one.held_out_rows, one.held_out_texts, one.skipped) == (
        *(other.rows, other.texts, other.held_out_rows, other.held_out_texts, other.skipped),
    )
    assert one.layers == other.layers
    for layer in one.layers:
        mine, theirs = one.maps[layer], other.maps[layer]
        assert (mine.source_layer, mine.ridge) == (theirs.source_layer, theirs.ridge)
        assert torch.allclose(mine.weight, theirs.weight, rtol=within, atol=within)
        assert torch.allclose(mine.bias, theirs.bias, rtol=within, atol=within)
        assert mine.r2 == pytest.approx(theirs.r2, abs=1e-6)  # judged in float32
        assert one.norms[layer].count == other.norms[layer].count
        assert one.norms[layer].median == pytest.approx(other.norms[layer].median, rel=0.006)
    assert one.table is not None
    assert other.table is not None
    assert torch.allclose(one.table.r2, other.table.r2, atol=1e-6)
    assert torch.allclose(one.table.r2_control, other.table.r2_control, atol=1e-4)


# --------------------------------------------------------------------------------------------- what is known


def test_a_model_mapped_onto_itself() -> None:
    found = fit_affine_map(small(), small(), MANY)
    assert found.table is not None
    for layer in found.layers:
        assert found.maps[layer].source_layer == layer
        assert found.maps[layer].r2 >= 0.9999
        assert found.maps[layer].r2_control < 0.05
        assert torch.allclose(found.map_vector(layer, torch.ones(16)), torch.ones(16), atol=0.02)
        assert found.share_explained(layer, torch.randn(16)) > 0.999


def test_a_turned_residual_stream_is_found() -> None:
    model, read = small()
    generator = torch.Generator().manual_seed(7)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    copy = rotated(model, turn)
    ids = [read("ban der kis", return_tensors="np")["input_ids"][0]]
    for layer, states in block_outputs(model, range(3), ids).items():
        assert torch.allclose(block_outputs(copy, [layer], ids)[layer], states @ turn.T, atol=1e-5)
    found = fit_affine_map((model, read), (copy, read), MANY)
    for layer in found.layers:
        assert float((found.maps[layer].weight - turn.double()).abs().max()) <= 0.01
        assert found.maps[layer].r2 >= 0.9999


def by_hand(source: Any, target: Any, given: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of either model's layer 1, text by text, for texts of words: a row at the end of each word but the
    first, where the source reads words and the target halves of words.
    """
    xs, ys = [], []
    for text in given:
        count = len(text.split())
        pair = []
        for (model, read), places in ((source, range(1, count)), (target, range(3, 2 * count, 2))):
            ids = read(text, return_tensors="pt")["input_ids"]
            states = model(ids, output_hidden_states=True).hidden_states
            # hidden_states[2] is the output of decoder layer 1, unless that is the last and normed.
            pair.append((states[2][0].double(), list(places)))
        usual = [states.norm(dim=1) <= MASSIVE * states.norm(dim=1).median() for states, _ in pair]
        for one, two in zip(pair[0][1], pair[1][1], strict=True):
            if usual[0][one] and usual[1][two]:
                xs.append(pair[0][0][one])
                ys.append(pair[1][0][two])
    return torch.stack(xs), torch.stack(ys)


@torch.no_grad()
def test_another_tokenizer_row_by_row() -> None:
    given = texts(80, seed=5, chats=False)
    source, target = small(), (llama(24, 3, seed=3), tokenizer(split=True))
    found = fit_affine_map(source, target, given, source_layers=[1], target_layers=[1], batch_size=7)
    of = found.maps[1]
    x, y = by_hand(source, target, given)
    assert found.rows == len(x)
    aligned = AlignedTexts(load_texts(given), Reader(source[1]), Reader(target[1]), "boundaries")
    held = {text.number for unit in range(len(aligned.units)) for text in aligned.unit(unit) if text.held_out}
    assert found.held_out_texts == len(held)
    fit_x, fit_y = by_hand(source, target, [text for number, text in enumerate(given) if number not in held])
    sx, sy = fit_x.std(0, correction=0), fit_y.std(0, correction=0)
    a, b = (fit_x - fit_x.mean(0)) / sx, (fit_y - fit_y.mean(0)) / sy
    system = a.T @ a + of.ridge * len(a) * torch.eye(16).double()
    weight = sy[:, None] * torch.linalg.solve(system, a.T @ b).T / sx
    assert torch.allclose(of.weight, weight, atol=1e-4)
    held_x, held_y = by_hand(source, target, [given[number] for number in sorted(held)])
    residual = ((held_y - held_x @ weight.T - (fit_y.mean(0) - weight @ fit_x.mean(0))) / sy) ** 2
    r2 = 1 - residual.sum() / (((held_y - fit_y.mean(0)) / sy) ** 2).sum()
    assert of.r2 == pytest.approx(float(r2), abs=1e-4)
    exact = y.norm(dim=1).sort().values[(len(y) - 1) // 2]
    assert found.norms[1].median == pytest.approx(float(exact), rel=0.003)


def test_the_norms_of_chats_are_those_of_their_answers() -> None:
    chat = [
        {"role": "user", "content": " ".join(WORDS[:9])},
        {"role": "assistant", "content": " ".join(WORDS[9:12])},
    ]
    other = [{"role": "user", "content": WORDS[3]}, {"role": "assistant", "content": WORDS[4]}]
    many = [
        chat,
        *([*other[:1], {"role": "assistant", "content": " ".join(WORDS[:n])}] for n in range(1, 30)),
    ]
    found = fit_affine_map(small(), small(), many)
    answers = sum(2 + len(c[1]["content"].split()) for c in many)  # the marker before it, its words, its end
    assert found.norms[0].count == answers < found.rows


def test_the_papers_rows() -> None:
    found = fit_affine_map(small(), big(), MANY, rows="last")
    assert found.rows == found.texts == 200
    assert found.alignment == "last"


def test_a_concept_chooses_the_source_layer() -> None:
    pairs = [
        {"positive": f"ban {a} {b}", "negative": f"tor {a} {b}", "group": a}
        for a, b in itertools.product(WORDS[8:16], WORDS[20:24])
    ]
    concept = refine_concept(*small(), pairs)
    alone = {"concept": concept, "concept_prompts": False}
    found = fit_affine_map(small(), big(), MANY, **alone)
    assert found.table is not None
    assert found.table.source_layers == (concept.best_layer,)
    assert {of.source_layer for of in found.maps.values()} == {concept.best_layer}
    every = fit_affine_map(small(), big(), MANY, **alone, source_layers=[0, 1, 2])
    assert {of.source_layer for of in every.maps.values()} == {concept.best_layer}
    assert_same(found, fit_affine_map(small(), big(), MANY, source_layers=[concept.best_layer]))
    with pytest.raises(WeightsMismatch, match="refine it in this source"):
        fit_affine_map((llama(seed=8), tokenizer()), big(), MANY, concept=concept)
    with pytest.raises(ModelError, match="none of the source layers 1"):
        fit_affine_map(
            small(), big(), MANY, concept=refine_concept(*small(), pairs, layers=[0]), source_layers=[1]
        )


def two_concepts() -> list[ConceptVector]:
    """That were refined at different layers, from groups of pairs."""
    found = []
    for layer, ends in ((0, ("ban", "tor")), (2, ("kis", "der"))):
        rows = [
            {"positive": f"{a} {b} {ends[0]}", "negative": f"{a} {b} {ends[1]}", "group": a}
            for a, b in itertools.product(WORDS[8:20], WORDS[20:23])
        ]
        found.append(refine_concept(*small(), rows, layers=[layer]))
    return found


def test_half_of_the_groups_of_a_concept_make_the_map_and_the_others_judge(tmp_path: Path) -> None:
    concept = two_concepts()[0]
    found = fit_affine_map(small(), big(), MANY, concept=concept)
    without = fit_affine_map(small(), big(), MANY, concept=concept, concept_prompts=False)
    assert (found.texts, without.texts) == (200 + 6 * 3 * 2, 200)
    assert found.norms == without.norms  # doses are of the texts
    assert len(found.fitted_groups) == 6
    assert without.fitted_groups == frozenset()
    assert found.made_from[0] == without.made_from[0]
    found.save_pretrained(tmp_path / "m")
    found = AffineMap.from_pretrained(tmp_path / "m")
    looked, all_judge = (check_transplant(of, concept, big()) for of in (found, without))
    assert (looked.clusters, looked.held_out) == (6, 18)
    assert (all_judge.clusters, all_judge.held_out) == (12, 36)
    pairs = concept._pairs
    assert pairs is not None
    for group in found.fitted_groups:  # whole groups, on either side of the line
        assert group in {hash_of_cluster(pair.cluster) for pair in pairs}
    # What is among the texts anyway cannot judge either.
    seen = next(pair for pair in pairs if hash_of_cluster(pair.cluster) not in found.fitted_groups)
    again = fit_affine_map(small(), big(), [*MANY, seen.positive], concept=concept)
    assert again.fitted_groups == found.fitted_groups | {hash_of_cluster(seen.cluster)}
    assert check_transplant(again, concept, big()).clusters == 5


def test_several_concepts_in_one_map(tmp_path: Path) -> None:
    concepts = two_concepts()
    found = fit_affine_map(small(), big(), MANY, concept=concepts)
    assert {of.source_layer for of in found.maps.values()} == {0}
    assert set(found.others) == {(2, 0), (2, 1)}
    found.save_pretrained(tmp_path / "m")
    found = AffineMap.from_pretrained(tmp_path / "m")
    for concept, layer in zip(concepts, (0, 2), strict=True):
        of = found.of_concept(concept)
        assert {of_layer.source_layer for of_layer in of.maps.values()} == {layer}
        check = check_transplant(found, concept, big())
        assert {entry.source_layer for entry in check.layers.values()} == {layer}
        plan = transplant(found, concept, 1.0, layers=[1], force=True)
        expected = of.map_vector(1, concept.vectors[layer])
        assert torch.equal(plan.edits[0].vectors[1], expected)  # type: ignore[union-attr]
    parts = [fit_affine_map(small(), big(), MANY, concept=concepts, shard=f"{n}/2") for n in (1, 2)]
    merged = merge_affine_maps(parts)
    assert_same(merged, found)
    assert set(merged.others) == set(found.others)
    with pytest.raises(ModelError, match="the concept has layers 0, and none of the source layers 1, 2"):
        fit_affine_map(small(), big(), MANY, concept=concepts, source_layers=[1, 2])


# ------------------------------------------------------------------------------------- every way of doing it


def test_batches_and_families_and_memory_of_models() -> None:
    target = (gpt2(), tokenizer(split=True))
    whole = fit_affine_map(small(), target, MANY)
    assert_same(whole, fit_affine_map(small(), target, MANY, batch_size=3))
    assert whole._target is not None
    assert whole._target[0] is target[0]
    assert whole._target[1] is target[1]
    passing = fit_affine_map(small(), (gpt2(), tokenizer()), MANY[:60])
    import gc

    gc.collect()
    assert passing._target is None


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    made = []
    for name, (model, read) in (("small", small()), ("big", big())):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        read.save_pretrained(folder)
        made.append(str(folder))
    return made[0], made[1]


def test_one_model_after_the_other(folders: tuple[str, str]) -> None:
    whole = fit_affine_map(small(), big(), MANY)
    found = fit_affine_map(*folders, MANY, sequential=True, source_options={"device": "cpu"})
    assert_same(found, whole)
    assert (found.source.name, found.target.name) == folders
    assert found.source.weights_id == whole.source.weights_id
    assert_same(fit_affine_map(folders[0], big(), MANY), whole)


def test_kept_states_serve_other_targets(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "states"
    first = fit_affine_map(small(), big(), MANY, source_states=kept)
    assert_same(first, fit_affine_map(small(), big(), MANY))
    opened: list[str] = []
    original = fitting.Side.ready

    def noted(side: Any) -> Any:
        opened.append(side.identity.name)
        return original(side)

    monkeypatch.setattr(fitting.Side, "ready", noted)
    other = (gpt2(), tokenizer())
    second = fit_affine_map(
        folders[0], other, MANY, source_states=kept, sequential=True, source_layers=[1, 2]
    )
    assert opened == [""]  # the target alone
    assert_same(second, fit_affine_map(small(), other, MANY, source_layers=[1, 2]))
    file = sorted(kept.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=r"safetensors: damaged"):
        fit_affine_map(small(), other, MANY, source_states=kept)
    file.unlink()
    assert_same(fit_affine_map(small(), other, MANY, source_states=kept, source_layers=[1, 2]), second)
    for how, message in (
        ({"texts": MANY[:50]}, r"differs in texts \(.+ there, .+ here\), tokens \(.+\): give another folder"),
        ({"source": (llama(seed=9), tokenizer())}, "differs in weights"),
    ):
        given: dict[str, Any] = {"source": small(), "target": other, "texts": MANY, **how}
        with pytest.raises(ArtifactError, match=message):
            fit_affine_map(**given, source_states=kept)
    narrow = tmp_path / "narrow"
    fit_affine_map(small(), other, MANY, source_states=narrow, source_layers=[1])
    with pytest.raises(ArtifactError, match=r"keeps states of layers \[1\], not of 2"):
        fit_affine_map(small(), other, MANY, source_states=narrow, source_layers=[2])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds other files"):
        fit_affine_map(small(), other, MANY, source_states=tmp_path / "mine")


@pytest.mark.parametrize("count", [2, 3])
def test_parts_merge_into_the_very_result(count: int, tmp_path: Path) -> None:
    whole = fit_affine_map(small(), big(), MANY)
    parts = []
    for number in range(count, 0, -1):
        fit_affine_map(small(), big(), MANY, shard=f"{number}/{count}").save_pretrained(
            tmp_path / str(number)
        )
        parts.append(AffineMap.from_pretrained(tmp_path / str(number)))
    merged = merge_affine_maps(parts)
    assert_same(merged, whole)
    assert merged.shard is None
    with pytest.raises(ArtifactError, match=f"parts are missing: {count}/{count}"):
        merge_affine_maps(parts[1:])
    with pytest.raises(ArtifactError, match="is given twice"):
        merge_affine_maps([parts[0], *parts])
    with pytest.raises(ArtifactError, match="is whole"):
        merge_affine_maps([merged, *parts])
    with pytest.raises(ArtifactError, match=r"this is part \d/\d of a map: merge all parts first"):
        parts[0].map_vector(0, torch.ones(16))
    other = fit_affine_map(small(), big(), MANY, shard=f"1/{count}", seed=1)
    with pytest.raises(ArtifactError, match=r"not of one map: they differ in their seed \(1 and 0\)"):
        merge_affine_maps([other, *parts[:-1]])


class Stop(BaseException):
    """Stands for whatever ends a process."""


def stopped_after(forwards: int, folder: Path) -> None:
    model, read = big()
    calls = itertools.count(1)

    def stop(*_: object) -> None:
        if next(calls) > forwards:
            raise Stop

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    try:
        with pytest.raises(Stop):
            fit_affine_map(small(), (model, read), MANY, checkpoint=folder, resume=True)
    finally:
        handle.remove()


def test_stops_at_any_place_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SHARE", float("inf"))
    whole = fit_affine_map(small(), big(), MANY)
    folder = tmp_path / "m.partial"
    places = []
    for forwards in (1, 3, 0, 6):
        stopped_after(forwards, folder)
        places.append(units_done(folder))
    assert places[0] < places[1] <= places[2] < places[3] < 200
    with pytest.raises(ArtifactError, match="go on from it with --resume"):
        fit_affine_map(small(), big(), MANY, checkpoint=folder)
    with pytest.raises(
        ArtifactError, match=r"differs in rows \(boundaries there, last here\), tokenization \("
    ):
        fit_affine_map(small(), big(), MANY, checkpoint=folder, resume=True, rows="last")
    found = fit_affine_map(small(), big(), MANY, checkpoint=folder, resume=True)
    assert_same(found, whole)
    assert units_done(folder) == 200
    assert_same(fit_affine_map(small(), big(), MANY, checkpoint=folder, resume=True), whole)


# --------------------------------------------------------------------------------------------- what is wrong


class Changed:
    """Changes what a layer gives, while it lasts."""

    def __init__(self, model: nn.Module, layer: int, change: Any) -> None:
        self._hook = lambda _module, _inputs, output: change(output)
        self._module = model.model.layers[layer]

    def __enter__(self) -> None:
        self._handle = self._module.register_forward_hook(self._hook)

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


def test_massive_activations_are_left_out() -> None:
    model, read = llama(seed=12), tokenizer()
    given = texts(60, chats=False)
    before = fit_affine_map((model, read), big(), given)

    def massive(states: torch.Tensor) -> torch.Tensor:
        states = states.clone()
        states[:, 2] *= 1000
        return states

    with Changed(model, 2, massive):
        after = fit_affine_map((model, read), big(), given)
    assert after.rows == before.rows - 60
    assert after.maps[0].r2 > after.maps[0].r2_control


def test_states_that_are_no_numbers_or_all_the_same() -> None:
    model, read = llama(seed=13), tokenizer()
    with (
        Changed(model, 1, lambda states: states * math.inf),
        pytest.raises(ModelError, match=r"layer 1 gives states that are not finite in float32"),
    ):
        fit_affine_map((model, read), big(), MANY)
    half = llama(seed=13).half()
    with (
        Changed(half, 2, lambda states: states * 60000.0),
        pytest.raises(
            ModelError,
            match="layer 2 gives states that are not finite in float16, which overflows: right is bfloat16",
        ),
    ):
        fit_affine_map((half, read), big(), MANY[:40])
    with (
        Changed(model, 0, lambda states: torch.ones_like(states)),
        pytest.raises(ModelError, match="states of the source's layer 0 are the same at every row"),
    ):
        fit_affine_map((model, read), big(), MANY, source_layers=[0])


def test_few_rows_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"\d+ rows to fit 64 dimensions .* \(effective rank"):
        fit_affine_map((llama(64), tokenizer()), small(), texts(12, seed=4), rows="last")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"source_layers": [3]},
            ModelError,
            "source model: layer 3 does not exist: the model has layers 0 to 2",
        ),
        ({"target_layers": [0, -1]}, ModelError, "target model: layer -1 does not exist"),
        ({"target_layers": [1, 1]}, ModelError, "name each once"),
        ({"source_layers": []}, ModelError, "at least one"),
        ({"rows": "all"}, PairsError, "rows='all' is unknown: use 'boundaries' or 'last'"),
        ({"batch_size": 0}, PairsError, "batch_size is 0"),
        ({"shard": "3/2"}, PairsError, "right is I/N"),
        ({"shard": "150/200"}, PairsError, "no text is left in shard 150/200"),
        ({"texts": ["ban"] * 30}, PairsError, "no text has a place, after its first token, at which both"),
        ({"texts": ["ban der kis"] * 30}, PairsError, "of 30 texts none is (held out|left to fit)"),
        ({"texts": [" ".join(WORDS * 3)]}, PairsError, "tokens, but the model reads at most 64"),
        ({"texts": []}, PairsError, "no texts"),
    ],
)
def test_what_cannot_be_done_is_said(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"texts": MANY, **options}
    with pytest.raises(error, match=message) as raised:
        fit_affine_map(small(), big(), **given)
    assert "\n" not in str(raised.value)


def test_too_long_texts_can_be_left_out() -> None:
    found = fit_affine_map(small(), big(), [*MANY, " ".join(WORDS * 3)], truncate=True)
    assert found.skipped == 1
    with pytest.raises(PairsError, match="1 of 1 are longer than a model reads"):
        fit_affine_map(small(), big(), [" ".join(WORDS * 3)], truncate=True)


def test_moments_beyond_memory_are_summed_up_in_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fitting, "SAMPLE_ROWS", 300)
    whole = fit_affine_map(small(), big(), MANY)
    assert whole.table is not None
    assert 300 <= (whole.table.rows or 0) < whole.rows
    monkeypatch.setattr(passes, "memory_to_spare", lambda: Sides((0,), 16, (0,), 24).bytes)
    monkeypatch.setattr(saving, "SHARE", float("inf"))
    with pytest.warns(UserWarning, match=r"both models read the texts 2 times; fewer target layers"):
        found = fit_affine_map(small(), big(), MANY)
    assert_same(found, whole)
    folder = tmp_path / "m.partial"
    with pytest.warns(UserWarning, match="2 times"):
        stopped_after(18, folder)
    assert json.loads((folder / "manifest.json").read_bytes())["states"]["map"]["pass"] == 1
    assert_same(fit_affine_map(small(), big(), MANY, checkpoint=folder, resume=True), whole)
    with pytest.warns(UserWarning, match="2 times"):
        exact = fit_affine_map(small(), big(), MANY, source_layers=[1], exact=True)
    assert_same(exact, fit_affine_map(small(), big(), MANY, source_layers=[1]))
    with (
        pytest.raises(ModelError, match="a part keeps its moments"),
        pytest.warns(UserWarning, match="2 times"),
    ):
        fit_affine_map(small(), big(), MANY, shard="1/2")
    with pytest.raises(ModelError, match=r"target layer 0 and 3 source layers need .* name fewer source"):
        fit_affine_map(small(), big(), MANY, exact=True)


def test_vectors_of_another_space_are_refused() -> None:
    found = fit_affine_map(small(), big(), MANY)
    with pytest.raises(PlanError, match=r"shape \[24\] is not in the source's space, \[16\]"):
        found.map_vector(0, torch.ones(24))
    with pytest.raises(PlanError, match="no target layer 7: it has 0, 1"):
        found.share_explained(7, torch.ones(16))


def test_what_is_given_in_the_wrong_place(tmp_path: Path) -> None:
    (model, read), found = small(), fit_affine_map(small(), big(), MANY)
    for given in (model, (read, model), (model, read, MANY)):
        with pytest.raises(ModelError, match=r"no \(model, tokenizer\): give both, in this order"):
            fit_affine_map(given, big(), MANY)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"a ConceptVector is wanted, not .* \(str\)"):
        fit_affine_map(small(), big(), MANY, concept="refusal")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="a ConceptVector is wanted, not an AffineMap"):
        found.transplant(found, 1.0)  # type: ignore[arg-type]
    with pytest.raises(PairsError, match="seed is 1180591620717411303424"):
        fit_affine_map(small(), big(), MANY, seed=2**70)


def test_progress_that_leads_nowhere_is_not_kept(tmp_path: Path) -> None:
    few, partial = ["ban bar bas bat", "kin kir"], tmp_path / "m.partial"
    with pytest.raises(PairsError, match="texts: 1 row to fit and 3 held out are too few for a map"):
        fit_affine_map(small(), big(), few, checkpoint=partial)
    assert not partial.exists()


@pytest.mark.parametrize("change", ["nan", "whole", "narrow"])
def test_kept_states_that_are_damaged(change: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    fit_affine_map(small(), big(), MANY[:40], source_states=tmp_path)
    for file in tmp_path.glob("states-*"):
        with safe_open(str(file), framework="pt") as stored:
            metadata = stored.metadata()
        tensors = load_file(file)
        if change == "narrow":
            tensors["layer.0"] = tensors["layer.0"][:, :3].contiguous()
        else:
            wrong = {"nan": lambda t: t * math.nan, "whole": lambda t: t.long()}[change]
            tensors = {name: wrong(tensor) for name, tensor in tensors.items()}
        save_file(tensors, file, metadata=metadata)
    with pytest.raises(ArtifactError, match=r"states-\d+.safetensors: damaged"):
        fit_affine_map(small(), big(), MANY[:40], source_states=tmp_path)
