"""Objects in a session: one line each, tables in notebooks, arithmetic of plans, a dial, models by name."""

from __future__ import annotations

import doctest
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import families as f
import steersman
from gguf_files import write_gguf
from hub_server import client_at_local_hub
from rankings import ranking
from steersman import ArchitectureMismatch, ModelError, PlanError, Steering, apply_rows
from steersman.evaluation.statistics import clustered_mean
from steersman.evaluation.tuning.candidates import VectorCandidate
from steersman.evaluation.tuning.search import Tried
from steersman.showing import LONGEST, Shown, count_of, cut, ranges
from steersman.texts import load_texts

PAIRS = steersman.load_pairs("lab:refusal/train")[:24]


@functools.cache
def model() -> nn.Module:
    return f.tiny("olmoe")


def experts() -> Steering:
    return Steering.from_experts(model(), {0: [5], 1: [2]}, {2: [1, 3]}, strength=0.5)


def vectors(**options: Any) -> Steering:
    return Steering.from_vectors(model(), {1: torch.ones(32), 2: torch.arange(32.0)}, **options)


# One line ---------------------------------------------------------------------------------------------------


def test_counts_agree_with_their_nouns() -> None:
    assert [count_of(number, "pair") for number in (0, 1, 2)] == ["0 pairs", "1 pair", "2 pairs"]
    assert [count_of(number, "entry", "entries") for number in (1, 2)] == ["1 entry", "2 entries"]


TRIED = Tried(VectorCandidate("", (1,), 0.3, "answer"), clustered_mean([1.0, 2.0]), None, "coarse")


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """One of every kind that the public functions give, made of models by name."""
    contrast = steersman.detect_experts("lab:moe", None, PAIRS)
    concept = steersman.refine_concept("lab:source", None, PAIRS)
    bridge = steersman.fit_affine_map(
        "lab:source", "lab:target", [text.content for text in load_texts("lab:texts")][:80]
    )
    plan = contrast.select(top=4)
    opened = steersman.load_model("lab:moe")
    with plan.apply(opened[0]) as receipt:
        opened[0](**opened[1]("please", return_tensors="pt"))
    return {
        "contrast": contrast,
        "concept": concept,
        "map": bridge,
        "layer map": next(iter(bridge.maps.values())),
        "table of a map": bridge.table,
        "check": steersman.check_transplant(bridge, concept, "lab:target", PAIRS),
        "profile": steersman.describe_experts("lab:moe", None, ["please give me the badge", "no"] * 3),
        "evaluation": steersman.evaluate("lab:moe", None, plan, task="lab:refusal", limit=8, random=0),
        "screen": steersman.screen_experts("lab:moe", None, "lab:refusal/dev", limit=24, at_most=0),
        "anchors": steersman.encode_anchors("lab:source", None, [f"please {n}" for n in range(40)]),
        "tuning": steersman.Tuning({"bounds": [{"cost": "kl", "most": 0.3}]}, (TRIED,), None, (), None, None),
        "experts": plan,
        "vectors": concept.steering("dose:0.5"),
        "edit": plan.edits[0],
        "edit of states": concept.steering(1.0).edits[0],
        "architecture": plan.architecture,
        "router": plan.architecture.routers[0],
        "receipt": receipt,
        "pairs": PAIRS,
        "pair": PAIRS[0],
        "task": steersman.load_task("lab:refusal"),
        "rows": receipt_of_rows(opened, plan),
    }


def receipt_of_rows(opened: Any, plan: Steering) -> Any:
    with apply_rows(opened[0], [plan, None]) as receipt:
        opened[0](**opened[1](["please", "please"], return_tensors="pt"))
    return receipt


def test_every_object_is_one_line(objects: dict[str, Any]) -> None:
    for name, thing in objects.items():
        line = repr(thing)
        assert "\n" not in line, name
        assert len(line) <= LONGEST + 40, (name, line)
        assert str(thing) == line
    classes = {type(thing) for thing in objects.values()}
    public = {thing for name in steersman.__all__ if isinstance(thing := getattr(steersman, name), type)} - {
        thing for thing in vars(steersman.errors).values() if isinstance(thing, type)
    }
    assert public - classes == {steersman.Separation, steersman.LayerCheck}
    assert "\n" not in repr(objects["check"].best)


