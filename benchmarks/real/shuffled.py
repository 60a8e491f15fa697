"""How often label-shuffled concepts do what a transplanted one does, at its layer and dose.

    python benchmarks/real/shuffled.py MAP CONCEPT TARGET STEERING TASK OUT [DRAWS]

STEERING is a plan of one layer, as `tune` or `transplant` made it; with NAME@-1 its reverse. Prints, and
writes into OUT, the share of the task's positive side unsteered, under the plan, and under each of 19
shuffled ones.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import steersman
from steersman.concepts.dose import Strength, residual_edits
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.tuning.shared_prompts import SharedPrompts


def main() -> int:
    bridge_name, concept_name, target, plan_name, task_name, out = sys.argv[1:7]
    draws = int(sys.argv[7]) if len(sys.argv) > 7 else 19
    path, _, factor = plan_name.partition("@")
    plan = float(factor or 1) * steersman.Steering.from_pretrained(path)
    bridge = steersman.AffineMap.from_pretrained(bridge_name)
    concept = steersman.ConceptVector.from_pretrained(concept_name)
    (layer,) = plan.edits[0].layers
    dose = float(factor or 1) * float(plan.provenance["doses"][str(layer)])
    source = bridge.of_concept(concept).layer_map(layer).source_layer
    place = concept.layers.index(source)
    model, tokenizer = steersman.load_model(target)
    task = steersman.load_task(task_name)
    subject = Subject(model, tokenizer, max_new_tokens=16)
    subject.shared_prompts = SharedPrompts(model)
    plans = [None, plan]
    for shuffled in concept.shuffled[:draws]:
        vectors = {layer: bridge.of_concept(concept).map_vector(layer, shuffled[place])}
        edits = residual_edits(vectors, Strength(dose, is_dose=True), bridge.norms, "answer", "add")
        plans.append(replace(plan, edits=edits))
    found: list[list[float]] = []
    for number, one in enumerate(plans):
        condition = subject.condition(Arm(str(number), one))
        outcomes = task.judge(condition.answers([item.content for item in task], max_new_tokens=16))
        found.append([float(outcome == "positive") for outcome in outcomes])
        print(number, np.mean(found[-1]), flush=True)
        shares = [float(np.mean(values)) for values in found]
        told = {"task": task.name, "items": len(task), "layer": layer, "dose": dose}
        told |= {"base": shares[0], "steered": shares[1:2], "shuffled": shares[2:]}
        Path(out).write_text(json.dumps(told) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
