"""The engine's first model runner (`GPUModelRunner`, and the CPU's, which extends it)."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from steersman.vllm.loading import prepare_worker
from steersman.vllm.signatures import check_method, extend
from steersman.vllm.worker_state import WorkerState

STATE = "steersman_state"
"""The attribute of a model runner that holds what this worker knows."""


def extend_runner() -> None:
    """Extend the runner. Raises `ServingError` where it is not as known."""
    extend_v1(GPUModelRunner, CPUModelRunner)


def extend_v1(runner: type, on_cpu: type) -> None:
    """Extend the classes of the runner and of the CPU's, all of it or nothing.

    Raises:
        ServingError: one is not as known.
    """
    check_method(runner, "get_model", ("self",))
    given = [(runner, name, known, wrapper) for name, (known, wrapper) in _EXTENDED.items()]
    given.append((on_cpu, "load_model", ("self", "load_dummy_weights"), _load_model))
    for owner, name, known, _ in given:
        check_method(owner, name, known)
    for owner, name, known, wrapper in given:
        extend(owner, name, known, wrapper)


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


_EXTENDED: dict[str, tuple[tuple[str, ...], Any]] = {
    "load_model": (("self", "load_dummy_weights", "model"), _load_model),
    "_update_states": (("self", "scheduler_output"), _update_states),
    "_prepare_inputs": (("self", "scheduler_output", "num_scheduled_tokens"), _prepare_inputs),
}
