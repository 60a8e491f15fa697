"""Detection with a transformers model: which experts it really uses on the sides of pairs, in batches."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from steersman.experts.batches import count_batch, count_continuations
from steersman.experts.contrast import RoutingContrast
from steersman.experts.counting_options import Options, options_of
from steersman.experts.detecting import Pairs, detect
from steersman.experts.moments import Integers
from steersman.experts.recording import countable_routers
from steersman.experts.strata import stratum_of
from steersman.experts.tally import Weighting
from steersman.models.encoding import EncodedPair
from steersman.models.loading import Named, open_named
from steersman.models.reading import evaluating
from steersman.rendering import Part

WINDOW_BATCHES = 16
"""Texts are sorted by length within windows of this many batches: little padding, bounded memory."""


def detect_experts(
    model: Named,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: Pairs,
    *,
    weighting: Weighting = "token",
    tokens: Part = "target",
    generate: int = 0,
    stratify: Literal["position"] | None = None,
    adjust: Pairs | None = None,
    bootstrap: int = 0,
    shard: str | None = None,
    batch_size: int = 16,
    truncate: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> RoutingContrast:
    """Count how often each expert is in the top-k that the model really used, over tokens of both sides.

    SteerMoE (arXiv 2509.09660), section 3.1. Memory does not grow with the number of pairs, but for a few
    numbers a pair.

    Args:
        model: A transformers Mixture-of-Experts model, or its name.
        tokenizer: Its (fast) tokenizer; None takes that of a model named.
        pairs: Contrast pairs, or what `load_pairs` takes.
        weighting: `token`: every token counts the same (the paper); `pair`: every pair does.
        tokens: Which are counted: of the `target`; of the final `answer` of the chats; or of the `prompt`,
            all before it.
        generate: Count the model's own words instead: the tokens, at most so many, with which it continues
            each side's prompt, greedily, as they are fed back to it. Ends are not counted, and pairs with a
            side that ends at once are left out and `skipped`.
        stratify: With `position` also compare tokens at like positions alone (`RoutingContrast.stratified`).
        adjust: Other pairs, whose contrast is a nuisance: it is counted too, and regressed out
            (`RoutingContrast.adjusted`).
        bootstrap: Replicates to count beside (`RoutingContrast.stability`); 200 tell shares to within 0.07.
        shard: `"I/N"`: count part I of N. No cluster is split, and `merge_contrasts` of all N parts is the
            very result of one run.
        batch_size: Texts in one forward.
        truncate: Leave out pairs with a side longer than the model's context, and count them in `skipped`.
        checkpoint: A folder to save progress in, at most a fiftieth of the time. It is yours to remove when
            the result is safe.
        resume: Go on from what is saved in `checkpoint`, if anything is; otherwise that is an error.
        progress: Show a progress bar on stderr where it takes more than a second.

    Raises:
        ModelError: the model has no routers, or one that cannot be counted.
        PairsError: a pair cannot be rendered, its target is not in its text, or it is longer than the
            context; both sides of every pair are the same tokens up to the last that is counted (where only
            some are, they are left out and counted in `alike`); or an option is unknown.
        ArtifactError: `checkpoint` holds progress that is not to be resumed, or another run's.

    Example:
        >>> pairs = steersman.load_pairs("lab:refusal/train")[:24]
        >>> contrast = steersman.detect_experts("lab:moe", None, pairs)
        >>> contrast.select(top=2).strengths
        {0: {5: 1.0}, 1: {4: 1.0}}
    """
    model, tokenizer = open_named(model, tokenizer)
    options = options_of(
        weighting, tokens, generate, stratify, bootstrap, shard, batch_size=batch_size, truncate=truncate
    )
    return detect(
        InTransformers(model, tokenizer),
        pairs,
        options,
        adjust=adjust,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )


class InTransformers:
    """Reads texts with a transformers model, in padded batches of texts of like length."""

    longest: int | None = None
    source: Mapping[str, str] = MappingProxyType({})

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.sites = countable_routers(model)

    def facts(self, options: Options) -> dict[str, Any]:
        """The number format, the device, the libraries; and how texts are padded together."""
        parameter = next(self.model.parameters())
        return {
            "dtype": str(parameter.dtype),
            "device": parameter.device.type,
            "versions": {name: version(name) for name in ("steersman", "torch", "transformers")},
            "batch size": options.batch_size,
        }

    def window(self, options: Options) -> int:
        """So many pairs that sorting their texts by length leaves little padding."""
        return WINDOW_BATCHES * options.batch_size // 2

    def reading(self) -> AbstractContextManager[None]:
        """Without dropout and router jitter."""
        return evaluating(self.model)

    def count(self, window: list[EncodedPair], options: Options) -> tuple[Any, Integers]:
        """A window's activations [pairs, 2, strata, layers, experts] and tokens [pairs, 2, strata]."""
        sites = self.sites
        texts = [(place, side) for place in range(len(window)) for side in (0, 1)]
        texts.sort(key=lambda text: len(window[text[0]].ids[text[1]]))
        strata = len(options.parts)
        experts = max(site.facts.experts for site in sites)
        # A text has fewer tokens than 2^31.
        counts = np.zeros((len(window), 2, strata, len(sites), experts), np.int32)
        tokens = np.zeros((len(window), 2, strata), np.int64)
        for start in range(0, len(texts), options.batch_size):
            batch = texts[start : start + options.batch_size]
            counted, lengths = self._count_batch([(window[place], side) for place, side in batch], options)
            places, sides = (np.array(values) for values in zip(*batch, strict=True))
            counts[places, sides], tokens[places, sides] = counted, lengths
        return counts, tokens

    def _count_batch(
        self, batch: list[tuple[EncodedPair, int]], options: Options
    ) -> tuple[Integers, Integers]:
        """Activations [texts, strata, layers, experts] and tokens [texts, strata] of one batch."""
        model, sites, number = self.model, self.sites, len(options.parts)
        ids = [pair.ids[side] for pair, side in batch]
        if options.counted == "generated":
            stratum = stratum_of(np.arange(options.new_tokens), options.parts)
            return count_continuations(model, self.tokenizer, sites, ids, options.new_tokens, stratum, number)
        targets = [pair.target[side] for pair, side in batch]
        if options.starts is None:
            return count_batch(model, sites, ids, targets), options.lengths(targets)
        strata = options.strata_of(targets)
        return count_batch(model, sites, ids, targets, strata, number), options.lengths(targets)
