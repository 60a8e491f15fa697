"""Tasks: prompts, and how what a model makes of them is measured; a file a form."""

from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.lab import BEHAVIOURS
from steersman.evaluation.tasks.registry import known_forms, load_task, task_form

__all__ = ["BEHAVIOURS", "Behaviour", "Item", "Task", "known_forms", "load_task", "task_form"]
