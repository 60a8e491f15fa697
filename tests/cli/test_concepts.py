"""refine, steer and transplant, end to end: with and without --json, and each wrong thing in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cli.command_line import run
from concepts import twins
from experts.test_counting import WORDS, tokenizer
from steersman import (
    AffineMap,
    ConceptVector,
    ContrastPairs,
    Steering,
    load_model,
    load_pairs,
    refine_concept,
)
from steersman.artifacts import read_manifest
from steersman.concepts import refinement
from steersman.concepts.fitting import fit_affine_map


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both twins as checkpoints, pairs as files, concepts refined by the command line, a map between them."""
    folder = tmp_path_factory.mktemp("twins")
    twins.save(twins.source(), folder / "source")
    twins.save(twins.target(), folder / "target")
    for name, pairs in (("words", twins.concept_pairs()), ("noise", twins.noise_pairs())):
        write(folder / f"{name}.jsonl", pairs)
        done = run("refine", folder / "source", folder / f"{name}.jsonl", "-o", folder / name)
        assert done.status == 0, done.stderr
    from steersman import load_model

    names = folder / "source", folder / "target"
    fitted = fit_affine_map(*(load_model(str(name), device="cpu") for name in names), twins.texts())
    fitted.save_pretrained(folder / "bridge")
    return folder


