"""Counting which experts a model really uses on the target tokens of contrast pairs: exact, streaming, in
padded batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from steersman.errors import ModelError, PairsError
from steersman.experts.contrast import RoutingContrast, Weighting
from steersman.experts.moments import Integers
from steersman.experts.recording import recording
from steersman.experts.risk_difference import ClusterSums
from steersman.models.architecture import (
    RouterSite,
    check_ids,
    decoder_config,
    find_decoder,
    find_routers,
    read_architecture,
)
from steersman.models.identity import model_name, weights_id
from steersman.pairs import ContrastPair, ContrastPairs, TruncatedTarget, encode, load_pairs

WINDOW_BATCHES = 16
"""Texts are sorted by length within windows of this many batches: little padding, bounded memory."""
PAIR_UNIT = 1 << 40
"""With `weighting="pair"` a rate is counted in this fraction, so that sums stay exact integers."""


def detect_experts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: ContrastPairs | str | Path | Iterable[dict[str, Any]],
    *,
    weighting: Weighting = "token",
    batch_size: int = 16,
    truncate: bool = False,
    progress: bool = False,
) -> RoutingContrast:
    """Count how often each expert is in the top-k that the model really used, over the target tokens of both
    sides.

    SteerMoE (arXiv 2509.09660), section 3.1. Memory does not grow with the number of pairs.

    Args:
        model: A transformers Mixture-of-Experts model.
        tokenizer: Its (fast) tokenizer.
        pairs: Contrast pairs, or what `load_pairs` takes.
        weighting: `token`: every target token counts the same (the paper); `pair`: every pair does.
        batch_size: Texts in one forward.
        truncate: Leave out pairs with a side longer than the model's context, and count them in `skipped`.
        progress: Show a progress bar on stderr where it takes more than a second.

    Raises:
        ModelError: the model has no routers, or one that cannot be counted.
        PairsError: a pair cannot be rendered, its target is not in its text, or it is longer than the
            context.
    """
    if weighting not in ("token", "pair"):
        raise PairsError(f"weighting={weighting!r} is unknown: use 'token' or 'pair'")
    if batch_size < 1:
        raise PairsError(f"batch_size is {batch_size}: give 1 or more")
    if not isinstance(pairs, ContrastPairs):
        pairs = load_pairs(pairs)
    sites = countable_routers(model)
    longest = getattr(decoder_config(model), "max_position_embeddings", None)
    identity = weights_id(model)  # before the work: it may have none
    kept = _usable(model, tokenizer, pairs, longest, truncate)
    counter = _ClusterCounter(len(sites), max(site.facts.experts for site in sites), weighting)
    with (
        evaluating(model),
        tqdm(total=len(kept), desc="detect", unit="pair", delay=1, disable=not progress) as bar,
    ):
        for part in _windows(kept, WINDOW_BATCHES * batch_size):
            window = [_encode_pair(tokenizer, pairs[place], longest) for place in part]
            counter.add_window(window, _count_texts(model, sites, window, batch_size))
            bar.update(len(window))
    counter.close()
    name, revision = model_name(model)
    for row, site in enumerate(sites):
        counter.activations[:, row, site.facts.experts :] = -1
    return RoutingContrast(
        activations=counter.activations,
        tokens=counter.tokens,
        sums=counter.sums,
        architecture=read_architecture(model),
        weights_id=identity,
        cluster_ids=np.array(sorted(counter.cluster_ids), dtype=np.int64),
        pairs=len(kept),
        skipped=len(pairs) - len(kept),
        weighting=weighting,
        model=name,
        revision=revision,
        made_from=({"kind": "pairs", "name": pairs.name, "sha256": pairs.sha256},),
    )


def countable_routers(model: nn.Module) -> list[RouterSite]:
    """The routers whose choices can be counted, by layer. Raises `ModelError` where there is none."""
    found = find_routers(model)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no routers: expert steering needs a Mixture-of-Experts model"
        )
    sites = [site for site in found if site.facts.steerable]
    if not sites:
        raise ModelError(f"no router of {type(model).__name__} can be steered: {found[0].facts.reason}")
    return sites


@dataclass(frozen=True)
class _EncodedPair:
    """Both sides of a pair as token ids and target positions (int32), and its cluster."""

    ids: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    target: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    cluster: str


def _usable(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: ContrastPairs,
    longest: int | None,
    truncate: bool,
) -> list[int]:
    """Places of the pairs to count, those of a cluster one after another.

    All are encoded once before any is counted, so that a bad one is found before any work is done; what was
    encoded is not kept, so that memory does not grow with it.
    """
    first: dict[str, int] = {}  # place of each cluster's first pair
    kept: list[tuple[int, int]] = []
    for place, pair in enumerate(pairs):
        try:
            encoded = _encode_pair(tokenizer, pair, longest)
        except TruncatedTarget:
            if not truncate:
                raise
        else:
            check_ids(model, max(int(ids.max()) for ids in encoded.ids), pair.where)
            kept.append((first.setdefault(pair.cluster, place), place))
    if not kept:
        raise PairsError(f"{pairs.name}: no pair is left to count")
    return [place for _, place in sorted(kept)]


def _encode_pair(tokenizer: PreTrainedTokenizerBase, pair: ContrastPair, longest: int | None) -> _EncodedPair:
    sides = [
        encode(tokenizer, content, target, where=f"{pair.where}, {side} side", max_length=longest)
        for side, content, target in (
            ("positive", pair.positive, pair.positive_target),
            ("negative", pair.negative, pair.negative_target),
        )
    ]
    return _EncodedPair(
        ids=(np.array(sides[0].ids, np.int32), np.array(sides[1].ids, np.int32)),
        target=(np.array(sides[0].target, np.int32), np.array(sides[1].target, np.int32)),
        cluster=pair.cluster,
    )


def _windows(places: list[int], texts: int) -> Iterator[list[int]]:
    size = max(1, texts // 2)
    for start in range(0, len(places), size):
        yield places[start : start + size]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and router jitter, which would change choices; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _count_texts(
    model: nn.Module, sites: list[RouterSite], window: list[_EncodedPair], batch_size: int
) -> Integers:
    """Activations of each text of a window: int64 [pairs, 2, layers, experts]."""
    texts = [(place, side) for place in range(len(window)) for side in (0, 1)]
    texts.sort(key=lambda text: len(window[text[0]].ids[text[1]]))
    experts = max(site.facts.experts for site in sites)
    counts = np.zeros((len(window), 2, len(sites), experts), np.int64)
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        ids = [window[place].ids[side] for place, side in batch]
        targets = [window[place].target[side] for place, side in batch]
        counted = count_batch(model, sites, ids, targets)
        for row, (place, side) in enumerate(batch):
            counts[place, side] = counted[row]
    return counts


def count_batch(
    model: nn.Module,
    sites: list[RouterSite],
    ids: list[np.ndarray[Any, Any]],
    targets: list[np.ndarray[Any, Any]],
) -> Integers:
    """Run texts through the decoder in one padded batch and count the experts of their target tokens.

    Args:
        ids: Token ids of each text.
        targets: Positions of the target tokens of each text.

    Returns:
        int64 [texts, layers, experts].
    """
    decoder = find_decoder(model)
    device = next(decoder.parameters()).device
    if device.type == "meta":  # offloaded: accelerate brings inputs to where each layer runs
        device = torch.device("cpu")
    rows, columns = len(ids), max(map(len, ids))
    tokens = np.zeros((rows, columns), np.int64)
    mask = np.zeros((rows, columns), np.int64)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = text
        mask[row, : len(text)] = 1
    places = np.concatenate([row * columns + target.astype(np.int64) for row, target in enumerate(targets)])
    owners = np.repeat(np.arange(rows), [len(target) for target in targets])
    experts = max(site.facts.experts for site in sites)
    place = torch.from_numpy(places).to(device)
    owner = torch.from_numpy(owners).to(device)
    recorded: dict[int, Tensor] = {}

    def count(number: int, chosen: Tensor) -> None:
        if chosen.shape[0] != rows * columns:
            raise ModelError(
                f"layer {sites[number].facts.layer}: {chosen.shape[0]} tokens reached the experts, "
                f"{rows * columns} were given"
            )
        keys = owner.to(chosen.device)[:, None] * experts + chosen[place.to(chosen.device)]
        recorded[number] = torch.bincount(keys.flatten(), minlength=rows * experts).view(rows, experts)

    with recording(sites, count), torch.no_grad():
        decoder(
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            use_cache=False,
        )
    return torch.stack([recorded[row].to(device) for row in range(len(sites))], dim=1).cpu().numpy()


class _ClusterCounter:
    """Adds texts' counts up to clusters, and closed clusters to the sums."""

    def __init__(self, layers: int, experts: int, weighting: Weighting) -> None:
        self.activations: Integers = np.zeros((2, layers, experts), np.int64)
        self.tokens: Integers = np.zeros(2, np.int64)
        self.sums = ClusterSums.zeros(layers, experts, object if weighting == "pair" else np.int64)
        self.cluster_ids: list[int] = []
        self._weighting = weighting
        self._open: tuple[str, Any, list[int]] | None = None

    def add_window(self, window: list[_EncodedPair], counts: Integers) -> None:
        """Add pairs, those of a cluster one after another, with their counts [pairs, 2, layers, experts]."""
        for pair, counted in zip(window, counts, strict=True):
            lengths = [len(pair.target[0]), len(pair.target[1])]
            self.activations += counted
            self.tokens += np.array(lengths)
            if self._open is None or self._open[0] != pair.cluster:
                self.close()
                self._open = (pair.cluster, 0, [0, 0])
            cluster, total, weights = self._open
            if self._weighting == "pair":
                counted, lengths = _as_rates(counted, lengths)
            weights = [weight + length for weight, length in zip(weights, lengths, strict=True)]
            self._open = (cluster, total + counted, weights)

    def close(self) -> None:
        """Enter the open cluster, if any, into the sums."""
        if self._open is not None:
            cluster, counted, weights = self._open
            self.sums.add(counted[0], weights[0], counted[1], weights[1])
            self.cluster_ids.append(hash_of_cluster(cluster))
            self._open = None


def _as_rates(counted: Integers, lengths: list[int]) -> tuple[Any, list[int]]:
    """A pair's counts as rates in `PAIR_UNIT`s, rounded to the nearest (Python integers), and the weight
    of a pair.
    """
    per_side = [
        (2 * counted[side].astype(object) * PAIR_UNIT + lengths[side]) // (2 * lengths[side])
        for side in (0, 1)
    ]
    return np.stack(per_side), [PAIR_UNIT, PAIR_UNIT]


def hash_of_cluster(cluster: str) -> int:
    """A signed 64-bit hash of a cluster's name."""
    return int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:8], "little", signed=True)
