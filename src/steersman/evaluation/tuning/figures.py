"""Pictures of a tuning: effect against cost, and the curve by layer or by number of experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes

from steersman.evaluation.figures import PALETTES, Palette, Theme, canvas, picture
from steersman.evaluation.tuning.candidates import ExpertCandidate, VectorCandidate

if TYPE_CHECKING:
    from steersman.evaluation.tuning.result import Tuning
    from steersman.evaluation.tuning.search import Tried

Points = list[tuple[float, float]]


def effect_and_cost(tuning: Tuning, path: str | Path | None = None, *, theme: Theme = "light") -> bytes:
    """Each candidate by its first cost, the upper end of its bound, and its effect; filled where every cost
    is kept, a cross where not; the bound as a line, the chosen one named. Returns the PNG.
    """
    colours = PALETTES[theme]
    figure, axes = canvas(8.6, 4.2, colours)
    bound = tuning.made["bounds"][0]
    groups: dict[bool, Points] = {True: [], False: []}
    for one in tuning.tried:
        cost = (one.costs or {}).get(bound["cost"])
        if cost is not None and cost.upper == cost.upper:
            groups[one.passes].append((cost.upper, one.effect.mean))
    for passes, marker, colour, label in (
        (False, "x", colours.neutral, "a cost is not kept, or no effect"),
        (True, "o", colours.positive, "every cost is kept"),
    ):
        if groups[passes]:
            x, y = zip(*groups[passes], strict=True)
            axes.scatter(x, y, s=26, marker=marker, color=colour, label=label)
    axes.axvline(bound["most"], color=colours.negative, linestyle="--", linewidth=1.2)
    axes.axhline(0, color=colours.faint, linewidth=1)
    axes.set_xscale("symlog", linthresh=max(bound["most"], 1e-3))
    cost = (tuning.chosen.costs or {}).get(bound["cost"]) if tuning.chosen is not None else None
    if tuning.chosen is not None and cost is not None:
        axes.scatter(
            [cost.upper],
            [tuning.chosen.effect.mean],
            s=130,
            facecolors="none",
            edgecolors=colours.ink,
            linewidths=1.6,
            label="chosen",
        )
        axes.set_title(
            f"chosen: {tuning.chosen.candidate.in_words()}", loc="left", fontsize=10, color=colours.ink
        )
    axes.set_xlabel(f"{bound['cost']}: upper end of its one-sided 95 % bound; dashed: the most allowed")
    axes.set_ylabel(f"change of {tuning.made['effect']}", fontsize=8)
    _legend(axes, colours)
    return picture(figure, path)


def curve(tuning: Tuning, path: str | Path | None = None, *, theme: Theme = "light") -> bytes:
    """The effect by layer, a line a dose; or by number of experts, a line a kind, with intervals; filled
    where every cost is kept. Returns the PNG.
    """
    colours = PALETTES[theme]
    figure, axes = canvas(8.6, 4.2, colours)
    lines: dict[str, list[tuple[float, Tried]]] = {}
    for one in tuning.tried:
        place = _place(one)
        if place is not None:
            lines.setdefault(place[0], []).append((place[1], one))
    shades = ["#1264b3", "#c2540a", "#2a8c5b", "#7a4fb5", "#b3123f", "#6b7480"]
    for number, (name, points) in enumerate(sorted(lines.items())):
        points.sort(key=lambda entry: entry[0])
        x = [where for where, _ in points]
        y = [one.effect.mean for _, one in points]
        colour = shades[number % len(shades)]
        axes.plot(x, y, color=colour, linewidth=1.2, label=name, alpha=0.8)
        for where, one in points:
            face = colour if one.passes else colours.paper
            axes.plot(where, one.effect.mean, "o", markersize=5, markerfacecolor=face, color=colour)
            if one.effect.low == one.effect.low:
                axes.plot([where, where], [one.effect.low, one.effect.high], color=colour, alpha=0.25)
    axes.axhline(0, color=colours.faint, linewidth=1)
    axes.set_xlabel(
        "experts" if any(isinstance(one.candidate, ExpertCandidate) for one in tuning.tried) else "layer"
    )
    axes.set_ylabel(f"change of {tuning.made['effect']}", fontsize=8)
    if lines:
        _legend(axes, colours, "filled: every cost is kept")
    return picture(figure, path)


def _legend(axes: Axes, colours: Palette, title: str | None = None) -> None:
    """Beside the axes, where it hides nothing."""
    legend = axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        fontsize=8,
        frameon=False,
        labelcolor=colours.ink,
        title=title,
        title_fontsize=8,
    )
    legend.get_title().set_color(colours.ink)


def _place(one: Tried) -> tuple[str, float] | None:
    """The line and place of a candidate; None for windows of layers, and what the fine grid added alone."""
    candidate = one.candidate
    if isinstance(candidate, ExpertCandidate):
        return f"{candidate.kind}, {candidate.scope}", float(candidate.count)
    if isinstance(candidate, VectorCandidate) and len(candidate.layers) == 1 and one.stage == "coarse":
        return f"{candidate.concept} dose {candidate.dose:g}, {candidate.scope}".strip(), float(
            candidate.layers[0]
        )
    return None
