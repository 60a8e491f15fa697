"""The reference's rankings: what is read of them, what is refused, and that selection is the reference's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from families import shared, token_ids
from rankings import ranking, reference_choice
from steersman import RoutingContrast, import_steermoe, merge_contrasts, read_architecture, weights_id
from steersman.errors import ArtifactError, PlanError
from steersman.experts.presets import PRESETS
from steersman.interop.steermoe import contrast_of, read_ranking
from steersman.limits import Router
from steersman.steering import Architecture


def architecture(layers: int, experts: int, top_k: int, model_type: str = "olmoe") -> Architecture:
    routers = tuple(Router(layer, experts, top_k, "softmax-topk") for layer in range(layers))
    return Architecture(model_type, 32, routers)


def imported(frame: pd.DataFrame, tmp_path: Path, made_for: Architecture) -> RoutingContrast:
    path = tmp_path / "ranking.pkl"
    frame.to_pickle(path)
    return contrast_of(read_ranking(path), made_for, "0" * 64)


def test_counts_order_and_no_errors(tmp_path: Path) -> None:
    frame = ranking()
    contrast = imported(frame, tmp_path, architecture(3, 8, 2))
    assert contrast.imported
    assert contrast.tokens.tolist() == [40, 57]
    for row in frame.to_dict("records"):
        place = (row["layer"], row["expert"])
        assert contrast.activations[0][place] == row["a1"]
        assert contrast.activations[1][place] == row["a2"]
        assert contrast.risk_difference[place] == pytest.approx(row["risk_diff"], abs=1e-12)
    for nothing in (contrast.standard_error, *contrast.interval(), contrast.p_values, contrast.q_values):
        assert np.isnan(nothing).all()
    assert contrast.clusters == contrast.pairs == 0
    table = contrast.table()
    assert table[["layer", "expert"]].to_numpy().tolist() == frame[["layer", "expert"]].to_numpy().tolist()
    used = [(layer, expert) for layer, expert, _ in contrast.ranking()]
    assert used == [
        (row["layer"], row["expert"]) for row in frame.to_dict("records") if row["risk_diff"] != 0
    ]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    activate=st.integers(0, 9),
    deactivate=st.integers(0, 9),
    reverse=st.booleans(),
    shuffled=st.booleans(),
)
def test_selection_is_the_references(
    tmp_path_factory: Any, seed: int, activate: int, deactivate: int, reverse: bool, shuffled: bool
) -> None:
    """Also in an order that no size of effect would give, which ties make all the time."""
    frame = ranking(layers=3, experts=8, top_k=2, tokens=(12, 15), seed=seed)
    if shuffled:
        frame = frame.sample(frac=1, random_state=seed).reset_index(drop=True)
    difference = -frame["risk_diff"] if reverse else frame["risk_diff"]
    if (difference > 0).sum() < activate or (difference < 0).sum() < deactivate or not activate + deactivate:
        return
    folder = tmp_path_factory.mktemp("ranking")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contrast = imported(frame, folder, architecture(3, 8, 2))
    choice = contrast.choose(activate=activate, deactivate=deactivate, reverse=reverse)
    expected = reference_choice(frame, activate, deactivate, 2, reverse=reverse)
    # Where fewer than k experts would be left alive, the reference goes on and a plan of ours does not.
    refused = {
        (entry["layer"], entry["expert"]) for entry in choice.skipped if "alive" in str(entry["reason"])
    }
    for layer, expert in refused:
        assert expected[layer].pop(expert) == -1
    assert choice.signs == {layer: experts for layer, experts in expected.items() if experts}


def test_more_than_there_are(tmp_path: Path) -> None:
    contrast = imported(ranking(), tmp_path, architecture(3, 8, 2))
    with pytest.raises(PlanError, match="100 experts to activate were asked for"):
        contrast.select(activate=100)


def test_it_goes_with_a_model_and_through_a_folder(tmp_path: Path) -> None:
    model = shared("olmoe")
    routers = [router for router in read_architecture(model).routers if router.steerable]
    first = routers[0]
    path = tmp_path / "ranking.pkl"
    ranking(len(routers), first.experts, first.top_k).to_pickle(path)
    contrast = import_steermoe(path, model)
    assert contrast.weights_id == weights_id(model)
    assert contrast.made_from[0]["name"] == "ranking.pkl"
    contrast.save_pretrained(tmp_path / "contrast")
    again = RoutingContrast.from_pretrained(tmp_path / "contrast")
    np.testing.assert_array_equal(again.order, contrast.order)
    np.testing.assert_array_equal(again.activations, contrast.activations)
    assert again.sha256 == contrast.sha256
    assert again.select(top=5).fingerprint == contrast.select(top=5).fingerprint
    steering = again.select(activate=2, deactivate=3)
    with steering.apply(model) as receipt:
        model(token_ids(1, 6))
    assert receipt.fingerprint == steering.fingerprint


@pytest.mark.parametrize(
    "order",
    [
        lambda order: order[:-1],
        lambda order: np.append(order[:-1], order[0]),
        lambda order: order + 1,
        lambda order: order[None],
        lambda order: order.astype(np.float64),
    ],
)
def test_an_order_that_is_none(order: Callable[[Any], Any], tmp_path: Path) -> None:
    contrast = imported(ranking(), tmp_path, architecture(3, 8, 2))
    replace(contrast, order=order(contrast.order)).save_pretrained(tmp_path / "contrast")
    with pytest.raises(ArtifactError, match="order"):
        RoutingContrast.from_pretrained(tmp_path / "contrast")


def test_what_needs_errors_or_pairs_is_refused(tmp_path: Path) -> None:
    contrast = imported(ranking(), tmp_path, architecture(3, 8, 2))
    with pytest.raises(PlanError, match="an imported ranking has none"):
        contrast.select(top=3, by="lower_bound")
    with pytest.raises(PlanError, match="imported ranking cannot be merged"):
        merge_contrasts([contrast, contrast])


def test_more_columns_than_needed(tmp_path: Path) -> None:
    """As some of the published files have, which lack a1_n and a2_n too."""
    frame = ranking().drop(columns=["a1_n", "a2_n", "Layer_Expert"])
    frame.insert(2, "t_stat", np.nan)
    frame["p_value"] = 0
    contrast = imported(frame, tmp_path, architecture(3, 8, 2))
    assert contrast.top_k == [2, 2, 2]


def _changed(name: str, row: int, value: float) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[row, name] = value
        return frame

    return change


def _moved_token(frame: pd.DataFrame) -> pd.DataFrame:
    """A token more for one expert: every row is right in itself, the layer's sum is not."""
    frame.loc[0, ["a1", "d1"]] += [1, -1]
    return frame.drop(columns=["a1_n", "a2_n", "risk_diff_abs"]).assign(
        risk_diff=frame["a1"] / 40 - frame["a2"] / 57
    )


