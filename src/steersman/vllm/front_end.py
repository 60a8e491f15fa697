"""The engine's front end: each request's steering is resolved, or refused, before the engine sees it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from steersman.errors import RequestError
from steersman.vllm.calls import CALL, current_call
from steersman.vllm.counting import COUNT, CountedText
from steersman.vllm.dtypes import dtypes_of
from steersman.vllm.first_plans import first_registry
from steersman.vllm.read_text import PROMPT, ReadText, prompt_length
from steersman.vllm.receipt import receipt_of
from steersman.vllm.registry import ASKED, Registry, Resolved
from steersman.vllm.served import checker
from steersman.vllm.settings import KEY, Settings, read_settings
from steersman.vllm.signatures import extend
from steersman.vllm.supported import check_supported

RECEIPT = "steersman"
"""The attribute of an engine's output that holds its receipt."""


def extend_front_end() -> None:
    """Extend the classes of the engine's front end. Raises `ServingError` where they are not as known."""
    extend(
        InputProcessor,
        "process_inputs",
        (
            "self",
            "request_id",
            "prompt",
            "params",
            "supported_tasks",
            "arrival_time",
            "lora_request",
            "tokenization_kwargs",
            "trace_headers",
            "priority",
            "data_parallel_rank",
            "resumable",
            "session_id",
            "kv_hints",
        ),
        _process_inputs,
    )
    extend(
        OutputProcessor,
        "add_request",
        ("self", "request", "prompt", "parent_req", "request_index", "queue"),
        _add_request,
    )
    extend(OutputProcessor, "_finish_request", ("self", "req_state"), _finish_request)
    extend(OutputProcessor, "abort_requests", ("self", "request_ids", "internal"), _abort_requests)
    extend(
        RequestState,
        "make_request_output",
        (
            "self",
            "new_token_ids",
            "pooling_output",
            "finish_reason",
            "stop_reason",
            "kv_transfer_params",
            "ec_transfer_params",
            "error",
        ),
        _make_request_output,
    )
    for engine in (LLMEngine, AsyncLLM):
        _extend_engine(engine)


def _extend_engine(engine: type) -> None:
    original = engine.__init__  # type: ignore[misc]
    if getattr(original, "steersman", False):
        return

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        registry = registry_of(self.vllm_config)
        self.input_processor.steersman = registry
        self.output_processor.steersman = registry

    begin.steersman = True  # type: ignore[attr-defined]
    engine.__init__ = begin  # type: ignore[misc]


def registry_of(vllm_config: Any) -> Registry | None:
    """A register of the plans that an engine is configured with; None where it is not.

    Raises:
        ServingError, ArtifactError, ArchitectureMismatch, WeightsMismatch: a plan cannot be served.
    """
    settings = read_settings(vllm_config.additional_config)
    if settings is None:
        return None
    check_supported(vllm_config)
    config = vllm_config.model_config
    return first_registry(settings, checker(config, settings.match), dtypes_of(config))


# ---------------------------------------------------------------- requests


