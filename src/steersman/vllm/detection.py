"""Detection on the engine: the counts of a transformers model, made on the device while it prefills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from steersman.errors import ServingError, SteeringNotApplied
from steersman.experts.counting_options import Options, options_of
from steersman.experts.detecting import Pairs, detect
from steersman.experts.recording import countable_routers
from steersman.models.decoding import text_ends
from steersman.models.loading import load_tokenizer
from steersman.vllm.backend import ask, structure_of
from steersman.vllm.counting import CountedText, Run, merged
from steersman.vllm.settings import KEY
from steersman.vllm.writing import own_of_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steersman.experts.contrast import RoutingContrast
    from steersman.experts.moments import Integers
    from steersman.experts.tally import Weighting
    from steersman.models.encoding import EncodedPair
    from steersman.rendering import Part

PLACES = 1024
"""Texts that are counted at a time, where the engine is opened for it."""


def detect_experts(
    llm: Any,
    pairs: Pairs,
    *,
    model: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weighting: Weighting = "token",
    tokens: Part = "target",
    generate: int = 0,
    stratify: Literal["position"] | None = None,
    adjust: Pairs | None = None,
    bootstrap: int = 0,
    shard: str | None = None,
    truncate: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> RoutingContrast:
    """Count how often each expert is in the top-k that the engine really used, over tokens of both sides.

    As `steersman.detect_experts`, whose other arguments mean the same. A text has at most one token less
    than the engine's `max_model_len`, since each is answered with one. With `generate` the engine first
    writes, and then reads what it has written: the counts are those of reading it.

    Args:
        llm: An engine (`vllm.LLM`) that is configured to count:
            `additional_config={"steersman": {"count": 1024}}`.
        pairs: Contrast pairs, or what `steersman.load_pairs` takes.
        model: The served model as transformers knows it, for its structure and identity alone; by default as
            `load_structure` opens it from where the engine has it.
        tokenizer: Its tokenizer; by default from the same place.

    Raises:
        ServingError: the engine does not count, or not all of the model's routers.
        SteeringNotApplied: a target token was not counted, or twice: the engine did something unknown.
        ModelError, PairsError, ArtifactError: as `steersman.detect_experts`.
    """
    options = options_of(
        weighting, tokens, generate, stratify, bootstrap, shard, batch_size=1, truncate=truncate
    )
    reader = InEngine(llm, model, tokenizer)
    return detect(
        reader, pairs, options, adjust=adjust, checkpoint=checkpoint, resume=resume, progress=progress
    )


class InEngine:
    """Reads texts with an engine; see `experts.detecting.Reader`."""

    def __init__(self, llm: Any, model: nn.Module | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._llm, self._config = llm, llm.llm_engine.vllm_config
        registry = getattr(llm.llm_engine.input_processor, KEY, None)
        self._places: int = 0 if registry is None else registry.settings.count
        if not self._places:
            raise ServingError(
                'this engine does not count: open it with additional_config={"steersman": {"count": 1024}}'
            )
        served = self._config.model_config
        self.model = structure_of(served.model, served.revision) if model is None else model
        self.tokenizer = (
            load_tokenizer(served.model, revision=served.revision) if tokenizer is None else tokenizer
        )
        self.sites = countable_routers(self.model)
        self.longest: int | None = served.max_model_len - 1
        self.source: Mapping[str, str] = {"engine": f"vllm {engine_version()}"}

    def facts(self, options: Options) -> dict[str, Any]:
        """The number format, the device, how the model is spread, the libraries."""
        parallel = self._config.parallel_config
        return {
            "dtype": str(self._config.model_config.dtype),
            "device": str(self._config.device_config.device_type),
            "engine": self.source["engine"],
            "quantization": self._config.model_config.quantization,
            "ranks": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
            "versions": {name: version(name) for name in ("steersman", "torch", "transformers")},
        }

    def window(self, options: Options) -> int:
        """As many pairs as there is room for."""
        needed = 2 * len(options.parts)
        if self._places < needed:
            raise ServingError(
                f"a pair takes {needed} places for counts, and this engine has {self._places}: open it with "
                'a larger "count"'
            )
        return self._places // needed

    def reading(self) -> AbstractContextManager[None]:
        """An engine always evaluates."""
        return nullcontext()

    def count(self, window: list[EncodedPair], options: Options) -> tuple[Any, Integers]:
        """A window's activations [pairs, 2, strata, layers, experts] and tokens [pairs, 2, strata]."""
        ids = [pair.ids[side].tolist() for pair in window for side in (0, 1)]
        targets: Sequence[Any] = [pair.target[side] for pair in window for side in (0, 1)]
        if options.counted == "generated":
            ids, targets = self._continued(ids, options.new_tokens)
        lengths = options.lengths(targets)
        parts = len(options.parts)
        texts = [
            CountedText(runs_of(target, strata, number * parts))
            for number, (target, strata) in enumerate(zip(targets, options.strata_of(targets), strict=True))
        ]
        counts = self._read(ids, texts, len(texts) * parts)
        top_k = np.array([site.facts.top_k for site in self.sites])
        if (counts.sum(axis=-1) != lengths.reshape(-1, 1) * top_k).any():
            raise SteeringNotApplied(
                "the engine has not counted each target token once: these counts must not be used"
            )
        shape = (len(window), 2, parts)
        return counts.reshape(*shape, *counts.shape[1:]), lengths.reshape(shape)

    def _read(self, ids: list[list[int]], texts: Sequence[CountedText], places: int) -> Any:
        """Counts int32 [places, layers, experts] of texts that are read once."""
        asked = [(prompt, text) for prompt, text in zip(ids, texts, strict=True) if text.runs]
        ask(
            self._llm,
            [prompt for prompt, _ in asked],
            [_settings(1, extra_args={KEY: text}) for _, text in asked],
        )
        answers = self._llm.collective_rpc("steersman_counts", args=(places,))
        layers = [site.facts.layer for site in self.sites]
        return merged(answers, layers, places, max(site.facts.experts for site in self.sites))

    def _continued(self, ids: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[Any]]:
        """Prompts with what the engine writes after them, up to its end, and the positions of that."""
        ends = text_ends(self.model, self.tokenizer)
        settings = _settings(new_tokens, stop_token_ids=ends, **own_of_engine(self.model))
        outputs = ask(self._llm, ids, [settings] * len(ids))
        written = [list(output.outputs[0].token_ids) for output in outputs]
        kept = [text[: next((n for n, one in enumerate(text) if one in ends), None)] for text in written]
        targets = [
            np.arange(len(prompt), len(prompt) + len(text)) for prompt, text in zip(ids, kept, strict=True)
        ]
        return [prompt + text for prompt, text in zip(ids, kept, strict=True)], targets


def runs_of(target: Any, strata: Any, place: int) -> tuple[Run, ...]:
    """Target positions, ascending, and the stratum of each, as runs: (first, one past the last, place)."""
    if not len(target):
        return ()
    breaks = np.flatnonzero((np.diff(target) != 1) | (np.diff(strata) != 0)) + 1
    firsts = np.concatenate([[0], breaks])
    lasts = np.concatenate([breaks, [len(target)]]) - 1
    return tuple(
        (int(target[a]), int(target[b]) + 1, place + int(strata[a]))
        for a, b in zip(firsts, lasts, strict=True)
    )


def _settings(tokens: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)


def engine_version() -> str:
    """The version of vLLM that is installed."""
    import vllm

    return str(vllm.__version__)
