"""The engine's second model runner, its own choice where Triton is.

A request that was preempted comes again as a new one there, with the tokens that it had generated before it
among those to prefill; `prompt_token_ids` stay those of its prompt, by which roles are told.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steersman.errors import ServingError
from steersman.vllm.loading import prepare_worker
from steersman.vllm.runner_v1 import STATE
from steersman.vllm.signatures import check_method, extend
from steersman.vllm.worker_state import WorkerState

MODULE = "vllm.v1.worker.gpu.model_runner"


def is_v2(runner: Any) -> bool:
    """Whether a model runner is of this kind. Its module is imported only where one is."""
    return any(owner.__module__ == MODULE for owner in type(runner).__mro__)


def extend_runner_v2() -> None:
    """Extend the runner. Raises `ServingError` where it is not as known."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    extend_v2(GPUModelRunner)


def extend_v2(runner: type) -> None:
    """Extend a class of model runners, all of it or nothing.

    Raises:
        ServingError: it is not as known.
    """
    check_method(runner, "get_model", ("self",))
    check_method(runner, "prepare_dummy_attn", ("self", "input_batch", "valid_state_slots"))
    for name, (parameters, _) in _EXTENDED.items():
        check_method(runner, name, parameters)
    for name, (parameters, wrapper) in _EXTENDED.items():
        extend(runner, name, parameters, wrapper)


def _load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    state = prepare_worker(self.get_model(), self.vllm_config, self.device)
    if state is not None and getattr(self, "adaptive_verification", None) is not None:
        raise ServingError(
            "this engine cannot be steered: with adaptive verification of drafts only the device knows which "
            "tokens are whose"
        )
    setattr(self, STATE, state)
    return result


def _finish_requests(original: Any, self: Any, scheduler_output: Any) -> Any:
    result = original(self, scheduler_output)
    state: WorkerState | None = getattr(self, STATE, None)
    if state is not None:
        state.finish(scheduler_output.finished_req_ids)
    return result


def _add_requests(original: Any, self: Any, scheduler_output: Any) -> Any:
    result = original(self, scheduler_output)
    state: WorkerState | None = getattr(self, STATE, None)
    if state is not None:
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params is not None:
                state.begin(new.req_id, new.sampling_params.extra_args, new.prompt_token_ids)
    return result


def _prepare_inputs(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    batch = original(self, *args, **kwargs)
    state: WorkerState | None = getattr(self, STATE, None)
    if state is not None:
        # Where drafts are still being verified, `num_computed_tokens_np` is too high by those that will turn
        # out wrong; a prompt ends before the first draft, so no role changes by it.
        state.lay_out(batch.req_ids, batch.num_scheduled_tokens, batch.num_computed_tokens_np)
    return batch


_EXTENDED: dict[str, tuple[tuple[str, ...], Any]] = {
    "load_model": (("self", "load_dummy_weights", "args", "model", "kwargs"), _load_model),
    "finish_requests": (("self", "scheduler_output"), _finish_requests),
    "add_requests": (("self", "scheduler_output"), _add_requests),
    "prepare_inputs": (
        ("self", "scheduler_output", "batch_req_state", "batch_desc", "num_active_loras"),
        _prepare_inputs,
    ),
}


def dummy_states(runner: Any, ids: Tensor) -> Tensor:
    """What the model gives for a dummy step of these tokens, run as requests are: through captured graphs.

    Dummy tokens are padding, which goes to no expert, and a worker that does not hold the last layers keeps
    its states to itself; here neither.
    """
    prepare, execute = runner.prepare_dummy_attn, runner.execute_model
    given: list[Any] = []

    def prepare_real(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        input_batch.is_padding.fill_(False)
        input_batch.input_ids[: len(ids)].copy_(ids)
        return prepare(input_batch, *args, **kwargs)

    def execute_kept(*args: Any, **kwargs: Any) -> Any:
        given.append(execute(*args, **kwargs))
        return given[-1]

    runner.prepare_dummy_attn, runner.execute_model = prepare_real, execute_kept
    try:
        states, _ = runner._dummy_run(len(ids))
    finally:
        del runner.prepare_dummy_attn, runner.execute_model
    found: Tensor = states if states is not None else given[-1]["hidden_states"]
    return found
