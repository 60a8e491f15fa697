"""Whether a model's decoder layers give one residual stream, to which vectors can be added; or why not."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from steersman.errors import PlanError
from steersman.models.adapters import unwrap
from steersman.models.architecture import decoder_config, find_decoder
from steersman.models.families import why_looped

_COUNTS = ("hc_mult", "hc_count", "altup_num_inputs")
"""What configurations call the number of streams: hyper-connections (DeepSeek V4, GLM 5, HunYuan V4; Qwen 4),
AltUp (Gemma 3n).
"""


def why_no_stream(model: nn.Module, layers: Iterable[int]) -> str | None:
    """Why the outputs of some of a model's decoder layers are not its residual stream; None where nothing in
    its structure says so.

    Raises:
        ModelError: the model has no list of decoder layers.
    """
    outer = getattr(unwrap(model), "config", None)
    config = decoder_config(model)
    inner = getattr(find_decoder(model), "config", None)
    if any(getattr(each, "is_encoder_decoder", False) for each in (outer, inner)):
        return "an encoder reads its prompt, and its decoder has no prompt that a scope could name"
    streams = max(int(getattr(config, name, None) or 1) for name in _COUNTS)
    if streams > 1:
        return f"each token has {streams} residual streams between its layers, and a vector is for one"
    reasons = ((each, why_looped(config, each)) for each in layers)
    return next((f"layer {each}: {why}; name other layers" for each, why in reasons if why), None)


def check_stream(model: nn.Module, layers: Iterable[int]) -> None:
    """Raise `PlanError` where the outputs of these layers are not the residual stream."""
    if reason := why_no_stream(model, layers):
        raise PlanError(f"{type(unwrap(model)).__name__} cannot be steered by vectors: {reason}")