WRONG: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "no column": (lambda frame: frame.drop(columns=["d2"]), "no column 'd2'"),
    "no rows": (lambda frame: frame.iloc[:0], "the ranking is empty"),
    "half a token": (_changed("a1", 4, 1.5), r"row 4, column 'a1': 1\.5 is not a count"),
    "less than nothing": (_changed("d2", 4, -1.0), "row 4, column 'd2': -1 is not a count"),
    "nothing known": (_changed("a2", 3, np.nan), "row 3, column 'a2': nan is not a count"),
    "infinity": (_changed("a2", 3, np.inf), "row 3, column 'a2': inf is not a count"),
    "beyond exact numbers": (_changed("a1", 0, 2.0**60), "is not a count"),
    "other tokens": (_changed("d1", 5, 3.0), r"row 5: a1 \+ d1 is \d+, in the first row 40"),
    "other rate": (_changed("a1_n", 2, 0.7), r"row 2: a1_n is 0\.7, its counts give 0\.\d+"),
    "other difference": (_changed("risk_diff", 2, 0.7), r"row 2: risk_diff is 0\.7, its counts give"),
    "unknown difference": (_changed("risk_diff", 2, np.nan), "row 2: risk_diff is nan"),
    "other size": (_changed("risk_diff_abs", 2, -0.7), r"row 2: risk_diff_abs is -0\.7"),
    "text for counts": (lambda frame: frame.assign(a1=frame["Layer_Expert"]), "column 'a1' holds no numbers"),
    "text for a difference": (
        lambda frame: frame.assign(risk_diff=frame["Layer_Expert"]),
        "column 'risk_diff' holds no numbers",
    ),
    "an expert twice": (
        lambda frame: frame.assign(expert=0),
        "layer 0: its experts are not 0 to E - 1, each once",
    ),
    "an expert missing": (lambda frame: frame.iloc[:-1], "its experts are not|do not|add up"),
    "sums": (_moved_token, "its activations add up to"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_contradicts_itself(kind: str, tmp_path: Path) -> None:
    change, message = WRONG[kind]
    path = tmp_path / "ranking.pkl"
    change(ranking()).to_pickle(path)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_ranking(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "message"),
    [
        (4, 8, 2, "layer 3 is in the model, not in the ranking"),
        (2, 8, 2, "layer 2 is in the ranking, not in the model"),
        (3, 16, 2, "chooses 2 of 8 experts, the model's 2 of 16"),
        (3, 8, 4, "chooses 2 of 8 experts, the model's 4 of 8"),
    ],
)
def test_another_models(layers: int, experts: int, top_k: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        imported(ranking(), tmp_path, architecture(layers, experts, top_k))


def test_dense_layers_between(tmp_path: Path) -> None:
    """Layers are true indices: a ranking that numbers only the layers with routers is not the model's."""
    made_for = Architecture(
        "made_up", 32, (None, *(Router(layer, 8, 2, "softmax-topk") for layer in (1, 2, 3)))
    )
    with pytest.raises(ArtifactError, match="belongs to another model"):
        imported(ranking(), tmp_path, made_for)
    shifted = ranking().assign(layer=lambda frame: frame["layer"] + 1)
    assert imported(shifted, tmp_path, made_for).layers == [1, 2, 3]


def test_an_order_of_its_own_is_kept_and_said(tmp_path: Path) -> None:
    frame = ranking().iloc[::-1].reset_index(drop=True)
    with pytest.warns(UserWarning, match="do not descend by"):
        contrast = imported(frame, tmp_path, architecture(3, 8, 2))
    assert contrast.table()["expert"].tolist() == frame["expert"].tolist()


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"PK\x03\x04", b"{}", b"\x80\x04N.", b"layer,expert\n0,1\n"]
)
def test_foreign_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        read_ranking(path)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        read_ranking(tmp_path / "none")
    with pytest.raises(ArtifactError, match="is a folder"):
        read_ranking(tmp_path)