def write(path: Path, pairs: ContrastPairs) -> Path:
    rows = [
        {"positive": pair.positive, "negative": pair.negative, "group": pair.group, "id": pair.id}
        for pair in pairs
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


# refine -----------------------------------------------------------------------------------------------------


def test_refine_says_how_well_each_layer_separates(place: Path, tmp_path: Path) -> None:
    done = run("refine", place / "source", place / "words.jsonl", "-o", tmp_path / "c", "--json")
    result = done.json
    concept = ConceptVector.from_pretrained(tmp_path / "c")
    assert result["output"] == str(tmp_path / "c")
    assert (result["pairs"], result["clusters"], result["skipped"]) == (60, 30, 0)
    assert [entry["layer"] for entry in result["layers"]] == [0, 1, 2]
    for entry in result["layers"]:
        found = concept.separation[entry["layer"]]
        assert found is not None
        assert (entry["auroc"], entry["low"], entry["high"]) == (found.auroc, found.low, found.high)
        assert entry["norm"] == pytest.approx(float(concept.vectors[entry["layer"]].norm()))
    assert result["best"] == concept.best_layer


def test_refine_goes_on_after_a_stop(place: Path, tmp_path: Path) -> None:
    output, given = tmp_path / "c", (place / "source", place / "words.jsonl")
    opened = load_model(str(given[0]), device="cpu")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(refinement, "_refine_layer", _stop)
        with pytest.raises(KeyboardInterrupt):
            refine_concept(*opened, str(given[1]), checkpoint=tmp_path / "c.partial")
    assert "go on from it with --resume" in run("refine", *given, "-o", output).error
    assert "differs in position (last there, target_mean here)" in (
        run("refine", *given, "-o", output, "--resume", "--position", "target_mean").error
    )
    found = run("refine", *given, "-o", output, "--resume", "--json")
    assert "starting at" not in found.stderr
    assert found.json["best"] == ConceptVector.from_pretrained(place / "words").best_layer
    assert not (tmp_path / "c.partial").exists()
    again = run("refine", *given, "-o", tmp_path / "d", "--resume")
    assert "starting at the first pair" in again.stderr


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_refine_says_where_one_would_steer_and_how_that_is_found(tmp_path: Path) -> None:
    some = ContrastPairs(list(load_pairs("lab:refusal/train"))[:60], name="some")
    told = (
        "refine",
        "lab:target",
        write(tmp_path / "some.jsonl", some),
        "--force",
        "-o",
        tmp_path / "c",
    )
    words = run(*told).words
    assert "It does not tell where to steer: without --layers, steer takes layer 2" in words
    assert (
        f"steersman tune lab:target {tmp_path / 'c'} --task TASK --keep TASK --cost 'kl <= 0.3' -o" in words
    )
    assert "steer takes layer 1" in run(*told, "--layers", 1).words


def test_refine_in_words_and_in_a_picture(place: Path, tmp_path: Path) -> None:
    options = ("--layers", "0,2", "--position", "target_mean", "--method", "pca")
    words = run(
        "refine", place / "source", place / "words.jsonl", "-o", tmp_path / "c", *options,
        "--plot", tmp_path / "layers.svg",
    ).words  # fmt: skip
    assert words.startswith(f"{tmp_path / 'c'}: a concept vector\n60 pairs in 30 clusters, read as the mean")
    assert "top direction of the differences" in words
    assert [line.split()[0] for line in words.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"])] == [
        "0", "2",
    ]  # fmt: skip
    assert f"\nwritten: {tmp_path / 'layers.svg'}\n\nNext, " in words
    assert (tmp_path / "layers.svg").read_text().startswith("<?xml")
    concept = ConceptVector.from_pretrained(tmp_path / "c")
    assert (concept.layers, concept.position, concept.method) == ((0, 2), "target_mean", "pca")
    assert run("show", tmp_path / "c").words.splitlines()[-3:] == words.splitlines()[-10:-7]
    assert run("show", tmp_path / "c", "--json").json["layers"][0]["layer"] == 0


def test_refine_of_one_group_says_that_nothing_is_held_out(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    rows = [{"positive": f"w1 w{n}", "negative": f"w2 w{n}", "group": "g"} for n in range(10, 14)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = run("refine", place / "source", file, "-o", tmp_path / "c").words
    assert "no AUROC: its pairs are of one group, so none could be held out" in words
    assert run("show", tmp_path / "c", "--json").json["best"] is None
    steered = run("steer", tmp_path / "c", "-o", tmp_path / "s").words
    assert "by default, as nobody named it: layer, dose" in steered


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layers", "0,9"), "layer 9 does not exist: the model has layers 0 to 2"),
        (("--layers", "2-0"), "'2-0' names no layers; right is 3, 0,2-4 or all"),
        (("--layers", "best"), "'best' names no layers"),
        (("--plot", "a.pdf"), "a.pdf: a plot is written as .png or .svg"),
        (("--plot", "nowhere/a.png"), "there is no folder nowhere"),
    ],
)
def test_refine_refuses(place: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    done = run("refine", place / "source", place / "words.jsonl", "-o", tmp_path / "c", *options)
    assert said in done.error
    assert not list(tmp_path.iterdir())


def test_refine_takes_a_folder_for_no_pairs(place: Path, tmp_path: Path) -> None:
    said = run("refine", place / "words.jsonl", place / "source", "-o", tmp_path / "c").error
    assert said.endswith("is a folder; PAIRS is a file or lab:NAME, and the order is MODEL PAIRS")


# steer ------------------------------------------------------------------------------------------------------


def test_steer_writes_a_plan_for_the_concepts_own_model(place: Path, tmp_path: Path) -> None:
    done = run("steer", place / "words", "-o", tmp_path / "s", "--strength", "dose:0.7")
    assert (done.status, done.stderr) == (0, "")
    assert "by default, as nobody named it: layer\n" in done.stdout
    words = done.stdout
    concept = ConceptVector.from_pretrained(place / "words")
    steering = Steering.from_pretrained(tmp_path / "s")
    assert steering.fingerprint == concept.steering("dose:0.7").fingerprint
    assert "layer 1: add × " in words
    assert "dose 0.70, scope answer" in words
    result = run(
        "steer", place / "words", "-o", tmp_path / "p", "--strength", 0.5, "--operation", "project",
        "--layers", "all", "--scope", "all", "--json",
    ).json  # fmt: skip
    assert [entry["layer"] for entry in result["vectors"]] == [0, 1, 2]
    assert {(e["operation"], e["scope"], e["strength"], e["dose"]) for e in result["vectors"]} == {
        ("project", "all", 0.5, None)
    }
    generated = run(
        "generate", place / "source", "--steering", tmp_path / "s", "--prompt", "w3 w4",
        "--max-new-tokens", 2, "--json",
    )  # fmt: skip
    assert generated.status == 0, generated.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--strength", "much"), "strength 'much' is not a finite number; right is a number such as 1.5"),
        (("--strength", "nan"), "strength 'nan' is not a finite number"),
        (("--strength", "1", "--layers", "7"), "the concept has no layer 7; it has 0, 1, 2"),
        (
            ("--strength", "2", "--operation", "project", "--layers", "1"),
            "project has strength 2: it must lie between 0 and 1",
        ),
    ],
)
def test_steer_refuses(place: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    assert said in run("steer", place / "words", "-o", tmp_path / "s", *options).error
    assert not list(tmp_path.iterdir())


def test_steer_takes_concepts_alone(place: Path, tmp_path: Path) -> None:
    said = run("steer", place / "bridge", "-o", tmp_path / "s", "--strength", 1).error
    assert said.endswith("this is an affine map, a concept vector is needed")


# transplant -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "said"), [("0", "adds nothing"), ("dose:0", "adds nothing"), ("dose:1e30", "beyond 1e+06")]
)
def test_transplant_refuses_strengths(place: Path, tmp_path: Path, strength: str, said: str) -> None:
    concept = ("transplant", place / "words", place / "bridge", "-o", tmp_path / "s")
    assert said in run(*concept, "--strength", strength).error
    assert not list(tmp_path.iterdir())


