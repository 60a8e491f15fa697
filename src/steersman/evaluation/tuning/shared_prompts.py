"""Prompts that are read once for the answers under many plans, none of which changes them.

Where a plan's scopes hold nothing before a prompt's last token (`answer`, `generated`), keys and values of
what comes before are the unsteered model's. They are kept by batch, and `generate` goes on from a copy.
Families differ, so this is done where it was seen to give a whole forward's logits.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch

from steersman.models.plan_rows import (
    KEPT_BYTES,
    OLD_NAME,
    UNFIT,
    alike,
    cache_bytes,
    rows_of,
    spares_prompts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from steersman.evaluation.prompts import Batch
    from steersman.steering import Steering


class SharedPrompts:
    """The prompts of a model's batches, as keys and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._name = "cache" if "cache" in inspect.signature(model.forward).parameters else OLD_NAME
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._bytes = 0
        self.used = 0
        """Batches that went on from what was kept."""

    def arguments(self, batch: Batch, plan: Steering | None) -> dict[str, Any]:
        """What `generate` is to be given beside a batch; nothing where it has to read the prompts itself."""
        if batch.input_ids.shape[1] < 2 or not (plan is None or spares_prompts(plan)):
            return {}
        config = self._model.generation_config
        if config is not None and (config.use_cache is False or config.cache_implementation is not None):
            return {}  # generate takes no other cache than the one that the checkpoint asks for
        key = (*batch.input_ids.shape, batch.input_ids.cpu().numpy().tobytes(), batch.indices)
        if key not in self._kept and self._bytes < KEPT_BYTES:
            self._kept[key] = self._read(batch)
        cache = self._kept.get(key)
        if cache is None:
            return {}
        self.used += 1
        return {self._name: rows_of(cache, torch.arange(len(batch.indices), device=batch.input_ids.device))}

    def _read(self, batch: Batch) -> Any:
        """Keys and values of all columns but the last; None where going on from them gives other logits."""
        ids, mask, positions = batch.input_ids, batch.attention_mask, batch.position_ids
        model = cast(Any, self._model)
        rows = torch.arange(len(ids), device=ids.device)
        try:
            before = model(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                use_cache=True,
                logits_to_keep=1,
            )
            cache = before.get(self._name)
            part = model(
                input_ids=ids[:, -1:],
                attention_mask=mask,
                position_ids=positions[:, -1:],
                use_cache=True,
                **{self._name: rows_of(cache, rows)},
            ).logits
            whole = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
            ).logits
        except UNFIT:
            return None
        if not alike(part[:, -1:], whole[:, -1:], torch.ones_like(whole[:, -1:])):
            return None
        self._bytes += cache_bytes(cache)
        return cache
