"""The items of a task that a model answers as it is: what a refusal can be added to.

    python benchmarks/real/answered.py MODEL TASK OUT [FIRST]

OUT is the same task, with those of its first items (all, unless FIRST says how many) whose unsteered answer
the task's judge finds on the negative side. Each is asked once, greedily, before anything is steered.
"""

from __future__ import annotations

import sys
from pathlib import Path

import steersman
from steersman.evaluation.arms import Arm, Subject


def main() -> int:
    name, place, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    header, *lines = place.read_text(encoding="utf-8").splitlines(keepends=True)
    first = int(sys.argv[4]) if len(sys.argv) > 4 else len(lines)
    model, tokenizer = steersman.load_model(name)
    found = Subject(model, tokenizer).run(steersman.load_task(str(place), limit=first), Arm("", None))
    kept = [line for line, side in zip(lines, found.outcomes, strict=False) if side == "negative"]
    out.write_text("".join([header, *kept]), encoding="utf-8")
    print(f"{out}: {len(kept)} of {len(found.outcomes)} are answered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
