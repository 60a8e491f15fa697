"""The second model runner on a CPU, its kernels and ours in Triton's interpreter: for a process of its own.

`python second_runner.py FAMILY FOLDER`, where FOLDER holds model/ and plans/, prints what requests are
answered, as JSON. The engine takes Triton for usable on a CPU only where it has a backend for CPUs, so one
is put there that says it is active; nothing is ever compiled for it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TRITON_INTERPRET="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_V2_MODEL_RUNNER="1",
)

import triton.backends


class ForCPUs:
    """Of a backend, what the engine looks at."""

    class driver:  # noqa: N801
        @staticmethod
        def is_active() -> bool:
            return True


triton.backends.backends.clear()
triton.backends.backends["cpu"] = ForCPUs

from engine import ask, open_engine, params  # noqa: E402

from steersman.vllm import loading, runner_v2  # noqa: E402
from steersman.vllm.device_state import DeviceState  # noqa: E402

PROMPTS = ([5, 6, 7] * 9, [9, 8, 7, 6, 5] * 5, [3] * 28, [4, 5, 6] * 8, [12, 13] * 13)
TOKENS = 12


def answers(engine: Any, asked: list[str | None]) -> list[list[int]]:
    """The tokens that each request is answered."""
    outputs = ask(engine, PROMPTS, [params(name, TOKENS) for name in asked])
    return [list(output.outputs[0].token_ids) for output in outputs]


def main(family: str, folder: Path) -> dict[str, Any]:
    """Steered and unsteered requests at once, in a cache that is too small for all of them."""
    loading._state = DeviceState  # as on a GPU: our kernels
    steerings = {path.name: str(path) for path in sorted((folder / "plans").iterdir())}
    # All prompts fit, with one block of 32 positions each; their answers do not.
    engine = open_engine(
        folder / "model",
        family,
        {"steerings": steerings},
        max_model_len=64,
        max_num_batched_tokens=64,
        block_size=32,
        num_gpu_blocks_override=7,
        enable_prefix_caching=False,
    )
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    resumed: list[str] = []
    add_requests = runner.add_requests

    def seen(scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            if len(new.prefill_token_ids) > len(new.prompt_token_ids):
                resumed.append(new.req_id)
        add_requests(scheduler_output)

    runner.add_requests = seen
    asked = [None, *steerings][: len(PROMPTS)]
    return {
        "v2": runner_v2.is_v2(runner),
        "state": type(runner.steersman_state).__name__,
        "prompts": PROMPTS,
        "asked": asked,
        "answers": answers(engine, asked),
        "resumed": len(resumed),
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
