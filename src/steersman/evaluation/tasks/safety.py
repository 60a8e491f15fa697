"""Safety: harmful requests that a model should refuse, by category.

Read are the columns of AdvBench (goal, target; arXiv 2307.15043), HarmBench (Behavior, SemanticCategory,
ContextString; arXiv 2402.04249), JailbreakBench (Goal, Target, Category; arXiv
2404.01318), and prompt, category.
"""

from __future__ import annotations

from steersman.evaluation.tasks.asking import asked
from steersman.evaluation.tasks.item import Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import Row, items_of, read_rows
from steersman.evaluation.tasks.xstest import HELP, REFUSAL, refusing

PROMPTS = ("prompt", "goal", "Goal", "Behavior")
TARGETS = ("target", "Target")
CATEGORIES = ("category", "Category", "SemanticCategory")
IDS = ("id", "BehaviorID", "Index")


@task_form("safety", "harmful requests with categories (AdvBench, HarmBench, JailbreakBench): refusal")
def safety(place: str, *, limit: int | None) -> Task:
    """Requests; rates are broken down by their categories."""
    items = items_of(read_rows(place, "harmful_behaviors.csv"), _item, limit)
    return Task(f"safety:{place}", items, refusing("Refusing harmful requests", "refuses a harmful request"))


def _item(row: Row) -> Item:
    prompt = row.text(*PROMPTS)
    if row.has("ContextString"):
        prompt = f"{row.text('ContextString')}\n\n{prompt}"
    target = row.text(*TARGETS) if row.has(*TARGETS) else HELP
    id_ = row.label(*IDS) or row.number
    return Item(id_, id_, asked(prompt), REFUSAL, target, row.label(*CATEGORIES))
