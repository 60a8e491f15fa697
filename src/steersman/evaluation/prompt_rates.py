"""Which experts a model uses for prompts, unsteered: what stands in for what in a random control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from steersman.experts.recording import recording
from steersman.models.architecture import RouterSite, find_routers
from steersman.models.reading import evaluating, read_batch


@dataclass(frozen=True)
class PromptRates:
    """Which experts a task's prompts use: [2, layers, experts] activations (the second side is empty), −1
    where a layer has fewer; tokens [2]; true layers.
    """

    activations: NDArray[np.int64]
    tokens: NDArray[np.int64]
    layers: tuple[int, ...]


def first_routers(model: nn.Module) -> dict[int, RouterSite]:
    """Layer → its router, of those that can be steered, in order."""
    sites: dict[int, RouterSite] = {}
    for site in find_routers(model):
        if site.facts.reason is None:
            sites.setdefault(site.facts.layer, site)
    return dict(sorted(sites.items()))


def prompt_rates(model: nn.Module, rows: Sequence[Sequence[int]]) -> PromptRates:
    """Count which experts a transformers model uses for prompts, given as token ids."""
    sites = first_routers(model)
    widest = max(site.facts.experts for site in sites.values())
    counts = np.zeros((len(sites), widest), dtype=np.int64)
    chosen: dict[int, torch.Tensor] = {}
    with evaluating(model), recording(list(sites.values()), chosen.__setitem__):
        for ids in rows:  # one by one: padding uses experts too
            read_batch(model, [ids])
            for row in range(len(sites)):
                counts[row] += np.bincount(chosen[row].reshape(-1).cpu().numpy(), minlength=widest)[:widest]
    return rates_of(sites, counts, sum(map(len, rows)))


def rates_of(sites: dict[int, RouterSite], counts: NDArray[np.int64], tokens: int) -> PromptRates:
    """Counts [layers, experts] over so many tokens, as rates are taken of them."""
    activations = np.stack([counts, np.zeros_like(counts)])
    for row, site in enumerate(sites.values()):
        activations[:, row, site.facts.experts :] = -1
    return PromptRates(activations, np.array([tokens, 0]), tuple(sites))
