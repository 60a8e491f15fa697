"""How many texts go through a forward at once: by their tokens and by what is kept of each, not by number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from steersman.models.architecture import decoder_layers, read_architecture

BYTES = 1 << 28
"""What a forward may make at a time, and again what may be kept of a batch: 256 MiB each; on a GPU more."""
GPU_SHARE = 1 / 16
"""Of a GPU's memory, for either."""
PARTS = 8
"""States that are kept of a token in each layer: what its modules gave, what its experts were given, and the
gradient there."""
WORK = 16
"""Further states of a token that exist at once while a layer runs: of attention, and of a dense block."""


@dataclass(frozen=True)
class Room:
    """What one token takes, in bytes, and how many there are."""

    bytes: int
    running: int
    """In the layer that runs: a state for each expert that it uses, a few times over, and `WORK` others."""
    read: int
    """Where the next token is read off: its logits, and again in float32."""
    kept: int
    """Of all layers, when the batch is recorded."""

    @classmethod
    def of(cls, model: nn.Module) -> Room:
        """That of a model."""
        config = cast(Any, model).config.get_text_config()
        most = max((router.top_k for router in read_architecture(model).routers), default=1)
        size = next(model.parameters()).element_size()
        state = config.hidden_size * max(size, 2)
        return cls(
            bytes=_bytes_of(next(model.parameters()).device),
            running=state * (4 * most + WORK),
            read=config.vocab_size * (size + 8),
            kept=state * PARTS * len(decoder_layers(model)),
        )

    def at_once(self, columns: int, read: int) -> int:
        """Rows of so many columns, of which the last are read, that fit in one forward."""
        return max(1, self.bytes // (columns * self.running + read * self.read))

    def together(self, columns: int, read: int) -> int:
        """Rows that fit in one batch, of which everything is kept."""
        return max(1, min(self.bytes // (columns * self.kept), self.at_once(columns, read)))


def _bytes_of(device: torch.device) -> int:
    if device.type != "cuda":
        return BYTES
    # Of all its memory, not of what is free: a run that goes on makes the batches it made before.
    return max(BYTES, int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory))
