"""The tables of an evaluation's report, as data: what HTML and Markdown both write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steersman.certainty import CANNOT_TELL, MARGIN, NOT_SHOWN, SIGNIFICANT
from steersman.evaluation.concluded import family_of, margin_of, verdict_of
from steersman.evaluation.evaluation_report.numbers import (
    Pieces,
    adjusted_p,
    bootstrap,
    change,
    detectable,
    difference,
    estimate,
    in_points,
    interval,
    is_clear_alone,
    measured,
    p_piece,
)
from steersman.evaluation.evaluation_report.place import MISSING, Number, Place
from steersman.evaluation.result import PREFERENCE
from steersman.showing import count_of

COLLECTIVE = ("cell", "strength")
"""Kinds of arms that have a section of their own: a factorial's, and a dose–response's."""

UNTOLD = "how sure that is cannot be told"
UNCLEAR = "it would count alone, but not as one of so many arms"


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, and in smaller type below it."""

    main: Pieces
    detail: Pieces = ()

    @property
    def is_number(self) -> bool:
        """Whether it is a number rather than words, and stays on one line."""
        return isinstance(self.main[0], Number)


@dataclass(frozen=True)
class Table:
    """A table: the first column heads its rows."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def text(*parts: str) -> Cell:
    """A cell of words."""
    return Cell(parts)


def figure(found: Place) -> Cell:
    """A rate or mean with its interval."""
    return Cell(estimate(found), interval(found))


def arm_names(result: Place, *, own_section: bool = False) -> list[str]:
    """The arms that are compared one by one; with `own_section` all of them."""
    return [arm["name"] for arm in result.value["arms"] if own_section or arm["kind"] not in COLLECTIVE]


def arms_by(result: Place, *kinds: str) -> list[str]:
    """The names of the arms of these kinds."""
    return [arm["name"] for arm in result.value["arms"] if arm["kind"] in kinds]


def results_table(result: Place, task: Place) -> Table:
    """Every metric under every arm."""
    metrics = task.value["metrics"]
    rows = tuple(
        (arm, tuple(figure(task["results"][arm].get(metric["name"])) for metric in metrics))
        for arm in arm_names(result)
        if arm in task.value["results"]
    )
    groups = task.value["groups"]
    related = "" if groups == task.value["items"] else f" in {groups} groups, which the intervals allow for"
    caption = f"{count_of(task.value['items'], 'item')}{related}; 95% intervals below each number."
    return Table(caption, ("arm", *(metric["title"] for metric in metrics)), rows)


def differences_table(result: Place, task: Place) -> Table:
    """Each arm against the base, on the same items."""
    metrics = [metric for metric in task.value["metrics"] if metric["name"] not in ("negative", "neither")]
    rows = []
    for metric in metrics:
        for arm in arm_names(result):
            if arm not in task.value["differences"]:
                continue
            found = task["differences"][arm].get(metric["name"])
            named = () if len(metrics) == 1 else (text(metric["title"]),)
            rows.append((arm, (*named, *_difference_cells(task, metric["name"], found))))
    columns = (
        "arm",
        *(() if len(metrics) == 1 else ("what",)),
        "change",
        "bootstrap",
        "items gained / lost",
        "p",
        "p, Holm",
    )
    return Table("Change against the base, item by item.", (*columns, "could have seen"), tuple(rows))


def _difference_cells(task: Place, metric: str, found: Place) -> tuple[Cell, ...]:
    gained = text(MISSING)
    if found and "only_second" in found.value:
        gained = Cell((found["only_second"].number(str), " / ", found["only_first"].number(str)))
    return (
        Cell(difference(found), interval(found)),
        Cell(bootstrap(found)),
        gained,
        Cell((p_piece(found.get("p")),)),
        Cell((p_piece(found.get("p_holm")),)),
        Cell(detectable(task, metric, found) or (MISSING,)),
    )


def side_effects_table(result: Place) -> Table:
    """What else each plan changes: every side task under every steered arm."""
    rows = []
    for task in result["tasks"]:
        if task.value["role"] != "side":
            continue
        metric = task.value["metrics"][0]["name"]
        for arm in arms_by(result, "steered", "reversed", "prompt", "prompt+steered", "model"):
            if arm in task.value["differences"]:
                rows.append((task.value["title"], _side_cells(task, metric, arm)))
    columns = ("side task", "arm", "what", "base", "with it", "change", "p, Holm", "in words")
    return Table("Changes that were not asked for, against the base on the same items.", columns, tuple(rows))


def _side_cells(task: Place, metric: str, arm: str) -> tuple[Cell, ...]:
    found = task["differences"][arm].get(metric)
    return (
        text(arm),
        text(task.value["metrics"][0]["title"]),
        figure(task["results"]["base"].get(metric)),
        figure(task["results"][arm].get(metric)),
        Cell(difference(found), interval(found)),
        Cell((p_piece(adjusted_p(found)),)) if found else text(MISSING),
        Cell(in_words(task, metric, found)),
    )


def in_words(task: Place, metric: str, found: Place) -> Pieces:
    """What a side task's difference says: its verdict, and better or worse; or why nobody can tell."""
    if not found:
        return ("cannot tell: not measured under this arm",)
    verdict = verdict_of(found.value)
    if verdict == NOT_SHOWN:
        return (f"not shown: {within_margin(found)}",)
    if verdict == CANNOT_TELL:
        return ("cannot tell: ", *why_untold(task, metric, found))
    up = found.value["difference"] > 0
    better = task.value["metrics"][0]["better"]
    if better is None:
        return (f"shown: {'higher' if up else 'lower'}",)
    return ("shown: better" if up == (better == "higher") else "shown: worse",)


