"""Detection: counting which experts a model really uses on the two sides of contrast pairs, exact, streaming,
in padded batches, and resumable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from steersman.errors import ModelError, PairsError
from steersman.experts.batches import count_batch, count_continuations
from steersman.experts.contrast import RoutingContrast
from steersman.experts.encoding import counted_tokens
from steersman.experts.moments import Integers
from steersman.experts.strata import POSITION_STRATA, stratum_of
from steersman.experts.tally import Counted, Tally, Weighting
from steersman.models.architecture import RouterSite, find_routers, read_architecture
from steersman.models.encoding import EncodedPair, EncodedPairs
from steersman.models.identity import model_name, weights_id
from steersman.models.reading import evaluating
from steersman.pairs import ContrastPairs, Part, load_pairs
from steersman.progress import Progress
from steersman.shards import Shard
from steersman.steering import Architecture

WINDOW_BATCHES = 16
"""Texts are sorted by length within windows of this many batches: little padding, bounded memory."""

Pairs = ContrastPairs | str | Path | Iterable[dict[str, Any]]

MOST_REPLICATES = 10_000
"""Each keeps counts of its own: more would fill memory before they told more."""


@dataclass(frozen=True)
class _Options:
    """How to count."""

    weighting: Weighting
    counted: Counted
    new_tokens: int
    starts: tuple[int, ...] | None
    bootstrap: int
    shard: Shard | None
    batch_size: int
    truncate: bool


def detect_experts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
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
        model: A transformers Mixture-of-Experts model.
        tokenizer: Its (fast) tokenizer.
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
            context; or an option is unknown.
        ArtifactError: `checkpoint` holds progress that is not to be resumed, or another run's.
    """
    options = _options(
        weighting, tokens, generate, stratify, bootstrap, shard, batch_size=batch_size, truncate=truncate
    )
    sources = {"pairs": pairs if isinstance(pairs, ContrastPairs) else load_pairs(pairs)}
    if adjust is not None:
        sources["adjust"] = adjust if isinstance(adjust, ContrastPairs) else load_pairs(adjust)
    sites = countable_routers(model)
    identity = weights_id(model)  # before the work: it may have none
    architecture = read_architecture(model)
    encoded = {
        name: _encoded(model, tokenizer, source, options, progress) for name, source in sources.items()
    }
    saved = None
    if checkpoint is not None:
        run = _run_of(model, architecture, identity, sources, encoded, options)
        saved = Progress(checkpoint, run, _tally_reader(options.weighting), resume=resume)
    tallies = _tallies(model, tokenizer, sites, encoded, options, saved, progress)
    contrasts = {
        name: _contrast(model, architecture, identity, source, encoded[name].skipped, tallies[name], options)
        for name, source in sources.items()
    }
    for of_source in encoded.values():
        of_source.close()
    return contrasts["pairs"].adjusted_by(contrasts.get("adjust"))


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


def _options(
    weighting: Weighting,
    tokens: Part,
    generate: int,
    stratify: str | None,
    bootstrap: int,
    shard: str | None,
    *,
    batch_size: int,
    truncate: bool,
) -> _Options:
    for name, value, known in (
        ("weighting", weighting, ("token", "pair")),
        ("tokens", tokens, ("target", "prompt", "answer")),
        ("stratify", stratify, (None, "position")),
    ):
        if value not in known:
            words = " or ".join(repr(word) for word in known if word is not None)
            raise PairsError(f"{name}={value!r} is unknown: use {words}")
    for name, number, least in (
        ("batch_size", batch_size, 1),
        ("generate", generate, 0),
        ("bootstrap", bootstrap, 0),
    ):
        if number < least:
            raise PairsError(f"{name} is {number}: give {least} or more")
    if bootstrap > MOST_REPLICATES:
        raise PairsError(
            f"bootstrap is {bootstrap}: give at most {MOST_REPLICATES}; 1000 tell a share to within 0.03"
        )
    if generate and tokens != "target":
        raise PairsError(f"generate counts what the model writes: leave out tokens={tokens!r}")
    if stratify and weighting == "pair":
        raise PairsError("strata weigh tokens by position: leave out weighting='pair', or stratify")
    return _Options(
        weighting=weighting,
        counted="generated" if generate else tokens,
        new_tokens=generate,
        starts=POSITION_STRATA if stratify else None,
        bootstrap=bootstrap,
        shard=None if shard is None else Shard.parse(shard),
        batch_size=batch_size,
        truncate=truncate,
    )


def _encoded(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: ContrastPairs,
    options: _Options,
    progress: bool,
) -> EncodedPairs:
    return EncodedPairs(
        model,
        pairs,
        counted_tokens(model, tokenizer, options.counted, options.new_tokens),
        truncate=options.truncate,
        shard=options.shard,
        progress=progress,
    )


def _run_of(
    model: nn.Module,
    architecture: Architecture,
    identity: str,
    sources: dict[str, ContrastPairs],
    encoded: dict[str, EncodedPairs],
    options: _Options,
) -> dict[str, Any]:
    """Everything that the counts depend on, by words that an error can use."""
    parameter = next(model.parameters())
    return {
        "weights": identity,
        "architecture": architecture.id,
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
        "versions": {name: version(name) for name in ("steersman", "torch", "transformers")},
        "pairs": {name: source.sha256 for name, source in sources.items()},
        "tokenization": {name: of_source.sha256 for name, of_source in encoded.items()},
        "weighting": options.weighting,
        "tokens": options.counted,
        "generate": options.new_tokens,
        "stratify": None if options.starts is None else list(options.starts),
        "bootstrap": options.bootstrap,
        "shard": None if options.shard is None else str(options.shard),
        "batch size": options.batch_size,
        "truncate": options.truncate,
    }


