"""Pictures as PNG: experts on a layer × expert map, rates with intervals, an effect among random ones.

Colour means the same everywhere: blue is the positive side, orange the negative one. Nothing is told by
colour alone.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from steersman.evaluation.statistics import RandomControl, Rate
from steersman.ties import COMPUTED, ranks

Theme = Literal["light", "dark"]

CELL_INCHES = 0.34
WIDEST_INCHES = 16.0
WIDEST_WITH_LINES = 64
"""Experts up to which the cells are big enough to bear lines between them."""
DOTS_PER_INCH = 160


class Contrast(Protocol):
    """What a map needs of a `RoutingContrast`."""

    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def risk_difference(self) -> NDArray[np.float64]: ...


class Plan(Protocol):
    """What a map needs of a `Steering`."""

    @property
    def strengths(self) -> Mapping[int, Mapping[int, float]]: ...


@dataclass(frozen=True)
class Palette:
    """The colours of one theme."""

    ink: str
    faint: str
    paper: str
    missing: str
    positive: str
    negative: str
    neutral: str
    middle: str


PALETTES = {
    "light": Palette("#1b1f24", "#d5dae0", "#ffffff", "#e3e6ea", "#1264b3", "#c2540a", "#6b7480", "#f6f7f8"),
    "dark": Palette("#e8ebef", "#3a424c", "#161b22", "#2a3038", "#6cb2f5", "#f0955a", "#9aa4b0", "#1d232b"),
}


@dataclass(frozen=True)
class RateRow:
    """One row of a rates picture: an arm, its share on the positive side, and where it was steered to."""

    label: str
    rate: Rate
    side: Literal["positive", "negative", "neutral"] = "neutral"


@dataclass(frozen=True)
class Whisker:
    """One row of numbers with intervals: `note` is what stands beside it; None where there is no interval."""

    label: str
    value: float
    interval: tuple[float, float] | None
    note: str
    side: Literal["positive", "negative", "neutral"] = "neutral"


def heatmap(
    contrast: Contrast,
    steering: Plan | None,
    path: str | Path | None = None,
    *,
    theme: Theme = "light",
    measure: str = "risk difference",
    ranked: int = 0,
) -> bytes:
    """The risk difference of every expert, layers down and experts across; planned experts outlined.

    `measure` names what the numbers are where they are another measure of experts; the `ranked` largest (by
    size) bear their rank.

    Activated experts have a solid outline and an upward triangle, deactivated ones a dashed outline and a
    downward one. Cells without a number (a layer with fewer experts) are grey and hatched. Returns the PNG,
    and writes it where a path is given.
    """
    colours = PALETTES[theme]
    difference = np.asarray(contrast.risk_difference, dtype=np.float64)
    layers, experts = difference.shape
    cell = min(CELL_INCHES, WIDEST_INCHES / experts)
    height = max(layers * max(cell, 0.16), 1.2)
    figure, axes = canvas(max(experts * cell, 4.0) + 2.0, height + 1.5, colours)
    limit = float(np.nanmax(np.abs(difference))) if np.isfinite(difference).any() else 0.0
    limit = limit or 1.0
    axes.patch.set(
        facecolor=colours.missing, hatch="////", edgecolor=colours.neutral
    )  # seen where cells are missing
    image = axes.pcolormesh(
        np.arange(experts + 1) - 0.5,
        np.arange(layers + 1) - 0.5,
        np.ma.masked_invalid(difference),
        cmap=diverging(colours),
        vmin=-limit,
        vmax=limit,
        edgecolors=colours.paper if experts <= WIDEST_WITH_LINES else "none",
        linewidth=1,
    )
    axes.set_ylim(layers - 0.5, -0.5)
    _layer_labels(axes, list(contrast.layers))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(experts, 17)))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    marked = _outline(axes, contrast, steering, colours, cell) if steering is not None else (0, 0)
    _ranks(axes, difference, ranked, colours, cell)
    title = _map_title(*marked) if steering is not None else measure.capitalize()
    axes.set_title(title, loc="left", fontsize=10, color=colours.ink)
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04, aspect=14)
    bar.set_label(f"negative ←  {measure}  → positive", color=colours.ink, fontsize=8)
    bar.ax.tick_params(colors=colours.ink, labelsize=8)
    bar.outline.set_edgecolor(colours.faint)
    return picture(figure, path)


def rates(rows: Sequence[RateRow], path: str | Path | None = None, *, theme: Theme = "light") -> bytes:
    """Share on the positive side by arm, each a point with its Wilson interval and its number."""
    return whiskers([_of_rate(row) for row in rows], path, theme=theme, share=True)


def narrow_rates(rows: Sequence[RateRow], path: str | Path | None = None, *, theme: Theme = "light") -> bytes:
    """The same for a phone's width: what each row is, and its number, stand above its interval."""
    colours = PALETTES[theme]
    figure, axes = canvas(3.5, 0.4 + 0.44 * len(rows), colours)
    shades = {"positive": colours.positive, "negative": colours.negative, "neutral": colours.neutral}
    markers = {"positive": ">", "negative": "<", "neutral": "o"}
    for place, row in enumerate(rows):
        colour, found = shades[row.side], _of_rate(row)
        axes.plot([row.rate.low, row.rate.high], [place, place], color=colour, linewidth=3, alpha=0.45)
        mark = markers[row.side]
        axes.plot(row.rate.rate, place, mark, color=colour, markersize=8, markeredgecolor=colours.paper)
        for x, side, text in ((0.0, "left", row.label), (1.0, "right", found.note)):
            axes.annotate(
                text,
                (x, place - 0.3),
                ha=side,
                va="bottom",
                color=colours.ink,
                fontsize=9,
                annotation_clip=False,
            )
    axes.set_ylim(len(rows) - 0.7, -0.85)
    axes.set_xlim(-0.015, 1.015)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks([])
    axes.grid(axis="x", color=colours.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return picture(figure, path)


def _of_rate(row: RateRow) -> Whisker:
    found = row.rate
    note = f"{100 * found.rate:.0f} %  [{100 * found.low:.0f}, {100 * found.high:.0f}]"
    return Whisker(row.label, found.rate, (found.low, found.high), note, row.side)


def whiskers(
    rows: Sequence[Whisker],
    path: str | Path | None = None,
    *,
    theme: Theme = "light",
    share: bool = False,
    title: str = "",
) -> bytes:
    """Numbers with their intervals, one below the other on one axis; 0 to 100 % where they are shares."""
    colours = PALETTES[theme]
    figure, axes = canvas(7.6, 0.9 + 0.42 * len(rows), colours)
    shades = {"positive": colours.positive, "negative": colours.negative, "neutral": colours.neutral}
    markers = {"positive": ">", "negative": "<", "neutral": "o"}
    for place, row in enumerate(rows):
        colour = shades[row.side]
        if row.interval is not None:
            axes.plot(row.interval, [place, place], color=colour, linewidth=3, alpha=0.45)
        axes.plot(
            row.value, place, markers[row.side], color=colour, markersize=9, markeredgecolor=colours.paper
        )
        axes.annotate(
            row.note,
            (1.03 if share else 1.02, place),
            xycoords="data" if share else ("axes fraction", "data"),
            va="center",
            annotation_clip=False,
            color=colours.ink,
            fontsize=9,
        )
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if share:
        axes.set_xlim(-0.015, 1.015)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(title)
    axes.grid(axis="x", color=colours.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return picture(figure, path)


def random_draws(
    control: RandomControl,
    path: str | Path | None = None,
    *,
    theme: Theme = "light",
    name: str = "the plan",
    measure: str = "effect D in nats",
    what: str = "random plans of the same shape",
) -> bytes:
    """Each drawn plan's effect as one dot, stacked where they meet; the plan's own as a marked line."""
    colours = PALETTES[theme]
    draws = np.asarray(control.draws)
    low, high = min(draws.min(), control.observed, 0.0), max(draws.max(), control.observed, 0.0)
    margin = 0.06 * ((high - low) or 1.0)
    places, heights = _stack(draws, low - margin, high + margin, columns=60)
    tallest = max(int(heights.max()) + 1, 4)
    figure, axes = canvas(7.6, 1.5 + 0.11 * tallest, colours)
    axes.plot(places, heights + 0.5, "o", color=colours.neutral, markersize=5.5, markeredgewidth=0)
    axes.axvline(0, color=colours.faint, linewidth=1, zorder=0)
    axes.axvline(control.observed, color=colours.positive, linewidth=2.5)
    right = control.observed > (low + high) / 2
    axes.annotate(
        f"{name}: {control.observed:+.2f}",
        (control.observed, tallest * 1.12),
        xytext=(-6 if right else 6, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        va="center",
        color=colours.positive,
        fontweight="bold",
        fontsize=9.5,
    )
    axes.set_ylim(0, tallest * 1.25)
    axes.set_xlim(low - margin, high + margin)
    axes.set_yticks([])
    axes.set_xlabel(f"{measure}; each dot is one of {draws.size} {what}")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return picture(figure, path)


def canvas(width: float, height: float, colours: Palette) -> tuple[Figure, Axes]:
    """An empty figure of so many inches, in a theme's colours."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained", facecolor=colours.paper)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_facecolor(colours.paper)
    axes.tick_params(colors=colours.ink, labelsize=9)
    axes.xaxis.label.set_color(colours.ink)
    axes.yaxis.label.set_color(colours.ink)
    for spine in axes.spines.values():
        spine.set_color(colours.faint)
    return figure, axes


def diverging(colours: Palette) -> Colormap:
    """Orange over the middle to blue, for -1 to 1 scaled to 0 to 1; nothing where there is no number."""
    shades = [colours.negative, colours.middle, colours.positive]
    return LinearSegmentedColormap.from_list("steersman", shades).with_extremes(bad=(0, 0, 0, 0))


def _layer_labels(axes: Axes, layers: Sequence[int]) -> None:
    step = math.ceil(len(layers) / 24)
    rows = list(range(0, len(layers), step))
    axes.set_yticks(rows, [str(layers[row]) for row in rows])


def _outline(
    axes: Axes, contrast: Contrast, steering: Plan, colours: Palette, cell: float
) -> tuple[int, int]:
    """Mark the planned experts; returns how many are activated and deactivated."""
    rows = {layer: row for row, layer in enumerate(contrast.layers)}
    counts = [0, 0]
    size = max(4.0, 15 * cell)
    for layer, experts in steering.strengths.items():
        for expert, strength in experts.items():
            if strength == 0 or layer not in rows:
                continue
            up = strength > 0
            counts[0 if up else 1] += 1
            axes.add_patch(
                Rectangle(
                    (expert - 0.44, rows[layer] - 0.44),
                    0.88,
                    0.88,
                    fill=False,
                    edgecolor=colours.ink,
                    linewidth=1.6,
                    linestyle="-" if up else (0, (2, 1.4)),
                )
            )
            axes.plot(
                expert,
                rows[layer],
                marker="^" if up else "v",
                markersize=size,
                color=colours.ink,
                markeredgecolor=colours.paper,
                markeredgewidth=0.7,
            )
    return counts[0], counts[1]


def _ranks(axes: Axes, values: NDArray[np.float64], count: int, colours: Palette, cell: float) -> None:
    """Number the cells with the largest values, in their upper left corners."""
    order = np.argsort(ranks(np.abs(values).flatten(), COMPUTED), kind="stable")  # nan comes last
    for rank, place in enumerate(order[: min(count, int(np.isfinite(values).sum()))], 1):
        row, column = np.unravel_index(place, values.shape)
        axes.annotate(
            str(rank),
            (float(column) - 0.42, float(row) - 0.42),
            ha="left",
            va="top",
            color=colours.ink,
            fontsize=max(3.5, 22 * cell),
            fontweight="bold",
            path_effects=[withStroke(linewidth=1.6, foreground=colours.paper)],
        )


def _map_title(activated: int, deactivated: int) -> str:
    return f"▲ solid: activated ({activated})     ▼ dashed: deactivated ({deactivated})"


def _stack(
    values: NDArray[np.float64], low: float, high: float, columns: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A dot plot: values moved to the middle of their column, the first at height 0, the next above it."""
    width = (high - low) / columns
    column = np.clip(((values - low) / width).astype(int), 0, columns - 1)
    seen: dict[int, int] = {}
    heights = np.zeros(values.size)
    for index in np.argsort(values, kind="stable"):
        place = int(column[index])
        heights[index] = seen.get(place, 0)
        seen[place] = seen.get(place, 0) + 1
    return low + (column + 0.5) * width, heights


def picture(figure: Figure, path: str | Path | None) -> bytes:
    """A figure as PNG, or as SVG where the path says so; written there, if there is one. The same bytes every
    time, from any version of matplotlib.
    """
    kind = "svg" if path is not None and Path(path).suffix == ".svg" else "png"
    unnamed: dict[str, Any] = {"Software": None} if kind == "png" else {"Creator": None, "Date": None}
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "steersman"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in letters the font lacks
        figure.savefig(buffer, format=kind, facecolor=figure.get_facecolor(), metadata=unnamed)
    content = buffer.getvalue()
    if path is not None:
        Path(path).write_bytes(content)
    return content
