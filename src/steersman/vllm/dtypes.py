"""In which numbers an engine computes, and in which its model is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dtypes:
    """Names of torch's dtypes.

    Attributes:
        served: That in which the engine computes.
        checkpoint: That which the checkpoint names; None: none.
    """

    served: str
    checkpoint: str | None

    def as_json(self) -> dict[str, str | None]:
        """As the server lists them."""
        return {"dtype": self.served, "checkpoint_dtype": self.checkpoint}


def dtypes_of(model_config: Any) -> Dtypes:
    """Those of an engine's configuration of its model."""
    config = model_config.hf_config
    named = (getattr(part, "dtype", None) for part in (config, config.get_text_config()))
    checkpoint = next((_name(dtype) for dtype in named if dtype is not None), None)
    return Dtypes(_name(model_config.dtype), checkpoint)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def in_words(served: str, checkpoint: str | None) -> str:
    """What a server says of them when it starts."""
    if checkpoint in (None, served):
        return f"in {served}"
    keeps = ": -- --dtype float32 keeps it" if checkpoint == "float32" else ""  # else nothing is lost
    return f"in {served} (its checkpoint is in {checkpoint}{keeps})"
