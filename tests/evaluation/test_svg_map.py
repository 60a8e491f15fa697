"""The map with tooltips: every cell, its colours and words, and nothing of a text that is more than text."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from contrasts import made
from steersman.evaluation.svg_map import svg_heatmap
from steersman.experts.contrast import RoutingContrast
from steersman.experts.profile import ExpertProfile

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def contrast() -> RoutingContrast:
    return made()


def profile_of(contrast: RoutingContrast, word: str, snippet: tuple[str, str, str]) -> ExpertProfile:
    """A profile in which one word and one context are every expert's."""
    there = contrast.valid
    places = np.where(there, 0, -1)[..., None]
    return ExpertProfile(
        uses=np.where(there, 10, -1),
        tokens=40,
        texts=3,
        token_places=places,
        token_uses=np.where(there, 6, 0)[..., None],
        words=(word,),
        word_seen=np.array([8]),
        context_places=places,
        context_weights=np.where(there, 0.5, 0.0)[..., None],
        snippets=(snippet,),
        architecture=contrast.architecture,
        weights_id=contrast.weights_id,
    )


def cells(svg: str) -> list[tuple[ElementTree.Element, str]]:
    """Cells with their tooltips."""
    root = ElementTree.fromstring(svg)
    return [
        (box, title.text or "")
        for box in root.iter(f"{SVG}rect")
        if (title := box.find(f"{SVG}title")) is not None
    ]


def test_a_cell_for_every_expert(contrast: RoutingContrast) -> None:
    found = cells(svg_heatmap(contrast))
    assert len(found) == sum(router.experts for router in contrast.routers)
    for (layer, expert), (_, title) in zip(
        [(router.layer, expert) for router in contrast.routers for expert in range(router.experts)],
        found,
        strict=True,
    ):
        row = contrast.layers.index(layer)
        assert title.splitlines()[0] == f"layer {layer}, expert {expert}"
        assert f"{contrast.risk_difference[row, expert]:+.4f}" in title
        assert f"{contrast.rates[0, row, expert]:.1%} of positive" in title


def test_colours_go_with_the_sign(contrast: RoutingContrast) -> None:
    values = contrast.risk_difference[contrast.valid]
    fills = [box.get("fill", "") for box, _ in cells(svg_heatmap(contrast))]
    for value, fill in zip(values, fills, strict=True):
        red, blue = int(fill[1:3], 16), int(fill[5:7], 16)
        if abs(value) > 0.05:
            assert (blue > red) == (value > 0)


def test_a_plan_is_outlined(contrast: RoutingContrast) -> None:
    plan = contrast.select(activate=2, deactivate=3)
    found = cells(svg_heatmap(contrast, plan))
    outlined = [(box, title) for box, title in found if box.get("stroke")]
    assert sum("deactivated: strength -1" in title for _, title in outlined) == 3
    assert sum("\nactivated: strength +1" in title for _, title in outlined) == 2
    assert all(bool(box.get("stroke-dasharray")) == ("deactivated" in title) for box, title in outlined)


def test_tooltips_say_what_experts_are_for(contrast: RoutingContrast, tmp_path: Path) -> None:
    profile = profile_of(contrast, " river", ("down the", " river", " to the sea"))
    svg = svg_heatmap(contrast, None, profile, tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_text() == svg
    for _, title in cells(svg):
        assert "in the text: 25.0% of tokens" in title
        assert "most by 'river' 75%" in title
        assert "0.50  down the⟦ river⟧ to the sea" in title


@pytest.mark.parametrize(
    "text",
    [
        "</title><script>alert(1)</script>",
        '" onload="alert(1)',
        "<!ENTITY x SYSTEM 'file:///etc/passwd'>&x;",
        "]]><svg/onload=alert(1)>",
        "\x00\x08\x1b[2J\ufffe\ud800",
        "&amp; &lt;",
    ],
)
def test_text_stays_text(contrast: RoutingContrast, text: str) -> None:
    svg = svg_heatmap(contrast, None, profile_of(contrast, text, (text, text, text)))
    svg.encode()
    root = ElementTree.fromstring(svg)
    assert {element.tag for element in root.iter()} == {
        f"{SVG}{tag}" for tag in ("svg", "rect", "text", "title")
    }
    names = {name for element in root.iter() for name in element.attrib}
    assert not {name for name in names if name.startswith("on") or "href" in name}
    if text.isprintable():
        assert " ".join(text.split()) in cells(svg)[0][1]
