"""A picture of an affine map: held-out R² of every pair of layers, as PNG or SVG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from steersman.errors import ArtifactError
from steersman.evaluation.figures import PALETTES, Theme, canvas, picture

if TYPE_CHECKING:
    from steersman.concepts.affine_map import AffineMap

CELL_INCHES, WIDEST_INCHES = 0.62, 14.0
NUMBERED = 24
"""Layers up to which each cell says its number."""


def map_heatmap(of: AffineMap, path: str | Path | None = None, *, theme: Theme = "light") -> bytes:
    """Held-out R² by source layer (down) and target layer (across); each target layer's own source outlined.

    Cells say R² and, below it, the control's mean. Returns the picture, and writes it where a path is given:
    SVG where it ends in .svg, else PNG. Raises ArtifactError for a part that is to be merged.
    """
    if of.table is None or of.shard is not None:
        raise ArtifactError(f"this is part {of.shard} of a map, without R²: merge all parts first")
    colours = PALETTES[theme]
    r2 = of.table.r2.numpy()
    sources, targets = r2.shape
    cell = min(CELL_INCHES, WIDEST_INCHES / max(sources, targets))
    figure, axes = canvas(max(targets * cell, 2.4) + 2.2, max(sources * cell, 1.2) + 1.5, colours)
    shades = LinearSegmentedColormap.from_list("explained", [colours.middle, colours.positive])
    image = axes.pcolormesh(
        np.arange(targets + 1) - 0.5,
        np.arange(sources + 1) - 0.5,
        np.clip(r2, 0, 1),
        cmap=shades,
        vmin=0,
        vmax=1,
        edgecolors=colours.paper,
        linewidth=1,
    )
    axes.set_ylim(sources - 0.5, -0.5)
    for axis, layers in ((axes.yaxis, of.table.source_layers), (axes.xaxis, of.table.target_layers)):
        step = -(-len(layers) // 24)
        places = range(0, len(layers), step)
        axis.set_ticks(list(places), [str(layers[place]) for place in places])
    axes.set_ylabel("source layer")
    axes.set_xlabel("target layer")
    if max(sources, targets) <= NUMBERED:
        control = of.table.r2_control.numpy()
        for row, column in np.ndindex(sources, targets):
            ink = colours.paper if r2[row, column] > 0.6 else colours.ink
            text = f"{r2[row, column]:.2f}\n({control[row, column]:.2f})"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=ink)
    for layer, of_layer in of.maps.items():
        place = of.table.target_layers.index(layer), of.table.source_layers.index(of_layer.source_layer)
        corner = place[0] - 0.45, place[1] - 0.45
        axes.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=colours.ink, linewidth=1.6))
    axes.set_title(
        "Held-out R² (control); outlined: the source of each target layer",
        loc="left",
        fontsize=10,
        color=colours.ink,
    )
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04, aspect=14)
    bar.ax.tick_params(colors=colours.ink, labelsize=8)
    bar.outline.set_edgecolor(colours.faint)
    return picture(figure, path)
