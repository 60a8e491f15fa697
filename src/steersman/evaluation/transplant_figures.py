"""Pictures of a transplantation: shares over its strength, and its share among those of the controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from steersman.evaluation.figures import PALETTES, RateRow, Theme, canvas, picture
from steersman.evaluation.transplant_study import DoseChoice
from steersman.evaluation.vector_controls import DrawnControl

_SPREAD = 0.3
"""Half the height over which the dots of a control are spread."""


def sweep(
    choice: DoseChoice,
    labels: tuple[str, str, str],
    path: str | Path | None = None,
    *,
    theme: Theme = "light",
) -> bytes:
    """Shares by dose on development items, with their intervals; the chosen dose is marked.

    Args:
        choice: The doses tried and the chosen one.
        labels: Of the behaviour's share, of ordinary items answered right, and of those refused.
        path: Where the PNG is written too.
        theme: Light or dark.
    """
    colours = PALETTES[theme]
    figure, axes = canvas(7.6, 3.4, colours)
    doses = [point.dose for point in choice.sweep]
    lines: tuple[tuple[str, str, str, str], ...] = (
        ("positive", labels[0], colours.positive, "o"),
        ("ordinary_right", labels[1], colours.neutral, "s"),
        ("ordinary_refused", labels[2], colours.negative, "v"),
    )
    for name, label, colour, marker in lines:
        rates = [getattr(point, name) for point in choice.sweep]
        axes.fill_between(
            doses, [r.low for r in rates], [r.high for r in rates], color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(
            doses,
            [r.rate for r in rates],
            marker=marker,
            color=colour,
            label=label,
            linewidth=2,
            markersize=5,
        )
    axes.axvline(choice.dose, color=colours.ink, linewidth=1.2, linestyle=(0, (3, 2)))
    axes.annotate(
        f"chosen: {choice.dose:g}",
        (choice.dose, 1.06),
        ha="center",
        va="bottom",
        color=colours.ink,
        fontsize=9,
        annotation_clip=False,
    )
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("dose: length of what is added, as a share of a state's median norm")
    axes.grid(axis="y", color=colours.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        frameon=False, labelcolor=colours.ink, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return picture(figure, path)


def arms_and_draws(
    rows: Sequence[RateRow],
    controls: Sequence[tuple[str, DrawnControl]],
    path: str | Path | None = None,
    *,
    theme: Theme = "light",
) -> bytes:
    """Share on the positive side: of arms, points with intervals; of controls, a dot a drawn vector."""
    colours = PALETTES[theme]
    count = len(rows) + len(controls)
    figure, axes = canvas(7.6, 0.9 + 0.46 * count, colours)
    shades = {"positive": colours.positive, "negative": colours.negative, "neutral": colours.neutral}
    for place, row in enumerate(rows):
        colour, rate = shades[row.side], row.rate
        axes.plot([rate.low, rate.high], [place, place], color=colour, linewidth=3, alpha=0.45)
        axes.plot(rate.rate, place, "o", color=colour, markersize=9, markeredgecolor=colours.paper)
        _note(axes, place, f"{rate.rate:.0%}  [{rate.low:.0%}, {rate.high:.0%}]", colours.ink)
    for place, (_, drawn) in enumerate(controls, len(rows)):
        draws = np.asarray(drawn.control.draws)
        heights = place + np.linspace(-_SPREAD, _SPREAD, len(draws))
        axes.plot(draws, heights, ".", color=colours.neutral, markersize=5, alpha=0.8)
        axes.plot([drawn.control.mean] * 2, [place - 0.38, place + 0.38], color=colours.ink, linewidth=1.5)
        _note(axes, place, f"mean {drawn.control.mean:.0%}, most {draws.max():.0%}", colours.ink)
    axes.set_yticks(range(count), [row.label for row in rows] + [label for label, _ in controls])
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_xlim(-0.015, 1.015)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="x", color=colours.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return picture(figure, path)


def _note(axes: Any, place: int, text: str, colour: str) -> None:
    axes.annotate(text, (1.03, place), va="center", annotation_clip=False, color=colour, fontsize=9)