def within_margin(found: Place) -> str:
    """Where a difference lies that counts as none."""
    margin = margin_of(found.value) or 0.0
    return f"inside ±{100 * margin:g} points"


def why_untold(task: Place, metric: str, found: Place) -> Pieces:
    """Why nobody can tell whether there is a difference, and how large a one so many items show."""
    if not interval(found) or adjusted_p(found).value is None:
        return (UNTOLD,)
    if found.value["low"] > 0 or found.value["high"] < 0:
        return (UNCLEAR if is_clear_alone(found) else f"its p is above {SIGNIFICANT:g}",)
    margin = margin_of(found.value)
    reach = "" if margin is None else f" and reaches beyond ±{100 * margin:g} points"
    could = detectable(task, metric, found)
    return (f"the interval holds 0{reach}", *((", so many items show ", *could) if could else ()))


def kinds_table(result: Place, task: Place) -> Table | None:
    """The first metric by category; None where there are no categories."""
    if not task["kinds"]:
        return None
    metric = task.value["metrics"][0]
    arms = [arm for arm in arm_names(result) if arm in task.value["results"]]
    rows = []
    for kind in task.value["kinds"]:
        found = task["kinds"][kind]
        cells = (figure(found["results"].get(arm).get(metric["name"])) for arm in arms)
        rows.append((kind or "(none)", (Cell((found["items"].number(str),)), *cells)))
    caption = f"“{metric['title']}” by category of item. Small categories have wide intervals."
    return Table(caption, ("category", "items", *arms), tuple(rows))


def doses_table(task: Place) -> Table | None:
    """The first metric by strength."""
    if not task["dose_response"]:
        return None
    metric = task.value["metrics"][0]
    rows = [("base", (text("0"), figure(task["results"]["base"].get(metric["name"]))))]
    rows += [
        (
            dose.value["steering"],
            (
                Cell((dose["strength"].number(strength),)),
                figure(task["results"][dose.value["arm"]].get(metric["name"])),
            ),
        )
        for dose in task["dose_response"]
        if dose.value["arm"] in task.value["results"]
    ]
    return Table(f"“{metric['title']}” by strength.", ("plan", "strength", metric["title"]), tuple(rows))


def strength(value: float) -> str:
    """A dial."""
    return f"{value:g}".replace("-", "−")


def factorial_tables(task: Place) -> Sequence[Table]:
    """Every combination of attack, defence and plan, and how a plan's effect depends on the others."""
    factorial = task["factorial"]
    if not factorial:
        return ()
    metric = task.value["metrics"][0]
    plans: list[str | None] = [None, *factorial.value["steerings"]]
    arms: dict[tuple[str | None, str | None], dict[str | None, str]] = {}
    for cell in factorial.value["cells"]:
        arms.setdefault((cell["attack"], cell["defence"]), {})[cell["steering"]] = cell["arm"]
    rows = tuple(
        (
            attack or "none",
            (text(defence or "none"), *(_cell(task, metric["name"], of.get(p)) for p in plans)),
        )
        for (attack, defence), of in arms.items()
    )
    columns = ("attack", "defence", *(plan or "no plan" for plan in plans))
    cells = Table(f"“{metric['title']}” by attack, defence and plan.", columns, rows)
    return (cells, _interactions(factorial)) if factorial["interactions"] else (cells,)


def _cell(task: Place, metric: str, arm: str | None) -> Cell:
    known = arm is not None and arm in task.value["results"]
    return figure(task["results"][str(arm)].get(metric)) if known else text(MISSING)


