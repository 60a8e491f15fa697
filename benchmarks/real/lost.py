"""What a steering costs in right answers: by log-likelihood, of items with options.

    python benchmarks/real/lost.py MODEL STEERING TASK [FIRST]

Prints the shares that are right before and after, and the loss with its one-sided 95 % bound by group.
"""

from __future__ import annotations

import json
import sys

import steersman
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.tuning.costs import CostBound, Kept
from steersman.models.plan_rows import PlanRows


def main() -> int:
    name, plan, place = sys.argv[1:4]
    task = steersman.load_task(place, limit=int(sys.argv[4]) if len(sys.argv) > 4 else None)
    model, tokenizer = steersman.load_model(name)
    base = Subject(model, tokenizer).condition(Arm("", None))
    kept = Kept([task], [CostBound("lost", 0.05)], base)
    rows, steering = PlanRows(model, tokenizer), steersman.Steering.from_pretrained(plan)
    cost = kept.measure(rows, steering)["lost"]
    before = kept._right(rows, 0, [None])[0].mean()
    print(json.dumps({"before": before, "after": before - cost.value, **cost.to_json()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
