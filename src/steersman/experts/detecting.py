"""Detection, whatever reads the texts: pairs are encoded, counted window by window, added up, and resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from steersman.chat_record import CHATS
from steersman.chats.format import NotedChats, template_of
from steersman.errors import PairsError
from steersman.experts.contrast import RoutingContrast
from steersman.experts.counting_options import Options
from steersman.experts.encoding import counted_tokens
from steersman.experts.moments import Integers
from steersman.experts.tally import Tally, Weighting
from steersman.models.architecture import RouterSite, read_architecture
from steersman.models.decoding import own_settings, require_repeatable
from steersman.models.encoding import EncodedPair, EncodedPairs
from steersman.models.identity import model_name, weights_id
from steersman.pairs import ContrastPairs, Rows, load_pairs
from steersman.progress import Progress
from steersman.steering import Architecture

Pairs = ContrastPairs | str | Path | Rows


class Reader(Protocol):
    """What reads texts and counts their experts: a model in transformers, or an engine."""

    model: nn.Module
    """The model as it is known by: its structure and its identity. Whether it has weights is the reader's."""
    tokenizer: PreTrainedTokenizerBase
    sites: list[RouterSite]
    """Its routers, by layer."""
    longest: int | None
    """Tokens of a text at most, if that is less than the model's own context."""
    source: Mapping[str, str]
    """What the counts' origin says beside the pairs; nothing for transformers."""

    def facts(self, options: Options) -> dict[str, Any]:
        """What counts may depend on, by words that an error can use."""

    def window(self, options: Options) -> int:
        """Pairs that are given to `count` at once."""

    def reading(self) -> AbstractContextManager[None]:
        """While texts are read."""

    def count(self, window: list[EncodedPair], options: Options) -> tuple[Any, Integers]:
        """Activations [pairs, 2, strata, layers, experts], and tokens [pairs, 2, strata]."""


