"""The layer × expert map as SVG whose cells say more when pointed at: counts, and what each expert is for.

One file without scripts or links; browsers show an SVG's titles as tooltips. Whatever comes from text goes
through an XML writer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from matplotlib.colors import to_hex

from steersman.evaluation.figures import PALETTES, Theme, diverging

if TYPE_CHECKING:
    from steersman.experts.contrast import RoutingContrast
    from steersman.experts.profile import ExpertProfile
    from steersman.steering import Steering

CELL, NARROWEST = 22.0, 7.0
"""Pixels of a cell, and the fewest it gets where there are many experts."""
WIDEST = 1500.0
LEFT, TOP = 64.0, 56.0
NAMED_TOKENS, NAMED_CONTEXTS = 5, 2

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def svg_heatmap(
    contrast: RoutingContrast,
    steering: Steering | None = None,
    profile: ExpertProfile | None = None,
    path: str | Path | None = None,
    *,
    theme: Theme = "light",
) -> str:
    """The risk difference of every expert, layers down and experts across, with a tooltip on each cell.

    Args:
        contrast: What was counted.
        steering: A plan whose experts are outlined: activated solid, deactivated dashed.
        profile: What the experts are for, for the tooltips; of the same model as the contrast.
        path: Where to write it.

    Returns:
        The SVG.
    """
    colours = PALETTES[theme]
    difference = contrast.risk_difference
    layers, experts = difference.shape
    cell = min(CELL, max(NARROWEST, WIDEST / experts))
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {LEFT + experts * cell + 16:g} {TOP + layers * cell + 40:g}",
            "font-family": "system-ui, sans-serif",
            "font-size": "12",
            "fill": colours.ink,
        },
    )
    ElementTree.SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": colours.paper})
    _text(root, LEFT, 22, "Risk difference: positive side blue, negative orange. Point at a cell for more.")
    limit = float(np.nanmax(np.abs(difference))) if np.isfinite(difference).any() else 1.0
    scale = diverging(colours)
    planned = steering.strengths if steering is not None else {}
    for row, router in enumerate(contrast.routers):
        if row % max(1, round(14 / cell)) == 0:
            _text(root, LEFT - 8, TOP + (row + 0.5) * cell + 4, str(router.layer), anchor="end")
        for expert in range(router.experts):
            value = difference[row, expert] / (limit or 1.0)
            box = ElementTree.SubElement(
                root,
                "rect",
                {
                    "x": f"{LEFT + expert * cell + 0.5:g}",
                    "y": f"{TOP + row * cell + 0.5:g}",
                    "width": f"{cell - 1:g}",
                    "height": f"{cell - 1:g}",
                    "fill": to_hex(scale((value + 1) / 2)),
                    **_outline(planned.get(router.layer, {}).get(expert, 0.0), colours.ink),
                },
            )
            title = ElementTree.SubElement(box, "title")
            title.text = _clean(tooltip(contrast, row, expert, planned, profile))
    for expert in range(0, experts, max(1, round(28 / cell))):
        _text(root, LEFT + (expert + 0.5) * cell, TOP - 8, str(expert), anchor="middle")
    _text(root, LEFT, TOP + layers * cell + 24, "layers down, experts across")
    content = ElementTree.tostring(root, encoding="unicode") + "\n"
    if path is not None:
        Path(path).write_text(content, encoding="utf-8")
    return content


def tooltip(
    contrast: RoutingContrast,
    row: int,
    expert: int,
    planned: dict[int, dict[int, float]],
    profile: ExpertProfile | None,
) -> str:
    """What a cell says: where it is, how much it is used on either side, and what it is for."""
    layer = contrast.layers[row]
    positive, negative = contrast.rates[:, row, expert]
    lines = [
        f"layer {layer}, expert {expert}",
        f"risk difference {contrast.risk_difference[row, expert]:+.4f} "
        f"({positive:.1%} of positive tokens, {negative:.1%} of negative)",
    ]
    strength = planned.get(layer, {}).get(expert, 0.0)
    if strength:
        lines.append(f"{'activated' if strength > 0 else 'deactivated'}: strength {strength:+g}")
    if profile is not None:
        use = profile.expert(layer, expert)
        lines.append(f"in the text: {use.rate:.1%} of tokens")
        if use.tokens:
            named = (f"{token.token.strip()!r} {token.rate:.0%}" for token in use.tokens[:NAMED_TOKENS])
            lines.append(f"most by {', '.join(named)}")
        lines += [f"{context.weight:.2f}  {context.marked}" for context in use.contexts[:NAMED_CONTEXTS]]
    return "\n".join(lines)


def _outline(strength: float, ink: str) -> dict[str, str]:
    if not strength:
        return {}
    line = {"stroke": ink, "stroke-width": "2"}
    return line if strength > 0 else {**line, "stroke-dasharray": "3 2"}


def _text(root: ElementTree.Element, x: float, y: float, text: str, anchor: str = "start") -> None:
    element = ElementTree.SubElement(root, "text", {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor})
    element.text = text


def _clean(text: str) -> str:
    """Without the signs that XML cannot hold."""
    return _NOT_IN_XML.sub("\ufffd", text)
