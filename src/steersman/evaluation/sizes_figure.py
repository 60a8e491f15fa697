"""A picture of how far sets of experts move d by their number, over the band of random sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullLocator

from steersman.evaluation.figures import PALETTES, Theme, canvas, picture

MARKERS = {"activated": "^", "deactivated": "v", "both": "o"}
LINES = {"activated": "-", "deactivated": "--", "both": ":"}


def sizes_figure(
    rows: Sequence[dict[str, Any]], path: str | Path | None = None, *, theme: Theme = "light"
) -> bytes:
    """The change of d against the number of experts, with intervals; shaded, where 95 % of random sets lie.

    Args:
        rows: Of `SizeSweep.rows`.
        path: Where to write it: `.png` or `.svg`.
        theme: Of the colours.

    Returns:
        The picture, as PNG unless the path is of an SVG.
    """
    colours = PALETTES[theme]
    shades = {"toward": colours.positive, "reversed": colours.negative}
    figure, axes = canvas(7.6, 4.2, colours)
    axes.axhline(0, color=colours.faint, linewidth=1, zorder=0)
    for direction, kind in dict.fromkeys((row["direction"], row["kind"]) for row in rows):
        some = [row for row in rows if (row["direction"], row["kind"]) == (direction, kind)]
        sizes, colour = [row["size"] for row in some], shades[direction]
        if all(row["draws"] for row in some):
            low, high = ([row[name] for row in some] for name in ("random_low", "random_high"))
            axes.fill_between(sizes, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(
            sizes,
            [row["change"] for row in some],
            LINES[kind],
            color=colour,
            marker=MARKERS[kind],
            markersize=6,
            markeredgecolor=colours.paper,
            label=f"{direction}, {kind}",
        )
        for row in some:
            if row["low"] is not None:
                axes.plot([row["size"]] * 2, [row["low"], row["high"]], color=colour, alpha=0.45, linewidth=2)
    every = sorted({row["size"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(every, [str(size) for size in every])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("experts")
    axes.set_ylabel("change of d (nats)")
    axes.grid(axis="y", color=colours.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    title = "shaded: 95 % of random sets"
    legend = axes.legend(title=title, title_fontsize=8, frameon=False, fontsize=8, labelcolor=colours.ink)
    legend.get_title().set_color(colours.ink)
    return picture(figure, path)