def _interactions(factorial: Place) -> Table:
    rows = tuple(
        (
            row.value["steering"],
            (
                text(row.value["attack"] or "none"),
                text(row.value["defence"] or "none"),
                Cell(
                    (row["difference"].number(in_points), " points"),
                    (row["low"].number(in_points), " to ", row["high"].number(in_points)),
                ),
                Cell((p_piece(row.get("p")),)),
                Cell((p_piece(row.get("p_holm")),)),
                text(verdict_of(row.value, margin=MARGIN)),
            ),
        )
        for row in factorial["interactions"]
    )
    caption = "Interactions: how much a plan's effect changes under an attack and a defence (0: not at all)."
    return Table(caption, ("plan", "attack", "defence", "effect changes by", "p", "p, Holm", "verdict"), rows)


def random_table(task: Place) -> Table | None:
    """The drawn controls in numbers, one for each plan and family."""
    if not task["random"]:
        return None
    rows = tuple((random.value["steering"], _random_cells(random)) for random in task["random"])
    first = task["random"][0].value
    measured_by = "the difference in d, in nats" if is_preference(first) else "the difference in what counts"
    on = count_of(first["items"], "item")
    drawn = dict.fromkeys((family_of(of.value), of.value["matched"]) for of in task["random"])
    described = ". ".join(f"{name[0].upper()}{name[1:]}, matched: {how}" for name, how in drawn)
    caption = f"{described}. Effect: {measured_by}, on {on}."
    sides = "one-sided" if any(is_one_sided(random.value) for random in task["random"]) else "two-sided"
    return Table(caption, ("plan", "its effect", "among", "as much", "their mean", f"p, {sides}"), rows)


def is_one_sided(random: Mapping[str, Any]) -> bool:
    """Whether those random plans were counted that do as much the same way: steersman once did, and its files
    say so by the count alone.
    """
    observed, draws = float(random["observed"]), random["draws"]
    either_way = sum(abs(drawn) >= abs(observed) for drawn in draws)
    same_way = sum(drawn >= observed for drawn in draws)
    return bool(random["at_least"] == same_way < either_way)


def is_preference(random: Mapping[str, Any]) -> bool:
    """Whether a random control was measured by the preference between two answers, in nats."""
    return bool(random["measure"] == PREFERENCE)


def _random_cells(random: Place) -> tuple[Cell, ...]:
    spread = random["standard_deviation"].number(measured)
    return (
        Cell((random["observed"].number(change),), (_against(random.value["arms"]),)),
        text(f"{len(random.value['draws'])} {family_of(random.value)}"),
        Cell((random["at_least"].number(str),)),
        Cell((random["mean"].number(change),), ("sd ", spread)),
        Cell((p_piece(random["p"]),)),
    )


def _against(arms: Sequence[str | None]) -> str:
    return f"{arms[0]} against {arms[1] or 'base'}"


def preferences_table(task: Place) -> Table | None:
    """Mean preference between an item's two answers, and what each arm changes of it, item by item."""
    if not task["preferences"]:
        return None
    rows = tuple((arm, _preference_cells(task["preferences"][arm])) for arm in task.value["preferences"])
    caption = (
        "d: log-probability of the first token of the positive answer minus that of the negative one. "
        "Changes are against the base on the same items."
    )
    return Table(caption, ("arm", "mean d, in nats", "change of d", "p, Holm"), rows)


def _preference_cells(found: Place) -> tuple[Cell, ...]:
    moved = found.get("change")
    if not moved:
        return figure(found), text(MISSING), text(MISSING)
    return figure(found), Cell(difference(moved), interval(moved)), Cell((p_piece(moved.get("p_holm")),))


def arms_table(result: Place) -> Table:
    """What each arm is, and on how many tokens its plan in fact acted."""
    rows = []
    for arm in result["arms"]:
        value = arm.value
        prompt = [f"instruction: {value['system']}"] if value["system"] else []
        prompt += [f"template {value['template']['name']}"] if value["template"] else []
        prompt += [f"model {value['model']}"] if value["model"] else []
        receipt = [
            piece
            for site in value["receipt"] or {}
            for piece in (
                "" if site == next(iter(value["receipt"])) else "; ",
                f"{site}: ",
                arm["receipt"][site].number(str),
            )
        ]
        dial = Cell((arm["strength"].number(strength),)) if value["steering"] else text(MISSING)
        cells = (
            text(value["kind"]),
            text(value["steering"] or MISSING),
            dial,
            text("; ".join(prompt) or MISSING),
        )
        rows.append((value["name"], (*cells, Cell(tuple(receipt) or (MISSING,)))))
    columns = ("arm", "kind", "plan", "strength", "prompt or model", "tokens steered, by site")
    return Table("Every arm ran on the same items.", columns, tuple(rows))
