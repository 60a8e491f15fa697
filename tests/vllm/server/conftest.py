"""One server for all tests of this folder: a tiny random model with the words of the lab, and four plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine import plans_for, save_plans, save_tiny
from torch import nn

from steersman import Steering


@dataclass(frozen=True)
class Material:
    """What is served: a checkpoint, opened with transformers too, and plans in folders."""

    folder: Path
    model: nn.Module
    plans: Mapping[str, Steering]
    folders: Mapping[str, str]


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    from steersman import lab

    folder = tmp_path_factory.mktemp("served")
    model = save_tiny("olmoe", folder / "tiny", vocab_size=341, max_position_embeddings=256)
    lab.load("target")[1].save_pretrained(folder / "tiny")
    against = Steering.from_experts(model, deactivate={1: [1]})
    plans = {**plans_for(model, "olmoe"), "against": against}
    return Material(folder / "tiny", model, plans, save_plans(plans, folder / "plans"))


@pytest.fixture(scope="session")
def server(material: Material) -> Iterator[Any]:
    from running import Running, start

    names = ("experts", "vectors", "both", "against")
    with start(
        str(material.folder),
        *(f"--steering={name}={material.folders[name]}" for name in names),
        *("--alias", "tiny-experts=experts@0.5", "--sites", "all", "--max-steerings", "7"),
        engine=("--served-model-name", "tiny", "--enable-scale-out"),
    ) as process:
        yield Running(process)