def _process_inputs(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(original).bind(self, *args, **kwargs)
    params = bound.arguments["params"]
    extra = getattr(params, "extra_args", None) or {}
    registry: Registry | None = getattr(self, "steersman", None)
    if isinstance(extra.get(KEY), CountedText):
        bound.arguments["params"] = _counted(params, registry)
        return original(*bound.args, **bound.kwargs)
    read = extra.get(KEY)
    if isinstance(read, ReadText):
        extra = {key: value for key, value in extra.items() if key != KEY}
        params = bound.arguments["params"] = params.clone()
        params.extra_args = extra
    elif KEY in extra:
        raise RequestError(f'"{KEY}" is no argument of a request: ask by name, {{"{ASKED}": "name"}}')
    if registry is None:
        if ASKED in extra:
            raise RequestError("steering: this engine has no steerings; it is not configured with any")
        return original(*bound.args, **bound.kwargs)
    resolved = _resolved(registry, params, extra)
    if resolved is None:
        return original(*bound.args, **bound.kwargs)
    _check_request(bound.arguments, registry.settings)
    told = registry.accept(resolved, answers=params.n)
    if isinstance(read, ReadText):
        told[PROMPT] = read.prompt_length
    params = params.clone()
    params.extra_args = {**extra, KEY: told}
    bound.arguments["params"] = params
    try:
        request = original(*bound.args, **bound.kwargs)
    except BaseException:
        registry.abandon(told)
        raise
    return request


def _resolved(registry: Registry, params: Any, extra: Mapping[str, Any]) -> Resolved | None:
    call = current_call()
    if call is not None:  # what it asks for has been read from all of it, and resolved once
        call.check(ASKED in extra)
        return call.resolved
    given = extra.get(ASKED, registry.settings.default if _generates(params) else None)
    return None if given is None else registry.resolve(given)


def _counted(params: Any, registry: Registry | None) -> Any:
    """What the engine is told of a text to count: asked in this process, unsteered whatever the default."""
    if registry is None or not registry.settings.count or ASKED in params.extra_args:
        raise RequestError(
            "experts are counted of texts that are not steered, by an engine that is configured to: "
            '{"steersman": {"count": 1024}}'
        )
    params = params.clone()
    params.extra_args = {**params.extra_args, KEY: params.extra_args[KEY].told()}
    return params


def _generates(params: Any) -> bool:
    return hasattr(params, "max_tokens")


def _check_request(arguments: dict[str, Any], settings: Settings) -> None:
    if not _generates(arguments["params"]):
        raise RequestError("steering: pooling requests cannot be steered")
    if arguments.get("resumable"):
        raise RequestError("steering: a request whose prompt grows while it runs cannot be steered")
    if arguments.get("lora_request") is not None and settings.match == "weights":
        raise RequestError("steering: an adapter changes the weights that the plans were made for")
    prompt = arguments["prompt"]
    if isinstance(prompt, dict) and (prompt.get("type") == "embeds" or "prompt_embeds" in prompt):
        raise RequestError("steering: a prompt given as embeddings cannot be steered")


def _told(request: Any) -> dict[str, Any] | None:
    extra = getattr(request.sampling_params, "extra_args", None)
    return None if not extra else extra.get(KEY)


def _add_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    registry: Registry | None = getattr(self, "steersman", None)
    told = _told(request)
    _check_told(registry, request, told)
    result = original(self, request, *args, **kwargs)
    if registry is not None:
        state = self.request_states[request.request_id]
        state.steersman = None if told is None or COUNT in told else registry.enter(request.request_id, told)
        state.steersman_prompt = prompt_length(told, state.prompt_len)
        state.steersman_call = call = CALL.get()
        state.steersman_dtype = registry.dtypes.served if registry.dtypes is not None else None
        if call is not None:
            call.started += 1
            call.dtype = state.steersman_dtype
    return result


def _check_told(registry: Registry | None, request: Any, told: Any) -> None:
    """Refuse a request that has gone around `process_inputs`, where what it asks for is resolved."""
    params = request.sampling_params
    if registry is None or told is not None or params is None or CALL.get() is not None:
        return
    given = (params.extra_args or {}).get(ASKED, registry.settings.default)
    if given is not None and registry.resolve(given) is not None:
        raise RequestError("steering: a request that was made ready elsewhere cannot be steered")


def _finish_request(original: Any, self: Any, req_state: Any) -> Any:
    result = original(self, req_state)
    _leave(self, [req_state.request_id])
    return result


def _abort_requests(original: Any, self: Any, request_ids: Iterable[str], internal: bool) -> Any:
    aborted = original(self, request_ids, internal)
    _leave(self, aborted)
    return aborted


def _leave(self: Any, request_ids: Iterable[str]) -> None:
    registry: Registry | None = getattr(self, "steersman", None)
    if registry is not None:
        registry.leave(request_ids)


def _make_request_output(
    original: Any,
    self: Any,
    new_token_ids: Any,
    pooling_output: Any,
    finish_reason: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if finish_reason is not None and hasattr(self, RECEIPT):
        _note_end(self)
    output = original(self, new_token_ids, pooling_output, finish_reason, *args, **kwargs)
    if output is not None and output.finished and hasattr(self, RECEIPT):
        setattr(output, RECEIPT, receipt_of(self.steersman, _ended(self), self.steersman_dtype))
    return output


def _note_end(state: Any) -> None:
    """Count an answer that has ended, for its request and for the call that it belongs to."""
    made = 0 if state.detokenizer is None else state.detokenizer.num_output_tokens()
    ended = (state.steersman_prompt, state.prompt_len - state.steersman_prompt + made)
    _ended(state).append(ended)
    if state.steersman_call is not None:
        state.steersman_call.ended.append(ended)


def _ended(state: Any) -> list[tuple[int, int]]:
    """The answers of a request that have ended: of all its children where it asked for several."""
    owner = state if state.parent_req is None else state.parent_req
    if not hasattr(owner, "steersman_ended"):
        owner.steersman_ended = []
    ended: list[tuple[int, int]] = owner.steersman_ended
    return ended
