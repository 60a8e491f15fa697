"""The engine's first model runner (`GPUModelRunner`, and the CPU's, which extends it)."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from steersman.vllm.loading import prepare_worker
from steersman.vllm.signatures import check_signature, extend
from steersman.vllm.worker_state import WorkerState

STATE = "steersman_state"
"""The attribute of a model runner that holds what this worker knows."""


def extend_runner() -> None:
    """Extend the runner. Raises `ServingError` where it is not as known."""
    check_signature(GPUModelRunner.get_model, ("self",))
    extend(GPUModelRunner, "load_model", ("self", "load_dummy_weights", "model"), _load_model)
    extend(CPUModelRunner, "load_model", ("self", "load_dummy_weights"), _load_model)
    extend(GPUModelRunner, "_update_states", ("self", "scheduler_output"), _update_states)
    extend(
        GPUModelRunner,
        "_prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
        _prepare_inputs,
    )


def _load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    setattr(self, STATE, prepare_worker(self.get_model(), self.vllm_config, self.device))
    return result


def _update_states(original: Any, self: Any, scheduler_output: Any) -> Any:
    result = original(self, scheduler_output)
    state: WorkerState | None = getattr(self, STATE, None)
    if state is not None:
        state.finish(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params is not None:
                state.begin(new.req_id, new.sampling_params.extra_args, new.prompt_token_ids)
    return result


def _prepare_inputs(original: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
    result = original(self, scheduler_output, num_scheduled_tokens)
    state: WorkerState | None = getattr(self, STATE, None)
    if state is not None:
        ids = self.input_batch.req_ids
        state.lay_out(ids, num_scheduled_tokens, self.input_batch.num_computed_tokens_cpu[: len(ids)])
    return result