def test_transplant_takes_a_concept_through_its_gate(place: Path, tmp_path: Path) -> None:
    result = run(
        "transplant", place / "words", place / "bridge", "-o", tmp_path / "s", "--strength", "dose:0.5",
        "--json",
    ).json  # fmt: skip
    steering = Steering.from_pretrained(tmp_path / "s")
    assert result["fingerprint"] == steering.fingerprint
    assert (result["gate"]["passed"], result["gate"]["forced"]) == (True, False)
    assert result["vectors"][0]["dose"] == pytest.approx(0.5)
    assert steering.model == str(place / "target")
    concept, bridge = (
        ConceptVector.from_pretrained(place / "words"),
        AffineMap.from_pretrained(place / "bridge"),
    )
    (layer,) = steering.edits[0].layers
    expected = bridge.map_vector(layer, concept.vectors[bridge.maps[layer].source_layer])
    assert (steering.edits[0].vectors[layer] == expected).all()
    words = run(
        "transplant", place / "words", place / "bridge", "-o", tmp_path / "t", "--strength", 1,
        "--layers", "all",
    ).words  # fmt: skip
    assert words.count("gate at layer") == 3
    assert "\npassed\n\nNext, " in words


def test_transplant_refuses_noise_unless_it_is_forced(place: Path, tmp_path: Path) -> None:
    command = ("transplant", place / "noise", place / "bridge", "-o", tmp_path / "s", "--strength", 1)
    said = run(*command).error
    assert said.startswith("not transplanted: at layer ")
    assert said.endswith("the map may carry everything but the concept; force it to try")
    assert not list(tmp_path.iterdir())
    assert "forced: the gate refuses it" in run(*command, "--force").words
    assert read_manifest(tmp_path / "s")["made_from"]["gate"]["forced"] is True
    unseen = run(*command, "--force", "--layers", 1).words
    assert "\nforced: nobody has looked whether the concept arrives\n" in unseen


def test_check_ranks_concepts_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    result = run("transplant", "--check", place / "noise", place / "words", place / "bridge", "--json").json
    assert [entry["concept"] for entry in result["concepts"]] == [str(place / "words"), str(place / "noise")]
    assert [entry["passed"] for entry in result["concepts"]] == [True, False]
    words = run("transplant", "--check", place / "noise", place / "words", place / "bridge").words
    assert f"{place / 'words'}: shown: carries over, best at layer" in words
    assert f"{place / 'noise'}: cannot tell: pairs with other labels bring as much" in words
    assert words.index("carries over, best") < words.index("cannot tell")
    assert [line.split()[:2] for line in words.splitlines()[3:5]] == [
        ["1", str(place / "words")], ["2", str(place / "noise")],
    ]  # fmt: skip