def detect(
    reader: Reader,
    pairs: Pairs,
    options: Options,
    *,
    adjust: Pairs | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> RoutingContrast:
    """`detect_experts`, with whatever reads the texts.

    Raises:
        PairsError: a pair cannot be rendered, its target is not in its text, it is longer than what can be
            read, or both sides of every pair are the same tokens.
        ModelError: the model's own generation settings make what it writes depend on the machine.
        ArtifactError: `checkpoint` holds progress that is not to be resumed, or another run's.
    """
    sources = {"pairs": pairs if isinstance(pairs, ContrastPairs) else load_pairs(pairs)}
    if adjust is not None:
        sources["adjust"] = adjust if isinstance(adjust, ContrastPairs) else load_pairs(adjust)
    identity = weights_id(reader.model)  # before the work: it may have none
    if options.counted == "generated":
        require_repeatable(reader.model)
    architecture = read_architecture(reader.model)
    noted = NotedChats(reader.tokenizer)
    encoded = {name: _encoded(reader, source, options, progress) for name, source in sources.items()}
    chat = noted.record
    saved = None
    if checkpoint is not None:
        run = _run_of(reader, architecture, identity, sources, encoded, options)
        run |= {CHATS: chat.to_json()} if chat is not None else {}
        saved = Progress(checkpoint, run, _tally_reader(options.weighting), resume=resume)
    tallies = _tallies(reader, encoded, options, saved, progress)
    contrasts = {
        name: replace(
            _contrast(reader, architecture, identity, source, encoded[name], tallies[name], options),
            chat=chat,
        )
        for name, source in sources.items()
    }
    for of_source in encoded.values():
        of_source.close()
    return contrasts["pairs"].adjusted_by(contrasts.get("adjust"))


def _encoded(reader: Reader, pairs: ContrastPairs, options: Options, progress: bool) -> EncodedPairs:
    return EncodedPairs(
        reader.model,
        pairs,
        counted_tokens(
            reader.model, reader.tokenizer, options.counted, options.new_tokens, longest=reader.longest
        ),
        template=template_of(reader.tokenizer) is not None,
        truncate=options.truncate,
        shard=options.shard,
        progress=progress,
    )


def _run_of(
    reader: Reader,
    architecture: Architecture,
    identity: str,
    sources: dict[str, ContrastPairs],
    encoded: dict[str, EncodedPairs],
    options: Options,
) -> dict[str, Any]:
    """Everything that the counts depend on, by words that an error can use."""
    return {
        "weights": identity,
        "architecture": architecture.id,
        "pairs": {name: source.sha256 for name, source in sources.items()},
        "tokenization": {name: of_source.sha256 for name, of_source in encoded.items()},
        "weighting": options.weighting,
        "tokens": options.counted,
        "generate": options.new_tokens,
        "stratify": None if options.starts is None else list(options.starts),
        "bootstrap": options.bootstrap,
        "shard": None if options.shard is None else str(options.shard),
        "truncate": options.truncate,
        **_own_settings(reader, options),
        **reader.facts(options),
    }


def _own_settings(reader: Reader, options: Options) -> dict[str, Any]:
    """The checkpoint's own generation settings that act on what it writes, if it writes."""
    acting = own_settings(reader.model).acting if options.counted == "generated" else {}
    return {"generation": dict(acting)} if acting else {}


def _tally_reader(weighting: Weighting) -> Callable[[dict[str, Any], dict[str, Any]], Tally]:
    return lambda tensors, facts: Tally.from_tensors(tensors, facts, weighting)


def _tallies(
    reader: Reader,
    encoded: dict[str, EncodedPairs],
    options: Options,
    saved: Progress[Tally] | None,
    progress: bool,
) -> dict[str, Tally]:
    """Count every source, one after the other."""
    sites = reader.sites
    experts = max(site.facts.experts for site in sites)
    tallies: dict[str, Tally] = {}
    total, before = sum(map(len, encoded.values())), dict(saved.saved) if saved is not None else {}
    with (
        reader.reading(),
        tqdm(total=total, desc="detect", unit="pair", delay=1, disable=not progress) as bar,
    ):
        for name, pairs in encoded.items():
            tally = before.get(name) or Tally.empty(
                len(sites), experts, options.weighting, options.starts, options.bootstrap
            )
            tallies[name] = tally
            bar.update(tally.done)
            size = max(1, reader.window(options))
            for start in range(tally.done, len(pairs), size):
                window = pairs[start : start + size]
                counts, tokens = reader.count(window, options)
                tally.add(np.array([pair.cluster for pair in window], np.int64), counts, tokens)
                bar.update(len(window))
                if saved is not None:
                    saved.save(tallies)
        if saved is not None:
            saved.save(tallies, at_once=True)
    for tally in tallies.values():
        tally.close()
    return tallies


def _contrast(
    reader: Reader,
    architecture: Architecture,
    identity: str,
    source: ContrastPairs,
    encoded: EncodedPairs,
    tally: Tally,
    options: Options,
) -> RoutingContrast:
    if not tally.counted:
        raise PairsError(f"{source.name}: no pair is left to count: the model ends every text at once")
    activations = tally.activations.copy()
    steerable = [router for router in architecture.routers if router.steerable]
    for row, router in enumerate(steerable):
        activations[:, row, router.experts :] = -1
    name, revision = model_name(reader.model)
    shard = {} if options.shard is None else {"shard": str(options.shard)}
    return RoutingContrast(
        activations=activations,
        tokens=tally.tokens,
        sums=tally.sums,
        architecture=architecture,
        weights_id=identity,
        cluster_ids=np.array(sorted(tally.cluster_ids), dtype=np.int64),
        pairs=tally.counted,
        skipped=encoded.skipped + tally.done - tally.counted,
        alike=encoded.alike,
        weighting=options.weighting,
        model=name,
        revision=revision,
        made_from=(
            {
                "kind": "pairs",
                "name": source.name,
                "sha256": source.sha256,
                **reader.source,
                **_own_settings(reader, options),
                **shard,
            },
        ),
        counted=options.counted,
        new_tokens=options.new_tokens,
        strata=tally.strata,
        replicates=tally.replicates,
    )
