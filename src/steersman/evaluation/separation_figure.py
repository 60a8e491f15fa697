"""A picture of how well a concept separates held-out pairs, layer by layer, with intervals; as PNG or SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from matplotlib.ticker import MaxNLocator

from steersman.evaluation.figures import PALETTES, Theme, canvas, picture

MOST_LABELLED = 40
"""Layers up to which each has room for its AUROC in numbers."""


class Separated(Protocol):
    """What is drawn of a `Separation`."""

    @property
    def auroc(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def separation_figure(
    separation: Mapping[int, Separated | None],
    best: int | None,
    path: str | Path | None = None,
    *,
    theme: Theme = "light",
) -> bytes:
    """AUROC of held-out pairs by layer, each a point with its interval, chance as a line, the best one full.

    Args:
        separation: {layer: what was found there}; layers without a number are left empty.
        best: The layer that stands out.
        path: Where to write it: `.png` or `.svg`.
        theme: Of the colours.

    Returns:
        The picture, as PNG unless the path is of an SVG.
    """
    colours = PALETTES[theme]
    layers = sorted(separation)
    figure, axes = canvas(min(max(5.0, 1.6 + 0.42 * len(layers)), 16.0), 3.4, colours)
    axes.axhline(0.5, color=colours.neutral, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(
        "chance", (1, 0.5), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
        va="center", color=colours.neutral, fontsize=8, annotation_clip=False,
    )  # fmt: skip
    for layer in layers:
        found = separation[layer]
        if found is None:
            continue
        chosen = layer == best
        axes.plot([layer, layer], [found.low, found.high], color=colours.positive, linewidth=3, alpha=0.45)
        axes.plot(
            layer, found.auroc, "D" if chosen else "o", color=colours.positive,
            markersize=9 if chosen else 7, markerfacecolor=colours.positive if chosen else colours.paper,
        )  # fmt: skip
        if len(layers) <= MOST_LABELLED:
            axes.annotate(
                f"{found.auroc:.2f}", (layer, found.high), xytext=(0, 4), textcoords="offset points",
                ha="center", color=colours.ink, fontsize=7.5, fontweight="bold" if chosen else "normal",
            )  # fmt: skip
    axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    axes.set_ylim(min(0.42, *(found.low - 0.03 for found in separation.values() if found), 0.42), 1.06)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(len(layers), 20)))
    axes.set_xlabel("layer")
    axes.set_ylabel("AUROC of held-out pairs")
    if best is not None:
        axes.set_title(f"◆ best: layer {best}", loc="left", fontsize=10, color=colours.ink)
    axes.grid(axis="y", color=colours.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return picture(figure, path)
