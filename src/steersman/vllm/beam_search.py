"""Beam search, refused where a default steering would reach it.

It runs as one short request for every beam and step, each with the answer so far as its prompt: which tokens
are the prompt's, and which the answer's, is lost on the way, and a plan's scope could not be kept.
"""

from __future__ import annotations

from typing import Any

from steersman.errors import RequestError
from steersman.vllm.calls import CALL
from steersman.vllm.signatures import extend

_PARAMETERS = {
    "BeamSearchOfflineMixin": ("self", "prompts", "params", "lora_request", "use_tqdm", "concurrency_limit"),
    "BeamSearchOnlineMixin": (
        "self",
        "prompt",
        "request_id",
        "params",
        "lora_request",
        "trace_headers",
        "session_id",
    ),
}


def extend_beam_search() -> None:
    """Extend both ways to it. Raises `ServingError` where they are not as known."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    for owner in (BeamSearchOfflineMixin, BeamSearchOnlineMixin):
        extend(owner, "beam_search", _PARAMETERS[owner.__name__], _beam_search)


def _beam_search(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    engine = getattr(self, "llm_engine", None) or self.engine_client
    registry = getattr(engine.input_processor, "steersman", None)
    call = CALL.get()
    if call is not None:
        steered = call.resolved is not None
    else:
        steered = registry is not None and registry.settings.default is not None
    if steered:
        raise RequestError(
            "steering: beam search cannot be steered, and this engine steers what asks for nothing"
        )
    return original(self, *args, **kwargs)
