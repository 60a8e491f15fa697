"""The result of an evaluation: figures, items, and the folder they are saved in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.artifacts.folder import new_folder
from steersman.evaluation.measures.measure import Measured
from steersman.evaluation.tasks import Task
from steersman.showing import Shown, Table, first_rows

if TYPE_CHECKING:
    import pandas as pd

PREFERENCE = "log_probability_difference"
"""d = log p(positive) − log p(negative) of the answers' first tokens that differ, in nats."""

EVALUATION, ITEMS = "evaluation.json", "items.jsonl"
FILES = {EVALUATION, ITEMS, "report.html", "report.md", "card.md"}


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """What was measured. `noted` holds what was noted of every item: task → arm → items."""

    _json: Mapping[str, Any]
    noted: Mapping[str, Mapping[str, Sequence[Measured]]] = field(repr=False)
    tasks: Mapping[str, Task] = field(repr=False)
    batches_run: int = 0

    def to_json(self) -> dict[str, Any]:
        """Everything but the single items, as docs/evaluation.md describes it."""
        return dict(self._json)

    def value(self, task: str, arm: str, metric: str | None = None) -> float:
        """A rate or mean; by default of the task's first metric."""
        return _value(self._figure("results", task, arm, metric))

    def difference(self, task: str, arm: str, metric: str | None = None) -> dict[str, Any]:
        """An arm's difference to the base with interval and p-values."""
        found: dict[str, Any] = self._figure("differences", task, arm, metric)
        return found

    def table(self) -> pd.DataFrame:
        """One row for each task, arm and metric: value, interval, and the difference to the base."""
        import pandas as pd

        return pd.DataFrame(list(self._rows()))

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the folder: evaluation.json, items.jsonl and the reports. Raises ArtifactError."""
        from steersman.evaluation.evaluation_report import write_evaluation_report

        with new_folder(folder, force=force, ours=FILES) as place:
            text = json.dumps(self._json, indent=1, ensure_ascii=False, allow_nan=False)
            (place / EVALUATION).write_text(text + "\n", encoding="utf-8")
            with (place / ITEMS).open("w", encoding="utf-8") as stream:
                for line in self._lines():
                    stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            write_evaluation_report(place, self.to_json())

    def _task(self, name: str) -> dict[str, Any]:
        found = [task for task in self._json["tasks"] if task["name"] == name]
        if not found:
            known = ", ".join(task["name"] for task in self._json["tasks"])
            raise KeyError(f"{name!r} was not measured; there are {known}")
        task: dict[str, Any] = found[0]
        return task

    def _figure(self, part: str, task: str, arm: str, metric: str | None) -> Any:
        found = self._task(task)
        return found[part][arm][metric or found["metrics"][0]["name"]]

    def _rows(self) -> Iterator[dict[str, Any]]:
        for task in self._json["tasks"]:
            for arm, figures in task["results"].items():
                for metric in task["metrics"]:
                    figure = figures[metric["name"]]
                    change = task["differences"].get(arm, {}).get(metric["name"]) or {}
                    yield {
                        "task": task["name"],
                        "role": task["role"],
                        "arm": arm,
                        "metric": metric["name"],
                        "title": metric["title"],
                        "value": None if figure is None else _value(figure),
                        "low": None if figure is None else figure["low"],
                        "high": None if figure is None else figure["high"],
                        "difference": change.get("difference"),
                        "difference_low": change.get("low"),
                        "difference_high": change.get("high"),
                        "p_holm": change.get("p_holm"),
                        "verdict": change.get("verdict"),
                    }
            for arm, figure in (task["preferences"] or {}).items():
                change = figure.get("change") or {}
                yield {
                    "task": task["name"],
                    "role": task["role"],
                    "arm": arm,
                    "metric": PREFERENCE,
                    "title": "d: log-odds of the two answers (nats)",
                    "value": figure["mean"],
                    "low": figure["low"],
                    "high": figure["high"],
                    "difference": change.get("difference"),
                    "difference_low": change.get("low"),
                    "difference_high": change.get("high"),
                    "p_holm": change.get("p_holm"),
                    "verdict": None,
                }

    def _lines(self) -> Iterator[dict[str, Any]]:
        for name, arms in self.noted.items():
            for arm, found in arms.items():
                for item, one in zip(self.tasks[name], found, strict=True):
                    yield {
                        "task": name,
                        "arm": arm,
                        "id": item.id,
                        "group": item.group,
                        "kind": item.kind,
                        "prompt": item.content,
                        "positive": item.positive,
                        "negative": item.negative,
                        **({"facts": dict(item.facts)} if item.facts else {}),
                        "text": one.text,
                        "outcome": one.outcome,
                        "scores": {key: number(value) for key, value in one.scores.items()},
                        "why": one.why,
                        **({"more": list(one.more)} if one.more else {}),
                    }

    def in_words(self) -> str:
        """What was measured under which arms."""
        tasks = ", ".join(f"{task['name']} ({'/'.join(task['results'])})" for task in self._json["tasks"])
        return f"{tasks}; {self.batches_run} batches run"

    def as_tables(self) -> list[Table]:
        """Value, interval and difference, by task, arm and metric."""
        return [first_rows(self.table().drop(columns=["role", "title"]))]


def number(value: float) -> float | None:
    """A number for JSON, which knows no NaN and no infinity."""
    return float(value) if math.isfinite(value) else None


def _value(figure: Mapping[str, Any]) -> float:
    return float(figure["rate"] if "rate" in figure else figure["mean"])
