"""`steersman serve`: what a user gets wrong is said in one line, before an engine is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steersman import Steering
from steersman.cli import main


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plan for a model of the lab."""
    import torch

    from steersman import load_model

    folder = tmp_path_factory.mktemp("plans") / "llama"
    model, _ = load_model("lab:target")
    Steering.from_vectors(model, {1: torch.ones(128)}).save_pretrained(folder)
    return str(folder)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error."""
    assert main(["serve", *arguments]) == 2
    out, err = capfd.readouterr()
    last = err.strip().splitlines()[-1]
    assert not out
    assert last.startswith("steersman: error: ")
    return last


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing could be steered: give a --steering NAME=FOLDER, or --sites all"),
        (["--steering", "a=nowhere"], "nowhere"),
        (["--steering", "none={experts}"], "'none' cannot be the name of a steering"),
        (["--steering", "a b={experts}"], "a b"),
        (["--steering", "a={experts}", "--steering", "a={vectors}"], "'a' is given twice"),
        (["--steering", "a={experts}@0.5"], "requests dial the strength"),
        (["--steering", "a={experts}", "--default", "b"], "default: there is no steering 'b' (there are: a)"),
        (["--steering", "a={experts}", "--default", "a@3"], "this server takes -2 to 2"),
        (["--steering", "a={experts}", "--alias", "x=b"], "x: there is no steering 'b'"),
        (["--steering", "a={experts}", "--alias", "x"], "right is ALIAS=STEERING"),
        (["--steering", "a={experts}", "--strengths", "1"], "right is LEAST,MOST"),
        (["--steering", "a={experts}", "--strengths", "2,1"], "two finite numbers in order"),
        (["--steering", "a={experts}", "--admin-key-env", "NO_SUCH"], "no such environment variable"),
        (["--steering", "a={experts}", "--steering", "b={vectors}", "--max-steerings", "1"], "do not fit"),
        (["--steering", "a={llama}"], "steering 'a': "),
        (["--steering", "a={experts}", "--enforce-eager"], "No such option"),
        (["--steering", "a={experts}", "--", "--no-such-option"], "an option for vLLM's server: "),
        (["--steering", "a={experts}", "--", "--model", "other"], "--model is given before --"),
        (["--steering", "a={experts}", "--", "--grpc"], "do not come over HTTP"),
        (
            ["--steering", "a={experts}", "--alias", "tiny=a", "--", "--served-model-name", "tiny"],
            "take another",
        ),
    ],
)
def test_a_users_error(
    material: Any, llama: str, capfd: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    folders = {**material.folders, "llama": llama}
    given = [argument.format(**folders) for argument in arguments]
    assert reason in refused(capfd, str(material.folder), *given)


def test_models_that_are_not_there(material: Any, llama: str, capfd: pytest.CaptureFixture[str]) -> None:
    steering = f"a={material.folders['experts']}"
    for model in ("lab:no-such", "lab:target@x", "./nowhere"):
        assert model.removeprefix("lab:") in refused(capfd, model, "--steering", steering)
    assert "steering 'a': " in refused(capfd, "lab:target", "--steering", steering)


def test_models_of_the_lab_whose_heads_the_engine_does_not_take(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from steersman import load_model

    Steering.from_experts(load_model("lab:moe")[0], activate={1: [1]}).save_pretrained(tmp_path / "plan")
    reason = refused(capfd, "lab:moe", "--steering", f"a={tmp_path / 'plan'}")
    assert "attention heads have 24 numbers, right are 32" in reason
    assert "of the lab's models, lab:target can be" in reason


def test_what_the_command_says_once_the_server_answers(server: Any, material: Any) -> None:
    told = server.process.told
    assert told["models"] == ["tiny", "tiny-experts"]
    assert told["steerings"] == [
        {"name": name, "fingerprint": material.plans[name].fingerprint}
        for name in ("experts", "vectors", "both", "against")
    ]
    assert (told["default"], told["changeable"]) == (None, True)
    assert (told["dtype"], told["checkpoint_dtype"]) == ("float32", "float32")


def test_help_names_the_way_to_ask(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert '"vllm_xargs": {"steering": "faithful,honest@0.5"}' in said
