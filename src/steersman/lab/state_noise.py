"""Noise on a model's states while it learns to answer, so that its answers survive a vector being added.

A model this small keeps a number it has learnt by heart on a knife's edge: any vector added to its states,
a random one too, takes it away. Big models are not so. So the targets of the lab are trained with what
steering does later, in directions that mean nothing: at one layer's output, at every position that an answer
is read from, the same vector is added. It begins when most is learnt: noise from the start makes learning by
heart several times slower.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Shares of the training: without noise until the first, in full from the second on.
RISING = (0.4, 0.7)


class StateNoise:
    """Adds a random direction to one layer's output, up to `most` of each state's own norm."""

    def __init__(self, layers: Sequence[nn.Module], most: float, seed: int) -> None:
        self.layers = layers
        self.most = most
        self.rng = random.Random(f"noise {seed}")
        self.generator = torch.Generator().manual_seed(seed)
        self.layer = 0
        self.now = 0.0
        self.answering: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[StateNoise]:
        """Hooks on every layer for as long as the context lasts; none where there is no noise."""
        hooked = self.layers if self.most else ()
        handles = [layer.register_forward_hook(self._hook(number)) for number, layer in enumerate(hooked)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, learnt: Tensor, done: float) -> None:
        """`learnt` [sequences, tokens]: which tokens are learnt (states act one token earlier). `done`: the
        share of the training that lies behind.
        """
        start, full = RISING
        self.now = self.most * min(1.0, max(0.0, (done - start) / (full - start)))
        self.answering = learnt.roll(-1, dims=1)
        self.answering[:, -1] = False
        self.layer = self.rng.randrange(len(self.layers))

    def _hook(self, number: int) -> Any:
        def add(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            if number != self.layer or self.answering is None:
                return None
            rows, _, width = output.shape
            direction = torch.randn(rows, 1, width, generator=self.generator)
            size = self.now * torch.rand(rows, 1, 1, generator=self.generator)
            size = size * output.detach().norm(dim=-1, keepdim=True) * self.answering[..., None]
            moved: Tensor = output + size * direction / direction.norm(dim=-1, keepdim=True)
            return moved

        return add