def test_notebooks_show_the_table(objects: dict[str, Any]) -> None:
    for name, thing in objects.items():
        if not isinstance(thing, Shown):
            continue
        page = thing._repr_html_()
        assert len(page) < 40_000, name
        for header, rows in thing.as_tables():
            assert rows, name
            assert page.count("<tr>") >= 1 + len(rows)
            assert all(len(row) == len(header) for row in rows)
    with_tables = (
        "contrast",
        "concept",
        "map",
        "check",
        "profile",
        "evaluation",
        "screen",
        "experts",
        "vectors",
    )
    assert all("<table>" in objects[name]._repr_html_() for name in with_tables)


def test_what_a_name_holds_is_no_markup() -> None:
    class Named(Shown):
        def in_words(self) -> str:
            return "<script>alert(1)</script> & more\nlines"

        def as_tables(self) -> list[Any]:
            return [(("a<b",), [("<img src=x>",)])]

    page = Named()._repr_html_()
    assert "<script" not in page
    assert "<img" not in page
    assert repr(Named()) == "<Named: <script>alert(1)</script> & more lines>"


def test_a_plan_for_many_layers_stays_short() -> None:
    architecture = steersman.Architecture("made_up", 4096, (None,) * 40)
    edit = steersman.ResidualEdit({layer: torch.ones(4096) for layer in range(40)})
    plan = Steering((edit,), architecture, "w" * 64, model="an/organisation-with-a-name-" + "x" * 300)
    assert "layers 0–39" in repr(plan)
    for thing in (plan, edit, edit.vectors, [plan]):
        assert len(repr(thing)) <= LONGEST + 40
    assert ranges((0, 1, 2, 5, 7, 8)) == "0–2, 5, 7–8"
    assert cut("a\n b", 3) == "a b"
    assert cut("abcd", 3) == "ab…"


# Arithmetic -------------------------------------------------------------------------------------------------


def test_plans_are_negated_divided_subtracted_summed() -> None:
    one, two = experts(), vectors()
    assert -two == two.reversed() == two * -1
    assert one / 2 == one * 0.5 == 0.5 * one
    assert two - 2 * one == two + (-2 * one)
    assert sum([one, two]) == one + two
    assert sum([one]) == one
    assert np.float32(0.5) * two == two * np.float64(0.5) == two / np.int64(2)
    assert torch.tensor(0.5) * two == two * torch.tensor(0.5) == two / np.array(2) == np.array(0.5) * two
    total = one
    total += two
    total /= 2
    assert total == (one + two) / 2


def test_a_plan_says_how_strongly_it_steers() -> None:
    plan = vectors()
    for plan_, said in (
        (plan, "vectors (add) at layer"),
        (-0.5 * plan, "vectors (add × -0.5) at layer"),
        (2 * plan - plan, "vectors (add × -1 to 2) at layer"),
        (0.5 * Steering.from_experts(model(), {1: [2, 3]}), "2 experts activated × 0.5; "),
    ):
        assert said in repr(plan_)


def test_plans_are_compared_by_what_they_do() -> None:
    one = experts()
    assert one == experts()
    assert hash(one) == hash(experts())
    assert one == 1 * one, "where it comes from does not count"
    assert one != one / 2
    assert one != one.with_scope("answer")
    assert one != "a plan"
    assert len({one, experts(), vectors(), vectors(), vectors(strength=2.0)}) == 3
    other = Steering.from_experts(f.tiny("olmoe", seed=1), {0: [5], 1: [2]}, {2: [1, 3]}, strength=0.5)
    assert one != other, "for other weights"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda plan: plan / 0,
        lambda plan: plan * float("nan"),
        lambda plan: -vectors(operation="project"),
        lambda plan: plan - plan,
        lambda plan: plan * 3,
        lambda plan: plan + 1,
        lambda plan: 1 + plan,
        lambda plan: plan - 1,
        lambda plan: "x" * plan,
        lambda plan: plan * True,
        lambda plan: plan * torch.tensor(True),
        lambda plan: plan * torch.ones(2),
        lambda plan: plan / "2",
        lambda plan: plan * plan,
        lambda plan: steersman.compose([plan, plan]),
        lambda plan: apply_rows(model(), plan),
        lambda plan: apply_rows(model(), ["plan"]),
        lambda plan: plan.apply(model(), prompt_lengths=5),
        lambda plan: plan.apply(model(), prompt_lengths=[None]),
    ],
)
def test_what_cannot_be_had_is_refused_with_a_reason(wrong: Callable[[Steering], Any]) -> None:
    with pytest.raises(PlanError) as caught:
        wrong(experts())
    assert "\n" not in str(caught.value)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(PlanError, match=r"factor is a number, not True \(bool\)"):
        experts() * True
    with pytest.raises(PlanError, match=r"strength -1: .* no opposite: reverse a plan that adds the vector"):
        -vectors(operation="project")
    with pytest.raises(PlanError, match=r"one of all rows, or a list.* is a number, not '0.5' \(str\)"):
        experts().apply(model(), strength="0.5")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        2 / experts()  # type: ignore[operator]