# ---------------------------------------------------------------- the published files

PUBLISHED = {
    "Qwen--Qwen3-30B-A3B": ("qwen3_moe", 48, 128, 8, "qwen3-30b-a3b"),
    "allenai--OLMoE-1B-7B-0125-Instruct": ("olmoe", 16, 64, 8, "olmoe-1b-7b"),
    "microsoft--Phi-3.5-MoE-instruct": ("phimoe", 32, 16, 2, "phi-3.5-moe"),
    "mistralai--Mixtral-8x7B-Instruct-v0.1": ("mixtral", 32, 8, 2, "mixtral-8x7b"),
    "openai--gpt-oss-120b": ("gpt_oss", 36, 128, 4, "gpt-oss-120b"),
    "openai--gpt-oss-20b": ("gpt_oss", 24, 32, 4, "gpt-oss-20b"),
}


@pytest.mark.parametrize("behaviour", ["faithfulness", "safety"])
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_rankings(model: str, behaviour: str) -> None:
    path = (
        Path(os.environ.get("STEERSMAN_DATA", "")) / "steermoe" / f"activations_[{model}]_[{behaviour}].pkl"
    )
    if "STEERSMAN_DATA" not in os.environ or not path.is_file():
        pytest.skip("STEERSMAN_DATA names no folder with steermoe/activations_[…].pkl of the reference")
    model_type, layers, experts, top_k, short = PUBLISHED[model]
    contrast = contrast_of(read_ranking(path), architecture(layers, experts, top_k, model_type), "0" * 64)
    assert contrast.top_k == [top_k] * layers
    steering = contrast.select(preset=f"{short}/{'faithful' if behaviour == 'faithfulness' else 'safe'}")
    asked = steering.provenance
    frame = pd.read_pickle(path)  # noqa: S301  (the user's own copy of a published file)
    preset = PRESETS[asked["preset"]]
    expected = reference_choice(frame, preset.activate, preset.deactivate, top_k)
    for entry in asked["skipped"]:
        if "alive" in entry["reason"]:
            assert expected[entry["layer"]].pop(entry["expert"]) == -1
    assert steering.strengths == {
        layer: dict(sorted(e.items())) for layer, e in sorted(expected.items()) if e
    }
