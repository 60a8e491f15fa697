"""An engine in a process of its own: what it answers over two processes, with drafts, or when one is killed.

python engine_apart.py MODEL PLANS {tensor,pipeline,kill,drafts}     (PLANS: JSON, {name: folder})
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
if sys.argv[-1] != "drafts":
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_CPU_NUM_OF_RESERVED_CPU="0")


DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "kill": {"tensor_parallel_size": 2},
    "drafts": {"speculative_config": DRAFTS},
}


def main(model: Path, plans: dict[str, str], way: str) -> dict[str, Any]:
    from engine import answer_of, ask, open_engine, params, prompts

    engine = open_engine(model, "olmoe", {"steerings": plans}, **OPTIONS[way])
    # Prompts that repeat themselves, so that drafts are taken.
    given = [prompt * 4 for prompt in prompts(2, length=6)]
    wanted = [(plan, prompt) for plan in [None, *plans] for prompt in given]
    outputs = ask(engine, [prompt for _, prompt in wanted], [params(plan, tokens=16) for plan, _ in wanted])
    answers = [
        [plan, prompt, answer_of(output).tokens, answer_of(output).log_probabilities.tolist()]
        for (plan, prompt), output in zip(wanted, outputs, strict=True)
    ]
    if way == "kill":
        return {"answers": answers, **kill(engine, ask, given, params)}
    return {"answers": answers, "facts": engine.collective_rpc("steersman_facts")}


def kill(engine: Any, ask: Any, given: list[list[int]], params: Any) -> dict[str, Any]:
    """End one worker while requests run, and see what the front end is left with."""
    import signal
    import threading

    import psutil
    from vllm.v1.engine.exceptions import EngineDeadError

    from waiting import HANGING

    children = psutil.Process().children(recursive=True)
    workers = [
        child for child in children if "Worker" in " ".join(child.cmdline()) or "Worker" in child.name()
    ]
    timer = threading.Timer(0.5, lambda: workers[-1].send_signal(signal.SIGKILL))
    timer.start()
    error = None
    try:
        ask(engine, given * 4, [params("experts", tokens=100)] * len(given) * 4)
        ask(engine, given * 40, [params("experts", tokens=100)] * len(given) * 40)
    except EngineDeadError as dead:
        error = type(dead).__name__
    engine.llm_engine.engine_core.shutdown()
    _, alive = psutil.wait_procs(children, timeout=HANGING)
    # Python's own tracker of shared memory ends with this process.
    left = [" ".join(child.cmdline()) for child in alive]
    return {
        "workers": len(workers),
        "error": error,
        "alive": [it for it in left if "resource_tracker" not in it],
    }


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    print("RESULT " + json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])))