def test_architectures_that_do_not_fit_are_both_named() -> None:
    dense = Steering.from_vectors(f.dense(), {1: torch.ones(32)})
    for mistake in (lambda: vectors() + dense, lambda: sum([vectors(), dense]), lambda: vectors() - dense):
        with pytest.raises(PlanError, match=r"olmoe \(width 32.*and llama \(width 32, 3 layers, 0 routers"):
            mistake()
    with pytest.raises(ArchitectureMismatch, match=r"olmoe \(width.*llama \(width"):
        vectors().apply(f.dense()).__enter__()


# A dial -----------------------------------------------------------------------------------------------------


def logits(rows: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return model()(f.token_ids(rows, 6)).logits


@pytest.mark.parametrize("plan", [experts(), vectors(), experts() + vectors()], ids=["in", "vectors", "both"])
def test_a_block_is_dialled(plan: Steering) -> None:
    with (0.5 * plan).apply(model()) as expected:
        wanted = logits()
    with plan.apply(model(), strength=0.5) as receipt:
        assert torch.equal(logits(), wanted)
    assert receipt.fingerprint == expected.fingerprint == (plan / 2).fingerprint
    assert receipt.tokens == expected.tokens
    before = logits()
    with plan.apply(model(), strength=0):
        assert torch.equal(logits(), before)


def test_rows_are_dialled_together_or_one_by_one() -> None:
    plan = vectors()
    for strength, parts in (
        (0.5, (0.5, 0.5)),
        ([1, 0.25], (1, 0.25)),
        ((2.0, -1), (2, -1)),
        (torch.tensor([2.0, -1]), (2, -1)),
    ):
        with apply_rows(model(), [part * plan for part in parts]) as expected:
            wanted = logits()
        with apply_rows(model(), [plan, plan], strength=strength) as receipt:
            assert torch.equal(logits(), wanted)
        assert receipt.fingerprint == expected.fingerprint
    for wrong in ([1.0], "x", [1.0, None], True, torch.ones(1, 2), {0: 1.0}):
        with pytest.raises(PlanError, match="strength"):
            apply_rows(model(), [plan, None], strength=wrong)
    with pytest.raises(PlanError, match="project"):
        vectors(operation="project").apply(model(), strength=2)


# Names ------------------------------------------------------------------------------------------------------


def test_functions_take_names_where_load_model_does(tmp_path: Path) -> None:
    """Those that run a model stand in `objects`; these read its structure alone."""
    opened = steersman.load_model("lab:moe")[0]
    for by_name, by_model in (
        (Steering.from_experts("lab:moe", {1: [2]}), Steering.from_experts(opened, {1: [2]})),
        (Steering.from_vectors("lab:moe", {1: [1.0] * 96}), Steering.from_vectors(opened, {1: [1.0] * 96})),
    ):
        assert by_name == by_model
        assert by_name.model == "lab:moe"
    plan = Steering.from_vectors("lab:moe", {1: [1.0] * 96, 2: [2.0] * 96}, scope="all")
    steersman.export_gguf(plan, tmp_path / "plan.gguf")
    assert steersman.import_gguf(tmp_path / "plan.gguf", "lab:moe") == plan
    steersman.export_lm_eval(plan, tmp_path / "plan.pt", "lab:moe")


def test_identity_is_read_by_name(tmp_path: Path) -> None:
    """Of a checkpoint folder, a GGUF file, a folder with nothing but a configuration."""
    model().save_pretrained(tmp_path / "moe")
    for name in (tmp_path / "moe", str(tmp_path / "moe")):
        assert steersman.read_architecture(name) == steersman.read_architecture(model())
        assert steersman.weights_id(name) == steersman.weights_id(model())
    (tmp_path / "moe/model.safetensors").unlink()
    assert steersman.read_architecture(tmp_path / "moe") == steersman.read_architecture(model())
    with pytest.raises(ModelError, match="cannot be opened"):
        steersman.weights_id(tmp_path / "moe")
    gguf = str(write_gguf(tmp_path / "moe.gguf"))
    opened = steersman.load_model(Path(gguf))[0]
    assert steersman.read_architecture(gguf) == steersman.read_architecture(opened)
    assert steersman.weights_id(gguf) == steersman.weights_id(opened)


def test_a_tokenizer_of_ones_own_beside_a_name() -> None:
    tokenizer = steersman.load_model("lab:moe")[1]
    by_name = steersman.detect_experts("lab:moe", tokenizer, PAIRS)
    assert (by_name.activations == steersman.detect_experts("lab:moe", None, PAIRS).activations).all()


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (lambda opened: steersman.detect_experts("lab:nothing", None, PAIRS), "no model 'nothing'"),
        (lambda opened: steersman.detect_experts(opened[0], None, PAIRS), "a name, and None"),
        (lambda opened: steersman.refine_concept(opened, None, PAIRS), "a name, and None"),
        (lambda opened: Steering.from_experts("no/such/folder", {1: [2]}), "no such folder"),
        (lambda opened: steersman.read_architecture("no/such/folder"), "no such folder"),
        (lambda opened: steersman.weights_id(opened), r"not 'tuple'.*load_model"),
        (lambda opened: experts().apply("lab:moe"), r"not 'lab:moe'.*load it first.*load_model"),
        (lambda opened: apply_rows("lab:moe", [None]), r"not 'lab:moe'.*load it first.*load_model"),
        (lambda opened: experts().apply(opened), r"not 'tuple'.*load_model"),
        (lambda opened: Steering.from_experts(opened, {1: [2]}), r"not 'tuple'.*load_model"),
    ],
)
def test_what_is_no_model_is_named(mistake: Callable[[Any], Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        mistake(steersman.load_model("lab:moe"))


NAMED: dict[str, Callable[[Any], Any]] = {
    "load_model": steersman.load_model,
    "load_pairs": steersman.load_pairs,
    "load_task": steersman.load_task,
    "load_judge": steersman.load_judge,
    "load_texts": load_texts,
    "read_architecture": steersman.read_architecture,
    "weights_id": steersman.weights_id,
    "from_experts": lambda name: Steering.from_experts(name, {1: [2]}),
    "import_gguf": lambda name: steersman.import_gguf(name, model()),
    "import_repeng": lambda name: steersman.import_repeng(name, model()),
    "import_easysteer": lambda name: steersman.import_easysteer(name, model()),
    "import_steermoe": lambda name: steersman.import_steermoe(name, model()),
    "import_steering_vectors": lambda name: steersman.import_steering_vectors(name, model()),
    "export_gguf": lambda name: steersman.export_gguf(vectors(scope="all"), name),
    "export_lm_eval": lambda name: steersman.export_lm_eval(vectors(scope="all"), name, model()),
    "export_easysteer": lambda name: steersman.export_easysteer(experts() / 0.5, name),
    "save": experts().save_pretrained,
    "push": lambda name: experts().push_to_hub(name, license="mit"),
    "template": lambda name: steersman.set_chat_format(
        steersman.load_model("lab:moe")[1], template=name or ""
    ),
    "describe": lambda name: steersman.describe_experts("lab:moe", None, name),
    "evaluate": lambda name: steersman.evaluate("lab:moe", None, experts(), task=name),
    "items": lambda name: steersman.screen_experts("lab:moe", None, name),
    "checkpoint": lambda name: steersman.detect_experts("lab:moe", None, PAIRS, checkpoint=name or ""),
    **{
        kind.__name__: kind.from_pretrained
        for kind in (
            Steering,
            steersman.ConceptVector,
            steersman.RoutingContrast,
            steersman.AffineMap,
            steersman.CausalScreen,
            steersman.ExpertProfile,
        )
    },
}


@pytest.mark.parametrize("what", NAMED)
@pytest.mark.parametrize("name", ["", "a\0b", "a\ud800b", 5, None, True, b"x"], ids=repr)
def test_what_is_no_name_is_refused_by_one_line(
    what: str, name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(steersman.SteersmanError) as caught:
        NAMED[what](name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [5, None, "words", [1], [None, None]], ids=repr)
@pytest.mark.parametrize(
    "function",
    [
        steersman.merge_contrasts,
        steersman.merge_affine_maps,
        steersman.compose,
        lambda given: steersman.anchor_map(given, given),
        lambda given: steersman.check_transplant(given, given),
        lambda given: steersman.transplant(given, given, 1.0),
        lambda given: steersman.persona_pairs(given, "kind", "cruel"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_one_line(function: Callable[[Any], Any], given: Any) -> None:
    with pytest.raises(steersman.SteersmanError) as caught:
        function(given)
    assert "\n" not in str(caught.value)


SETTINGS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "select": (
        lambda **k: detected().select(**{"top": 2} | k),
        dict.fromkeys(("top", "activate", "scope"), "x"),
    ),
    "steering": (lambda **k: concept().steering(1.0, **k), {"layers": 1.5, "scope": [1], "operation": 5}),
    "from_experts": (
        lambda **k: Steering.from_experts(model(), **k),
        {"activate": [5], "deactivate": 5, "scope": ["all"]},
    ),
    "detect": (
        lambda **k: steersman.detect_experts("lab:moe", None, PAIRS, **k),
        {"generate": "4", "bootstrap": 1.5, "shard": 2, "batch_size": None, "adjust": 5},
    ),
    "refine": (
        lambda **k: steersman.refine_concept("lab:source", None, PAIRS, **k),
        {"layers": "1", "batch_size": 1.5},
    ),
    "fit": (
        lambda **k: steersman.fit_affine_map("lab:source", "lab:target", "lab:texts", **k),
        {"source_layers": "1", "batch_size": "1", "seed": 1.5, "shard": [1]},
    ),
    "anchors": (
        lambda **k: steersman.encode_anchors("lab:source", None, "lab:texts", **k),
        {"layers": 1.5, "batch_size": "1"},
    ),
    "describe": (
        lambda **k: steersman.describe_experts("lab:moe", None, "lab:texts", **k),
        {"batch_size": "1"},
    ),
    "personas": (
        lambda **k: steersman.persona_pairs("a {persona}", **{"positive": "kind", "negative": "cruel"} | k),
        {"positive": None, "negative": 5, "suffixes": [5]},
    ),
    "load_model": (
        lambda **k: steersman.load_model("lab:moe", **k),
        {"dtype": 5, "chat_template_arguments": "x=1"},
    ),
    "evaluate": (
        lambda **k: steersman.evaluate(
            "lab:moe", None, Steering.from_experts("lab:moe", {1: [4]}), task="lab:refusal", limit=2, **k
        ),
        {"strengths": 0.5, "attacks": ["x"], "judge": "refusal", "contrast": "folder", "batch_size": "1"},
    ),
    "screen": (
        lambda **k: steersman.screen_experts("lab:moe", None, "lab:refusal/dev", limit=24, at_most=0, **k),
        {"keep": 5, "harm": "lab:nothing", "contrast": "folder"},
    ),
}


@functools.cache
def detected() -> steersman.RoutingContrast:
    return steersman.detect_experts("lab:moe", None, PAIRS)


@functools.cache
def concept() -> steersman.ConceptVector:
    return steersman.refine_concept("lab:source", None, PAIRS)


@pytest.mark.parametrize(
    ("what", "setting"), [(what, name) for what, (_, all) in SETTINGS.items() for name in all]
)
def test_a_setting_of_another_kind_is_refused_by_one_line(what: str, setting: str) -> None:
    function, wrong = SETTINGS[what]
    with pytest.raises(steersman.SteersmanError) as caught:
        function(**{setting: wrong[setting]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "layers", [1, np.int64(1), [np.int64(1)], np.array([1]), torch.tensor(1), torch.tensor([1])]
)
def test_layers_may_be_numbers_of_any_kind_and_one_may_stand_alone(layers: Any) -> None:
    concept = steersman.refine_concept("lab:source", None, PAIRS, layers=layers)
    assert concept.layers == (1,)
    assert concept.steering(torch.tensor(0.5), layers=layers) == concept.steering(0.5)
    for wrong in (True, np.True_, [1.0], "1"):
        with pytest.raises(PlanError, match="layer"):
            concept.steering(0.5, layers=wrong)


def test_numbers_of_numpy_are_kept_as_plain_ones(tmp_path: Path) -> None:
    contrast = steersman.detect_experts(
        "lab:moe", None, PAIRS, bootstrap=np.int64(3), checkpoint=tmp_path / "c"
    )
    plan = contrast.select(top=np.int64(2), reverse=np.bool_(True), strength=np.float32(0.5))
    assert plan == contrast.select(top=2, reverse=True, strength=0.5)
    plan.save_pretrained(tmp_path / "plan")
    assert Steering.from_pretrained(tmp_path / "plan").provenance == plan.provenance
    assert len(steersman.load_task("lab:refusal/dev", limit=np.int64(3))) == 3


def test_plans_of_rows_may_come_from_anywhere() -> None:
    plan = vectors()
    with apply_rows(model(), [plan, None]):
        wanted = logits()
    for rows in ((each for each in (plan, None)), np.array([plan, None], object)):
        with apply_rows(model(), rows):
            assert torch.equal(logits(), wanted)
    for lengths in (torch.tensor(6), [True, True], "12"):
        with pytest.raises(PlanError, match="prompt"):
            plan.apply(model(), prompt_lengths=lengths)


def test_a_table_is_refused_for_its_rows() -> None:
    pandas = pytest.importorskip("pandas")
    rows = [{"positive": "a b", "negative": "c d"}]
    table = pandas.DataFrame(rows)
    assert len(steersman.load_pairs(table.to_dict("records"))) == 1
    for function in (steersman.load_pairs, load_texts):
        with pytest.raises(steersman.PairsError, match=r"not its rows; .* table.to_dict\('records'\)"):
            function(table)
        with pytest.raises(steersman.PairsError, match="an object with positive, negative"):
            function(rows[0])
    arrow = pytest.importorskip("pyarrow").Table.from_pandas(table)
    with pytest.raises(steersman.PairsError, match=r"table.to_pylist\(\)"):
        load_texts(arrow)


# The face ---------------------------------------------------------------------------------------------------


def test_dir_shows_the_public_names_only() -> None:
    assert dir(steersman) == sorted(steersman.__all__)


METHODS = {"apply", "select", "steering", "transplant", "from_experts", "from_vectors", "from_pretrained"}
METHODS |= {"push_to_hub"}
CALLABLE = {
    name: thing for name in steersman.__all__ if inspect.isfunction(thing := getattr(steersman, name))
} | {
    f"{kind.__name__}.{name}": getattr(kind, name)
    for kind in (getattr(steersman, name) for name in steersman.__all__)
    if isinstance(kind, type)
    for name in METHODS & {*vars(kind)}
}
MADE_BY_HAND = {
    kind.__name__: kind
    for kind in (
        steersman.ContrastPair,
        steersman.ContrastPairs,
        steersman.ExpertEdit,
        steersman.ResidualEdit,
    )
}
STORED = ("AffineMap", "CausalScreen", "ConceptVector", "ExpertProfile", "RoutingContrast")
WITHOUT_EXAMPLE = {
    **{f"{kind}.from_pretrained": "as Steering.from_pretrained" for kind in STORED},
    **{f"{kind}.push_to_hub": "as Steering.push_to_hub" for kind in STORED},
    "AffineMap.transplant": "as transplant",
    "CausalScreen.select": "as RoutingContrast.select; what finds an expert to select runs for long",
}
"""Why these have none."""
EXAMPLES = {name: thing for name, thing in (CALLABLE | MADE_BY_HAND).items() if name not in WITHOUT_EXAMPLE}


def test_exceptions_are_needed() -> None:
    assert set(WITHOUT_EXAMPLE) <= set(CALLABLE)
    assert not [name for name in WITHOUT_EXAMPLE if ">>>" in (CALLABLE[name].__doc__ or "")]


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_everything_public_has_an_example_that_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ranking(4, 32, 4).to_pickle("activations.pkl")
    text = inspect.getdoc(EXAMPLES[name]) or ""
    assert "\nExample:\n" in text
    test = doctest.DocTestParser().get_doctest(text, {"steersman": steersman}, name, None, None)
    said: list[str] = []
    with client_at_local_hub(monkeypatch, tmp_path / "cache"):
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert result.attempted
    assert not result.failed, "".join(said)
