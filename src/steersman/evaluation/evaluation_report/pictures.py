"""The pictures of an evaluation's report: arms, strengths, random plans, maps of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from steersman.evaluation import figures
from steersman.evaluation.concluded import family_of
from steersman.evaluation.evaluation_report.numbers import estimate, interval, is_rate, measured
from steersman.evaluation.evaluation_report.place import Place, plain
from steersman.evaluation.evaluation_report.tables import arm_names, is_preference
from steersman.evaluation.figures import PALETTES, Theme, Whisker
from steersman.evaluation.report import both_themes
from steersman.evaluation.statistics import RandomControl

LONGEST = 44
"""Letters of a name in a picture."""
RANKED = 5

_SIDES: dict[str, Literal["positive", "negative", "neutral"]] = {
    "steered": "positive",
    "prompt+steered": "positive",
    "reversed": "negative",
}


@dataclass(frozen=True)
class ExpertMap:
    """A number for each expert, float64 [layers, experts], as maps are drawn of."""

    layers: Sequence[int]
    risk_difference: NDArray[np.float64]


@dataclass(frozen=True)
class Outlined:
    """Experts to outline."""

    strengths: Mapping[int, Mapping[int, float]]


def arms_picture(result: Place, task: Place) -> Markup | None:
    """What counts under every arm, as dots with whiskers."""
    metric = task.value["metrics"][0]
    rows, alt = [], []
    kinds = {arm["name"]: arm["kind"] for arm in result.value["arms"]}
    for arm in arm_names(result):
        found = task["results"].get(arm)
        if not found or not found.get(metric["name"]):
            continue
        row = _whisker(arm, found[metric["name"]], _SIDES.get(kinds[arm], "neutral"))
        rows.append(row)
        alt.append(f"{arm} {row.note}")
    if not rows:
        return None
    title = "" if is_rate(metric) else written(metric["title"])
    return both_themes(
        lambda theme: figures.whiskers(rows, theme=theme, share=is_rate(metric), title=title),
        f"“{metric['title']}”, with 95% intervals: {'; '.join(alt)}.",
    )


def _whisker(arm: str, found: Place, side: Literal["positive", "negative", "neutral"]) -> Whisker:
    limits = interval(found)
    note = plain(estimate(found)) + (f"  [{plain(limits)}]" if limits else "")
    value = found.value["rate" if "rate" in found.value else "mean"]
    whole = (found.value["low"], found.value["high"]) if limits else None
    return Whisker(written(arm), value, whole, note, side)


def written(text: str) -> str:
    """A name as a picture can hold it: short, on one line, its dollar signs no mathematics."""
    line = " ".join(text.split())
    short = line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
    return short.replace("$", r"\$")


def random_pictures(task: Place) -> list[tuple[str, Markup]]:
    """For each plan and family: the drawn plans' effects and its own, under a title."""
    drawn = task.value["random"] or ()
    return [(_beside(of).capitalize(), _random_picture(of)) for of in drawn]


def _beside(random: Mapping[str, Any]) -> str:
    return f"{family_of(random)} beside {random['steering']}"


def _random_picture(random: Mapping[str, Any]) -> Markup:
    control = RandomControl(
        random["observed"],
        tuple(random["draws"]),
        random["at_least"],
        random["p"],
        random["mean"],
        random["standard_deviation"] or 0.0,
    )
    unit = "effect D in nats" if is_preference(random) else "effect"
    alt = (
        f"Effects of {len(control.draws)} {family_of(random)}, from {min(control.draws):+.2f} to "
        f"{max(control.draws):+.2f}, and of {random['steering']}, {control.observed:+.2f}."
    )
    name = written(random["steering"])
    what = family_of(random)
    return both_themes(
        lambda theme: figures.random_draws(control, theme=theme, name=name, measure=unit, what=what), alt
    )


def doses_picture(task: Place) -> Markup | None:
    """What counts by strength, a line for each plan."""
    if not task["dose_response"]:
        return None
    metric = task.value["metrics"][0]
    lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for dose in task.value["dose_response"]:
        found = task.value["results"].get(dose["arm"], {}).get(metric["name"])
        if found is not None:
            lines.setdefault(dose["steering"], []).append((dose["strength"], found))
    base = task.value["results"]["base"].get(metric["name"])
    for points in lines.values():
        if base is not None and all(at != 0 for at, _ in points):
            points.append((0.0, base))
        points.sort(key=lambda point: point[0])
    if not lines:
        return None
    name = "rate" if is_rate(metric) else "mean"
    alt = "; ".join(
        f"{plan}: " + ", ".join(f"{measured(found[name])} at {at:g}" for at, found in points)
        for plan, points in lines.items()
    )
    return both_themes(
        lambda theme: _doses(lines, name, metric["title"], theme), f"“{metric['title']}” by strength. {alt}."
    )


def _doses(
    lines: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]], name: str, title: str, theme: Theme
) -> bytes:
    colours = PALETTES[theme]
    figure, axes = figures.canvas(7.6, 3.2, colours)
    shades = (colours.positive, colours.negative, colours.neutral, colours.ink)
    for place, (plan, points) in enumerate(lines.items()):
        colour, strengths = shades[place % len(shades)], [at for at, _ in points]
        bounded = [(at, found) for at, found in points if found["low"] is not None]
        axes.fill_between(
            [at for at, _ in bounded],
            [found["low"] for _, found in bounded],
            [found["high"] for _, found in bounded],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
        marker, label = "osv^D"[place % 5], written(plan)
        axes.plot(strengths, [f[name] for _, f in points], marker=marker, color=colour, label=label)
    axes.axvline(0, color=colours.faint, linewidth=1, zorder=0)
    if name == "rate":
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("strength; 0 is the base")
    axes.set_ylabel(written(title))
    axes.grid(axis="y", color=colours.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=colours.ink, fontsize=9)
    return figures.picture(figure, None)


def expert_map(
    layers: Sequence[int],
    values: Sequence[Sequence[float | None]],
    plan: Mapping[int, Mapping[int, float]],
    measure: str,
) -> Markup:
    """One measure of every expert, the plan outlined, the largest ranked."""
    contrast = ExpertMap(layers, np.array(values, dtype=np.float64))
    steering = Outlined(plan) if plan else None
    return both_themes(
        lambda theme: figures.heatmap(contrast, steering, theme=theme, measure=measure, ranked=RANKED),
        f"Map of {len(layers)} layers by {contrast.risk_difference.shape[1]} experts, coloured by {measure}; "
        f"the {RANKED} largest are numbered, the plan's experts outlined. The table below has the numbers.",
    )