def _tally_reader(weighting: Weighting) -> Callable[[dict[str, Any], dict[str, Any]], Tally]:
    return lambda tensors, facts: Tally.from_tensors(tensors, facts, weighting)


def _tallies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sites: list[RouterSite],
    encoded: dict[str, EncodedPairs],
    options: _Options,
    saved: Progress[Tally] | None,
    progress: bool,
) -> dict[str, Tally]:
    """Count every source, one after the other."""
    experts = max(site.facts.experts for site in sites)
    tallies: dict[str, Tally] = {}
    total, before = sum(map(len, encoded.values())), dict(saved.saved) if saved is not None else {}
    with (
        evaluating(model),
        tqdm(total=total, desc="detect", unit="pair", delay=1, disable=not progress) as bar,
    ):
        for name, pairs in encoded.items():
            tally = before.get(name) or Tally.empty(
                len(sites), experts, options.weighting, options.starts, options.bootstrap
            )
            tallies[name] = tally
            bar.update(tally.done)
            size = max(1, WINDOW_BATCHES * options.batch_size // 2)
            for start in range(tally.done, len(pairs), size):
                window = pairs[start : start + size]
                counts, tokens = _count_texts(model, tokenizer, sites, window, options)
                tally.add(np.array([pair.cluster for pair in window], np.int64), counts, tokens)
                bar.update(len(window))
                if saved is not None:
                    saved.save(tallies)
        if saved is not None:
            saved.save(tallies, at_once=True)
    for tally in tallies.values():
        tally.close()
    return tallies


def _count_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sites: list[RouterSite],
    window: list[EncodedPair],
    options: _Options,
) -> tuple[Any, Integers]:
    """A window's activations [pairs, 2, strata, layers, experts] and tokens [pairs, 2, strata]."""
    texts = [(place, side) for place in range(len(window)) for side in (0, 1)]
    texts.sort(key=lambda text: len(window[text[0]].ids[text[1]]))
    strata = len(options.starts or (0,))
    experts = max(site.facts.experts for site in sites)
    # A text has fewer tokens than 2^31.
    counts = np.zeros((len(window), 2, strata, len(sites), experts), np.int32)
    tokens = np.zeros((len(window), 2, strata), np.int64)
    for start in range(0, len(texts), options.batch_size):
        batch = texts[start : start + options.batch_size]
        counted, lengths = _count_batch(
            model, tokenizer, sites, [(window[place], side) for place, side in batch], options
        )
        places, sides = (np.array(values) for values in zip(*batch, strict=True))
        counts[places, sides], tokens[places, sides] = counted, lengths
    return counts, tokens


def _count_batch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sites: list[RouterSite],
    batch: list[tuple[EncodedPair, int]],
    options: _Options,
) -> tuple[Integers, Integers]:
    """Activations [texts, strata, layers, experts] and tokens [texts, strata] of one batch."""
    starts = options.starts or (0,)
    ids = [pair.ids[side] for pair, side in batch]
    if options.counted == "generated":
        stratum = stratum_of(np.arange(options.new_tokens), starts)
        return count_continuations(model, tokenizer, sites, ids, options.new_tokens, stratum, len(starts))
    targets = [pair.target[side] for pair, side in batch]
    if options.starts is None:
        return count_batch(model, sites, ids, targets), np.array([[len(target)] for target in targets])
    strata = [stratum_of(np.arange(len(target)), starts) for target in targets]
    tokens = np.stack([np.bincount(of_text, minlength=len(starts)) for of_text in strata])
    return count_batch(model, sites, ids, targets, strata, len(starts)), tokens


def _contrast(
    model: nn.Module,
    architecture: Architecture,
    identity: str,
    source: ContrastPairs,
    skipped: int,
    tally: Tally,
    options: _Options,
) -> RoutingContrast:
    if not tally.counted:
        raise PairsError(f"{source.name}: no pair is left to count: the model ends every text at once")
    activations = tally.activations.copy()
    steerable = [router for router in architecture.routers if router.steerable]
    for row, router in enumerate(steerable):
        activations[:, row, router.experts :] = -1
    name, revision = model_name(model)
    shard = {} if options.shard is None else {"shard": str(options.shard)}
    return RoutingContrast(
        activations=activations,
        tokens=tally.tokens,
        sums=tally.sums,
        architecture=architecture,
        weights_id=identity,
        cluster_ids=np.array(sorted(tally.cluster_ids), dtype=np.int64),
        pairs=tally.counted,
        skipped=skipped + tally.done - tally.counted,
        weighting=options.weighting,
        model=name,
        revision=revision,
        made_from=({"kind": "pairs", "name": source.name, "sha256": source.sha256, **shard},),
        counted=options.counted,
        new_tokens=options.new_tokens,
        strata=tally.strata,
        replicates=tally.replicates,
    )
