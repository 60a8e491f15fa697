"""The picture of separation by layer: every layer in it, where its number says, the best one marked."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from steersman import Separation
from steersman.evaluation.separation_figure import separation_figure

FOUND = {0: Separation(0.55, 0.4, 0.7), 1: Separation(0.97, 0.9, 1.0), 2: None, 3: Separation(0.8, 0.7, 0.9)}


def test_an_svg_says_every_number_and_the_best_layer(tmp_path: Path) -> None:
    content = separation_figure(FOUND, 1, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes() == content == separation_figure(FOUND, 1, tmp_path / "b.svg")
    root = ElementTree.fromstring(content)
    assert root.tag.endswith("svg")
    said = content.decode()
    for text in ("0.55", "0.97", "0.80", "◆ best: layer 1", "chance"):
        assert f"<!-- {text} -->" in said
    assert "<dc:date>" not in said


def test_a_png_has_a_size_and_both_themes() -> None:
    light, dark = (
        np.asarray(Image.open(io.BytesIO(separation_figure(FOUND, 1, theme=theme))).convert("L"))
        for theme in ("light", "dark")
    )
    assert light.shape == dark.shape
    assert light.mean() > 200 > 80 > dark.mean()


def test_nothing_held_out_draws_an_empty_picture() -> None:
    assert separation_figure({0: None, 1: None}, None)[:4] == b"\x89PNG"
