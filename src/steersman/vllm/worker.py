"""The engine's workers: the start-up canary, and plans that are written while requests run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from steersman.artifacts import load_steering
from steersman.errors import ServingError, SteersmanError
from steersman.vllm.canary import sing
from steersman.vllm.plan_rows import rows_of, sites_of
from steersman.vllm.runner_v1 import STATE
from steersman.vllm.runner_v2 import dummy_states, extend_runner_v2, is_v2
from steersman.vllm.settings import read_settings
from steersman.vllm.signatures import extend
from steersman.vllm.worker_state import WorkerState


def extend_workers() -> None:
    """Extend the workers. Raises `ServingError` where they are not as known."""
    extend(Worker, "load_model", ("self", "load_dummy_weights"), _load_model)
    for worker in (Worker, CPUWorker):
        extend(worker, "compile_or_warm_up_model", ("self",), _compile_or_warm_up_model)
        extend(worker, "execute_dummy_batch", ("self",), _execute_dummy_batch)
        for method in (steersman_write, steersman_clear, steersman_facts, steersman_counts):
            setattr(worker, method.__name__, method)


def _load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """A runner of the second kind is extended where one is used: not every build can import it."""
    if is_v2(self.model_runner):
        extend_runner_v2()
    return original(self, *args, **kwargs)


def _compile_or_warm_up_model(original: Any, self: Any) -> Any:
    result = original(self)
    state: WorkerState | None = getattr(self.model_runner, STATE, None)
    settings = read_settings(self.vllm_config.additional_config)
    if state is None and settings is not None and settings.active:
        raise ServingError(f"this engine's {type(self.model_runner).__name__} is none that can be steered")
    if state is not None:
        sing(state, lambda tokens: _forward(self.model_runner, tokens))
        if state.counter is not None:
            state.counter.listen(lambda tokens: _forward(self.model_runner, tokens))
    return result


def _execute_dummy_batch(original: Any, self: Any) -> Any:
    """Other ranks have work and this one has none: its model runs on nothing, which nobody counts."""
    state: WorkerState | None = getattr(self.model_runner, STATE, None)
    if state is not None:
        state.follow([], 0)
        if state.counter is not None:
            state.counter.rest()
    return original(self)


@torch.inference_mode()
def _forward(runner: Any, tokens: int) -> Any:
    if not get_pp_group().is_first_rank:
        _fill_states_given(runner, tokens)
    # Token 0 may be padding, whose embedding is often zero: nothing changes zeros.
    ids = torch.arange(7, 7 + tokens) % runner.model_config.get_vocab_size()
    if is_v2(runner):
        return dummy_states(runner, ids)
    buffer = getattr(runner, "input_ids", None)
    if buffer is not None:
        buffer.gpu[:tokens] = ids.to(buffer.gpu)
    # With attention: without it, what follows an attention layer is whatever was in memory.
    output = runner._dummy_run(tokens, force_attention=True)
    states = output[0] if isinstance(output, tuple) else output
    return states if hasattr(states, "clone") else states["hidden_states"]


def _fill_states_given(runner: Any, tokens: int) -> None:
    """Put numbers in the place of what the pipeline's stage before gives: no expert changes zeros."""
    if runner.intermediate_tensors is None:
        runner._dummy_run(tokens)  # makes room for them
    for states in runner.intermediate_tensors.tensors.values():
        states.copy_(torch.linspace(-1, 1, states.shape[-1]))


def _state(worker: Any) -> WorkerState:
    state: WorkerState | None = getattr(worker.model_runner, STATE, None)
    if state is None:
        raise ServingError("this engine is not configured to be steered")
    return state


def steersman_write(self: Any, slot: int, files: dict[str, bytes]) -> str | None:
    """Write a plan, given as the files of its folder, into a slot; returns why not, or None."""
    try:
        state = _state(self)
        with tempfile.TemporaryDirectory() as folder:
            for name in ("manifest.json", "tensors.safetensors"):
                (Path(folder) / name).write_bytes(files[name])
            steering = load_steering(folder)
        routers, blocks = sites_of(steering)
        here = state.layers
        missing = [f"router:{n}" for n in sorted(routers) if n in here and n not in state.bank.router_of]
        missing += [f"block_output:{n}" for n in sorted(blocks) if n in here and n not in state.bank.block_of]
        if missing:
            return (
                f"it edits {', '.join(missing)}, where this engine was started without edits: start it with "
                "sites=all (--sites all)"
            )
        state.bank.write(slot, rows_of(steering), steering.fingerprint)
    except SteersmanError as error:
        return str(error)
    return None


def steersman_clear(self: Any, slot: int) -> None:
    """Take a plan out of a slot that no request follows."""
    _state(self).bank.clear(slot)


def steersman_counts(self: Any, places: int) -> dict[str, Any]:
    """Experts counted in the first places, 0 again then; of ranks that see the same, one answers."""
    counter = _state(self).counter
    if counter is None:
        return {"layers": [], "counts": b""}
    counts = counter.take(places)
    return {"layers": list(counter.layers), "counts": b"" if get_tp_group().rank_in_group else counts}


def steersman_facts(self: Any) -> dict[str, Any]:
    """What a worker holds, for tests and monitoring."""
    state = _state(self)
    return {
        "live": len(state.live),
        "free_vectors": state.bank.free_vectors,
        "routers": [place.layer for place in state.bank.places.routers],
        "blocks": list(state.bank.places.blocks),
    }
