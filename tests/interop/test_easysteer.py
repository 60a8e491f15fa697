"""EasySteer's expert plans: both ways, and what cannot be said exactly is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from families import EXPERTS, TOP_K, WIDTH, dense, shared
from steersman import Steering, export_easysteer, import_easysteer, import_gguf, import_repeng
from steersman.errors import ArtifactError, PlanError
from steersman.interop.easysteer import read_plan
from steersman.interop.foreign_files import format_of
from steersman.limits import Router
from steersman.steering import Architecture, ExpertEdit


def written(value: Any, folder: Path) -> Path:
    path = folder / "plan.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def made(strengths: dict[int, dict[int, float]], rule: str = "softmax-topk", **options: Any) -> Steering:
    layers = tuple(Router(layer, 16, 4, rule) for layer in range(12))
    return Steering((ExpertEdit(strengths, **options),), Architecture("olmoe", 32, layers), "0" * 64)


def test_the_forms_of_its_own_files(tmp_path: Path) -> None:
    path = written(
        {
            "layer_configs": {
                "7": {"mode": "deactivate", "expert_ids": [30, 25]},
                "9": {"mode": "activate", "activate_ids": [12], "deactivate_ids": [35]},
                "1": {"expert_ids": [3]},
                "2": {"mode": "deactivate", "expert_ids": [1], "activate_ids": [4], "epsilon": 0.01},
                "3": {"mode": "boost", "expert_ids": [5]},
                "4": {"mode": "suppress", "expert_ids": [6]},
                "5": {"mode": "steermoe", "activate_ids": [7], "deactivate_ids": [8]},
                "6": {"mode": "soft_hard", "expert_ids": [9, 9]},
            }
        },
        tmp_path,
    )
    assert read_plan(path) == {
        7: {30: -1, 25: -1},
        9: {12: 1, 35: -1},
        1: {3: 1},
        2: {1: -1, 4: 1},
        3: {5: 1},
        4: {6: -1},
        5: {7: 1, 8: -1},
        6: {9: 1},
    }


def test_it_becomes_a_steering_of_the_model(tmp_path: Path) -> None:
    model = shared("olmoe")
    path = written({"layer_configs": {"1": {"mode": "deactivate", "expert_ids": [2, 5]}}}, tmp_path)
    steering = import_easysteer(path, model)
    assert steering.strengths == {1: {2: -1.0, 5: -1.0}}
    assert steering.fingerprint == Steering.from_experts(model, deactivate={1: [2, 5]}).fingerprint
    assert steering.provenance["from"][0]["name"] == "plan.json"
    assert import_easysteer(path, model, scope="answer").edits[0].scope == "answer"
    steering.save_pretrained(tmp_path / "plan")
    assert Steering.from_pretrained(tmp_path / "plan").fingerprint == steering.fingerprint


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.integers(0, 11),
        st.dictionaries(st.integers(0, 15), st.sampled_from([1.0, -1.0]), min_size=1, max_size=5),
        min_size=1,
        max_size=6,
    )
)
def test_there_and_back(tmp_path_factory: Any, strengths: dict[int, dict[int, float]]) -> None:
    strengths = {
        layer: {
            expert: value for number, (expert, value) in enumerate(experts.items()) if value < 0 or number < 4
        }
        for layer, experts in strengths.items()
    }
    strengths = {layer: experts for layer, experts in strengths.items() if experts}
    if not strengths:
        return
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    export_easysteer(made(strengths), path)
    assert read_plan(path) == strengths


def test_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    export_easysteer(
        made({0: {3: 1.0}, 2: {1: -1.0, 0: -1.0}, 5: {4: 1.0, 6: -1.0, 7: 0.0}, 6: {1: 0.0}}), path
    )
    assert json.loads(path.read_text()) == {
        "layer_configs": {
            "0": {"mode": "activate", "expert_ids": [3]},
            "2": {"mode": "deactivate", "expert_ids": [0, 1]},
            "5": {"mode": "activate", "activate_ids": [4], "deactivate_ids": [6]},
        }
    }


def test_a_sum_that_is_full_can_be_written(tmp_path: Path) -> None:
    half = made({0: {3: 0.5}})
    export_easysteer(half + half, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == {0: {3: 1.0}}


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        (lambda: made({3: {5: 0.5}}), "expert 5 of layer 3 has the strength 0.5, not 1 or -1"),
        (
            lambda: made({3: {5: 1.0}}, scope="answer"),
            r"has no scopes: the steering's is 'answer'.*\(export --scope all\)",
        ),
        (
            lambda: made({3: {5: 1.0}}, rule="sigmoid-topk+renormalised+bias"),
            "layer 3 routes by sigmoid-topk",
        ),
        (lambda: made({3: {5: 1.0}}, rule="sparsemixer"), "layer 3 routes by sparsemixer"),
        (lambda: made({}), "takes no empty plan"),
        (lambda: made({3: {5: 0.0}}), "takes no empty plan"),
    ],
)
def test_what_it_cannot_say(steering: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        export_easysteer(steering(), tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mode": "soft", "expert_ids": [1], "lambda": 0.5}, "mode 'soft' moves scores by a rule"),
        ({"mode": "soft_topk", "expert_ids": [1]}, "mode 'soft_topk'"),
        ({"mode": "soft_random", "expert_ids": [1]}, "mode 'soft_random'"),
        ({"mode": "x", "expert_ids": [1]}, "mode 'x' is unknown"),
        ({"mode": ["activate"], "expert_ids": [1]}, "is unknown"),
        ({"mode": "deactivate"}, "names no experts"),
        ({"mode": "deactivate", "expert_ids": []}, "names no experts"),
        ({"expert_ids": [1], "deactivate_ids": [1]}, "expert 1 is both activated and deactivated"),
        ({"expert_ids": [1], "epsilon": 0.5}, r"epsilon is not 0\.01"),
        ({"expert_ids": [1], "lambda": 0.5}, "key 'lambda' cannot be expressed"),
        ({"expert_ids": [1.0]}, "expert_ids is not a list of experts' numbers"),
        ({"expert_ids": [True]}, "expert_ids is not a list of experts' numbers"),
        ({"expert_ids": [-1]}, "expert_ids is not a list of experts' numbers"),
        ({"expert_ids": "12"}, "expert_ids is not a list of experts' numbers"),
        ([1, 2], "not an object"),
    ],
)
def test_layers_that_cannot_be_read(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        read_plan(written({"layer_configs": {"7": config}}, tmp_path))
    assert ": layer 7: " in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not an EasySteer plan"),
        ("{}", "not an EasySteer plan"),
        ('{"layer_configs": []}', "not an EasySteer plan"),
        ('{"layer_configs": {}}', "nothing to steer"),
        ('{"layer_configs": {"7": {"expert_ids": [1]}}, "model": "x"}', "unknown key 'model'"),
        ('{"layer_configs": {"a": {"expert_ids": [1]}}}', "layer 'a' is no layer's number"),
        ('{"layer_configs": {"-1": {"expert_ids": [1]}}}', "layer '-1' is no layer's number"),
        (
            '{"layer_configs": {"7": {"expert_ids": [1]}, "07": {"expert_ids": [1]}}}',
            "layer 7 is given twice",
        ),
        ('{"layer_configs": {"7": {"expert_ids": [1]}, "7": {"expert_ids": [2]}}}', "a key is given twice"),
        ('{"layer_configs": {"7": {"expert_ids": [1], "epsilon": NaN}}}', "NaN is not a number"),
        ("\x00\x01", "not valid JSON"),
    ],
)
def test_files_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        read_plan(written(content, tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "experts", "message"),
    [
        ("9", [1], "layer 9 does not exist"),
        ("1", [EXPERTS], f"has no expert {EXPERTS}"),
        ("1", list(range(TOP_K + 1)), f"{TOP_K + 1} experts activated"),
    ],
)
def test_plans_that_do_not_fit_the_model(
    layer: str, experts: list[int], message: str, tmp_path: Path
) -> None:
    path = written({"layer_configs": {layer: {"expert_ids": experts}}}, tmp_path)
    with pytest.raises(PlanError, match=message) as caught:
        import_easysteer(path, shared("olmoe"))
    assert str(path) in str(caught.value)


def test_models_that_it_steers_otherwise(tmp_path: Path) -> None:
    path = written({"layer_configs": {"1": {"expert_ids": [1]}}}, tmp_path)
    with pytest.raises(ArtifactError, match="which is another plan there"):
        import_easysteer(path, shared("deepseek_v3"))


# ------------------------------------------------------------ vectors in GGUF


def vector_file(folder: Path, layers: int = 3, length: float = 1.0, **keys: Any) -> Path:
    """A file as EasySteer's `export_gguf` writes it: unit vectors, times `length`."""
    path, draws = folder / "vector.gguf", np.random.default_rng(0)
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "unknown")
    writer.add_uint32("controlvector.layer_count", layers)
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"controlvector.{key.replace('__', '.')}", value)
    for layer in range(layers):
        vector = draws.standard_normal(WIDTH)
        writer.add_tensor(f"direction.{layer}", (length * vector / np.linalg.norm(vector)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MADE = {
    "diffmean": {
        "method": "diffmean",
        "normalize": 1.0,
        "token_pos": -1.0,
        "n_positive": 4.0,
        "n_negative": 4.0,
    },
    "pca": {
        "method": "center",
        "normalize": 1.0,
        "n_components": 1.0,
        "correct_direction": 1.0,
        "token_pos": "mean",
        "explained_variance__0": 0.5,
        "explained_variance__2": 0.9,
    },
    "probe": {
        "method": "linear_probe",
        "normalize": 1.0,
        "regularization": "l2",
        "C": 1.0,
        "standardize": 1.0,
        "classification_scores__1": 0.75,
    },
    "average": {"method": "Average", "num_vectors_averaged": 239.0},
}


@pytest.mark.parametrize("made_by", MADE)
def test_its_vectors_with_what_their_keys_say(made_by: str, tmp_path: Path) -> None:
    path = vector_file(tmp_path, length=1.0 if "normalize" in MADE[made_by] else 26.0, **MADE[made_by])
    assert format_of(path) == "easysteer"
    steering = import_easysteer(path, dense())
    (edit,) = steering.edits
    assert (edit.layers, edit.scope, edit.operation, edit.strength) == ((0, 1, 2), "all", "add", 1.0)
    expected = GGUFReader(path).tensors
    assert all(np.array_equal(edit.vectors[n].numpy(), tensor.data) for n, tensor in enumerate(expected))
    (source,) = steering.provenance["from"]
    assert source["said"] == {key: value for key, value in MADE[made_by].items() if "__" not in key}
    steering.save_pretrained(tmp_path / "plan")
    assert Steering.from_pretrained(tmp_path / "plan").provenance["from"] == [source]


def test_direction_n_is_added_to_the_output_of_layer_n_from_0(tmp_path: Path) -> None:
    model, path = dense(), vector_file(tmp_path, method="diffmean", normalize=1.0)
    added = torch.from_numpy(np.array(GGUFReader(path).tensors[0].data))
    tokens = torch.arange(2, 8)[None]
    plain = model(tokens, output_hidden_states=True).hidden_states[1]
    with import_easysteer(path, model).apply(model):
        steered = model(tokens, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(steered, plain + added, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "erase"}, "controlvector.method is 'erase'"),
        ({}, r"has no controlvector\.method, .*--format gguf"),
        ({"method": "diffmean", "normalize": 2.0}, "normalize is '2.0'"),
        ({"method": "diffmean", "normalize": 1.0, "scale": 3.0}, r"'controlvector\.scale' is unknown"),
        ({"method": "diffmean", "C": float("nan")}, r"controlvector\.C is nan"),
    ],
)
def test_keys_that_mean_something_else_are_refused_by_name(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        import_easysteer(vector_file(tmp_path, **keys), dense())


def test_vectors_that_are_not_as_normalize_says(tmp_path: Path) -> None:
    path = vector_file(tmp_path, length=7.0, method="diffmean", normalize=1.0)
    with pytest.raises(ArtifactError, match=r"normalize says .* length 1, and direction\.0 has 7"):
        import_easysteer(path, dense())


def test_other_importers_name_its_own(tmp_path: Path) -> None:
    path = vector_file(tmp_path, method="diffmean", normalize=1.0)
    for reader in (import_gguf, import_repeng):
        with pytest.raises(ArtifactError, match="EasySteer writes such files: --format easysteer"):
            reader(path, dense())
