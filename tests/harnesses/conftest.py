"""The lab's model, and plans for it that change answers, made once for all tests of the harnesses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import steersman
from steersman import Steering


@pytest.fixture(scope="session")
def lab_moe() -> tuple[Any, Any]:
    return steersman.load_model("lab:moe")


@pytest.fixture(scope="session")
def checkpoint(lab_moe: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The lab's model as a folder, which others' libraries can open."""
    folder = tmp_path_factory.mktemp("moe")
    for part in lab_moe:
        part.save_pretrained(folder)
    return str(folder)


def _plan(lab_moe: tuple[Any, Any], behaviour: str, folder: Path) -> Path:
    """Experts by risk difference over the first pairs: what a reader would make, from less."""
    pairs = steersman.load_pairs(f"lab:{behaviour}/train")[:60]
    steersman.detect_experts(*lab_moe, pairs).select(top=8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def safer(lab_moe: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _plan(lab_moe, "refusal", tmp_path_factory.mktemp("plans") / "safer")


@pytest.fixture(scope="session")
def faithful(lab_moe: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _plan(lab_moe, "faithfulness", tmp_path_factory.mktemp("plans") / "faithful")


@pytest.fixture(scope="session")
def by_hand(lab_moe: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that is there at once; what it does to answers does not matter."""
    folder = tmp_path_factory.mktemp("plans") / "by+hand@home"
    Steering.from_experts(lab_moe[0], activate={1: [4]}, deactivate={3: [6]}).save_pretrained(folder)
    return folder
