"""IFEval: prompts with instructions that a program can check, checked by lm-eval's own checkers.

Zhou et al., arXiv 2311.07911. Rows: key, prompt, instruction_id_list, kwargs.
"""

from __future__ import annotations

from dataclasses import replace

from steersman.evaluation.judges.instructions import InstructionJudge
from steersman.evaluation.measures import Answers
from steersman.evaluation.tasks.asking import asked
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import Row, items_of, read_rows


@task_form("ifeval", "IFEval: instructions followed, strictly, by prompt and by instruction (needs lm-eval)")
def ifeval(place: str, *, limit: int | None) -> Task:
    """Raises JudgeError where lm-eval's checkers are not installed."""
    items = items_of(read_rows(place, "IFEval's input_data.jsonl"), _item, limit)
    mean = sum(len(item.facts["instructions"]) for item in items) / max(len(items), 1)
    items = [replace(item, facts={**item.facts, "mean_instructions": mean}) for item in items]
    judge = InstructionJudge()
    behaviour = Behaviour(
        "Following instructions",
        "follows every instruction of the prompt",
        "followed",
        "broke one",
        judge,
        Answers(judge, max_new_tokens=1280, extra=judge.metrics),
    )
    return Task(f"ifeval:{place}", items, behaviour)


def _item(row: Row) -> Item:
    instructions = row.texts("instruction_id_list")
    kwargs = row.fields.get("kwargs")
    if not isinstance(kwargs, list) or len(kwargs) != len(instructions):
        raise row.error(f'"kwargs" must be a list of {len(instructions)}, one for each instruction')
    if not all(isinstance(one, dict) for one in kwargs):
        raise row.error('"kwargs" must hold objects')
    facts = {"instructions": list(instructions), "kwargs": kwargs}
    prompt = row.text("prompt")
    id_ = row.label("key", "id") or row.number
    kind = instructions[0].partition(":")[0] if len(instructions) == 1 else "several"
    return Item(id_, id_, asked(prompt), "", None, kind, facts={**facts, "prompt": prompt})
