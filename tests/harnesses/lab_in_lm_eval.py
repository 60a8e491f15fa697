"""The lab's tasks as lm-evaluation-harness reads them: items as JSON lines, tasks as YAML, the same judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steersman import Steering
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.condition import Condition
from steersman.evaluation.tasks import load_task

TASKS = {"refusing": "lab:refusal/test", "trusting": "lab:faithfulness/test"}
NAMES = [*TASKS, *(f"{name}_chosen" for name in TASKS)]
MAX_NEW_TOKENS = 16

_GENERATED = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{positive}}}}"
process_results: !function judging.judged
generation_kwargs:
  until: ["<|end|>"]
  max_gen_toks: {max_new_tokens}
  do_sample: false
metric_list:
  - metric: positive
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""

_CHOSEN = """\
task: {name}_chosen
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[positive, negative]}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""

_JUDGING = """\
from steersman.evaluation.tasks import load_task


def judged(doc, results):
    task = load_task(doc["task"], limit=doc["place"] + 1)[doc["place"] :]
    (outcome,) = task.judge(results)
    return {"positive": float(outcome == "positive")}
"""


def write_tasks(folder: Path, limit: int | None) -> None:
    """Write a folder for `--include_path`; of each task NAME (judged answers), NAME_chosen (the likelier)."""
    (folder / "judging.py").write_text(_JUDGING, encoding="utf-8")
    for name, source in TASKS.items():
        items = folder / f"{name}.jsonl"
        lines = [
            {
                "task": source,
                "place": place,
                "prompt": item.content[0]["content"],
                "positive": item.positive,
                "negative": item.negative,
            }
            for place, item in enumerate(load_task(source, limit=limit))
        ]
        items.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        for kind, form in (("", _GENERATED), ("_chosen", _CHOSEN)):
            text = form.format(name=name, items=items, max_new_tokens=MAX_NEW_TOKENS)
            (folder / f"{name}{kind}.yaml").write_text(text, encoding="utf-8")


def scores_of(results: dict[str, Any]) -> dict[str, float]:
    """The accuracies in the harness's results, by task."""
    return {
        name: scores["acc,none" if name.endswith("chosen") else "positive,none"]
        for name, scores in results["results"].items()
    }


def evaluated(lab_moe: tuple[Any, Any], plan: Steering | None, limit: int | None) -> dict[str, float]:
    """What Steersman's own evaluation finds on the same items."""
    subject, arm = Subject(*lab_moe, max_new_tokens=MAX_NEW_TOKENS), Arm("it", plan)
    found: dict[str, float] = {}
    for name, source in TASKS.items():
        task = load_task(source, limit=limit)
        found[name] = subject.run(task, arm).rates["positive"].rate
        contents = [item.content for item in task]
        sides = [[item.positive, str(item.negative)] for item in task]
        likelihoods = Condition(subject, arm).log_likelihoods(contents, sides)
        chosen = [positive.total > negative.total for positive, negative in likelihoods]
        found[f"{name}_chosen"] = sum(chosen) / len(chosen)
    return found