def test_the_probe_is_told_where_pairs_go_on_from_one_prompt(place: Path, tmp_path: Path) -> None:
    one, other = WORDS[:2]
    lines = [
        {
            "positive": f"{prompt} {one}", "positive_target": one,
            "negative": f"{prompt} {other}", "negative_target": other,
        }
        for prompt in WORDS[2:26]
    ]  # fmt: skip
    (tmp_path / "forks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = (place / "words", place / "bridge", "--pairs", tmp_path / "forks.jsonl", "--layers", 1)
    (entry,) = run("transplant", "--check", *options, "--json").json["concepts"][0]["layers"]
    assert set(entry["probe"]) == {"change", "low", "high", "p"}
    words = run("transplant", "--check", *options).words
    assert f"{entry['probe']['change']:+.2f}, p = {entry['probe']['p']:.3f}" in words
    made = run("transplant", *options, "-o", tmp_path / "s", "--strength", "dose:0.3", "--force").words
    assert f"its own side by {entry['probe']['change']:+.2f} nats [" in made
    unasked = run("transplant", place / "words", place / "bridge", "-o", tmp_path / "t", "--layers", 1).words
    assert "; not probed: its pairs' sides do not go on from one prompt" in unasked


def test_check_with_other_pairs_and_a_target_by_name(place: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", twins.concept_pairs(number=40, seed=8))
    command = ("transplant", "--check", place / "words", place / "bridge", "--target", place / "target")
    result = run(*command, "--pairs", other, "--json").json
    (entry,) = result["concepts"]
    assert (entry["passed"], entry["held_out"], entry["pairs"]["name"]) == (True, 40, str(other))
    said = run(*command, "--pairs", tmp_path / "none.jsonl").error
    assert said.endswith("none.jsonl: no such file")
    assert "of another architecture" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("{words}", "{bridge}"), "give -o FOLDER, or --check"),
        (("--check", "{words}", "{bridge}", "--strength", "1"), "--check writes nothing"),
        (("{words}", "{noise}", "{bridge}", "-o", "{out}", "--strength", "1"), "one CONCEPT at a time"),
        (
            ("--check", "{words}", "{bridge}", "--pairs", "a", "--pairs", "b"),
            "--pairs is given 2 times for 1",
        ),
        (("{bridge}", "{words}", "-o", "{out}", "--strength", "1"), "an affine map is needed"),
        (("{words}", "{bridge}", "-o", "{out}", "--strength", "dose"), "'dose' is not a finite number"),
        (("{words}", "{bridge}", "-o", "{out}", "--strength", "1", "--layers", "8"), "no target layer 8"),
        (
            ("{words}", "{bridge}", "-o", "{out}", "--strength", "1", "--target", "{source}"),
            "which has other weights",
        ),
    ],
)
def test_transplant_refuses(place: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    names = {name: place / name for name in ("words", "noise", "bridge", "source")}
    arguments = [option.format(**names, out=tmp_path / "s") for option in options]
    assert said in run("transplant", *arguments).error
    assert not list(tmp_path.iterdir())


def test_pairs_that_have_changed_are_not_looked_with(place: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", twins.concept_pairs())
    assert run("refine", place / "source", file, "-o", tmp_path / "c").status == 0
    write(file, twins.concept_pairs(number=40, seed=2))
    command = ("transplant", tmp_path / "c", place / "bridge", "-o", tmp_path / "s", "--strength", 1)
    assert run(*command).error == (
        f"{file}: not the pairs any more that the concept was refined from: give pairs (--pairs FILE), or "
        "force it (--force)"
    )
    file.unlink()
    assert "the concept's pairs cannot be read again" in run(*command).error
    assert run(*command, "--pairs", place / "words.jsonl").status == 0


def test_parts_of_maps_and_targets_without_a_name(place: Path, tmp_path: Path) -> None:
    bridge = AffineMap.from_pretrained(place / "bridge")
    nameless = replace(bridge, target=replace(bridge.target, model=""))
    nameless.save_pretrained(tmp_path / "nameless")
    found = run("transplant", "--check", place / "words", tmp_path / "nameless").error
    assert found == "the map's target has no name to open it by: give --target MODEL"
    hostile = replace(bridge, target=replace(bridge.target, model="\x1b]0;a\x07/none"))
    hostile.save_pretrained(tmp_path / "hostile")
    assert "\x1b" not in run("transplant", "--check", place / "words", tmp_path / "hostile").error
    models = twins.source(), twins.target()
    part = fit_affine_map(
        *((model, tokenizer()) for model in models), twins.texts(), shard="1/2", batch_size=4
    )
    part.save_pretrained(tmp_path / "part")
    for options in (("--check",), ("-o", tmp_path / "s", "--strength", 1)):
        found = run("transplant", place / "words", tmp_path / "part", *options).error
        assert found == "this is part 1/2 of a map: merge all parts first"
