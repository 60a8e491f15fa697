"""The engine's prefix cache, keyed by the steering of each token of a block as well."""

from __future__ import annotations

import sys
from typing import Any

from vllm.v1.core import kv_cache_utils

from steersman.vllm.cache_keys import block_key
from steersman.vllm.counting import counted_key
from steersman.vllm.read_text import prompt_length
from steersman.vllm.settings import KEY
from steersman.vllm.signatures import check_signature

_NAME = "generate_block_hash_extra_keys"


def extend_prefix_cache() -> None:
    """Extend what enters the hash of a block. Raises `ServingError` where that is not as known."""
    original = getattr(kv_cache_utils, _NAME)
    if getattr(original, "steersman", False):
        return
    check_signature(original, ("request", "start_token_idx", "end_token_idx", "start_mm_idx"))

    def extended(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        keys = (*(keys or ()), *_keys(request, start_token_idx, end_token_idx)) or None
        return keys, next_mm_idx

    extended.__wrapped__, extended.steersman = original, True  # type: ignore[attr-defined]
    extended.__wrapped__ = original  # type: ignore[attr-defined]
    replace_everywhere(original, extended)


def replace_everywhere(present: Any, other: Any) -> None:
    """Put a function in the place of another in the engine's modules: some have imported it by name."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and vars(module).get(_NAME) is present:
            setattr(module, _NAME, other)


def _keys(request: Any, first: int, end: int) -> tuple[tuple[str, str], ...]:
    params = request.sampling_params
    extra = None if params is None else params.extra_args
    told = None if not extra else extra.get(KEY)
    if told is None:
        return ()
    prompt = prompt_length(told, request.num_prompt_tokens)
    found = (block_key(first, end, prompt, told["keys"]), counted_key(told, end))
    return tuple(key for key in found if key is not None)
