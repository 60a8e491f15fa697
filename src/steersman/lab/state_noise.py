"""Noise on a model's states while it learns to answer, so that its answers survive a vector being added.

A model this small keeps a number it has learnt by heart on a knife's edge: any vector added to its states,
a random one too, takes it away. Big models are not so. So the targets of the lab are trained with what
steering does later, in directions that mean nothing: at one layer's output, at every position that an answer
is read from, the same vector is added.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class StateNoise:
    """Adds a random direction to one layer's output, up to `most` of each state's own norm."""

    def __init__(self, layers: Sequence[nn.Module], most: float, seed: int) -> None:
        self.layers = layers
        self.most = most
        self.rng = random.Random(f"noise {seed}")
        self.generator = torch.Generator().manual_seed(seed)
        self.layer = 0
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

    def begin(self, learnt: Tensor) -> None:
        """`learnt` [sequences, tokens]: which tokens are learnt. States act one token earlier."""
        self.answering = learnt.roll(-1, dims=1)
        self.answering[:, -1] = False
        self.layer = self.rng.randrange(len(self.layers))

    def _hook(self, number: int) -> Any:
        def add(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            if number != self.layer or self.answering is None:
                return None
            rows, _, width = output.shape
            direction = torch.randn(rows, 1, width, generator=self.generator)
            size = self.most * torch.rand(rows, 1, 1, generator=self.generator)
            size = size * output.detach().norm(dim=-1, keepdim=True) * self.answering[..., None]
            moved: Tensor = output + size * direction / direction.norm(dim=-1, keepdim=True)
            return moved

        return add
