"""A checkpoint's own generation settings: which act on answers, which are set aside, which are refused.

Answers are written one way for all: greedily or sampled, one token after the other, with a cache. What a
checkpoint's `generation_config.json` asks for beside that falls into kinds, below: every field of
transformers' `GenerationConfig` is of one.
"""

from __future__ import annotations

import json
import operator
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import stopping_criteria

from steersman.errors import ModelError, SteersmanError

ACTS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,  # of the prompt's tokens, where a model has no encoder
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "min_new_tokens": None,
    "exponential_decay_length_penalty": None,
    "forced_eos_token_id": None,
    "stop_strings": None,
    "remove_invalid_values": False,
    "watermarking_config": None,
}
"""What changes which tokens are written, whether greedily or not, by the value at which it does nothing. It
acts, and is said.
"""

SAMPLED: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""What cuts the distribution that is sampled from. It acts, and is said, where text is written for reading;
figures are of the whole distribution.
"""

ASIDE: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "guidance_scale": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "is_assistant": False,
    "use_mtp": None,
    "speculation_type": None,
    "token_healing": False,  # writes the end of the prompt anew
    "forced_bos_token_id": None,  # where a prompt has one token, padding included
    "use_cache": True,
    "cache_implementation": None,
    "cache_config": None,
    "max_cache_len": None,
    "prefill_chunk_size": None,
    "low_memory": None,
    "num_return_sequences": 1,
}
"""Other ways of decoding, and of holding the cache, some of which move last bits: this takes their place."""

REFUSED: dict[str, tuple[Any, str]] = {
    "max_time": (None, "ends answers by the clock, so that figures would depend on the machine"),
    "min_length": (0, "counts the prompt with its padding, so that figures would depend on the batch"),
}
"""What gives other answers on another machine or in another batch. Figures are refused; where text is written
for reading, this takes its place and that is said.
"""

OURS = frozenset(
    {"max_new_tokens", "max_length", "do_sample", "temperature", "return_dict_in_generate", "pad_token_id"}
    | {"output_attentions", "output_hidden_states", "output_scores", "output_logits"}
)
"""What whoever asks decides."""

IDLE = frozenset(
    # of beams, of an assistant, of an encoder: there is none
    {"early_stopping", "length_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule"}
    | {"assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind"}
    | {"target_lookbehind", "assistant_ensemble_weight", "decoder_start_token_id", "bos_token_id"}
    # of how a static cache is compiled, or of another way of serving: neither is asked for
    | {"compile_config", "disable_compile", "continuous_batching_config"}
    # log-probabilities as they are after normalising: the same order, the same distribution
    | {"renormalize_logits"}
    # what ends a text, in every way of running a model
    | {"eos_token_id"}
    | {"transformers_version"}
)
"""What changes no token here, or is no wish."""


@dataclass(frozen=True)
class OwnSettings:
    """What a checkpoint's own settings do to answers: those that act, and those that are set aside."""

    acting: Mapping[str, Any]
    set_aside: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"acting": dict(self.acting), "set_aside": dict(self.set_aside)}

    def in_words(self) -> str:
        """One line; empty where there is nothing to say."""
        parts = [
            f"{what}: {', '.join(f'{name} {_short(value)}' for name, value in settings.items())}"
            for what, settings in (("acting", self.acting), ("set aside", self.set_aside))
            if settings
        ]
        return f"the checkpoint's own settings {'; '.join(parts)}" if parts else ""


def own_settings(model: nn.Module, *, sampled: bool = False) -> OwnSettings:
    """What a checkpoint's own settings do to answers; `sampled` where they are drawn as it cuts them."""
    given = _given(model)
    neutral = {**ACTS, **(SAMPLED if sampled else {})}
    aside = {**ASIDE, **{name: value for name, (value, _) in REFUSED.items()}}
    # A field that only a newer transformers knows may act: better said than not.
    unknown = set(_fields()) - {*aside, *ACTS, *SAMPLED} - OURS - IDLE
    return OwnSettings(
        {
            name: value
            for name, value in given.items()
            if name in unknown or (name in neutral and value != neutral[name])
        },
        {name: value for name, value in given.items() if name in aside and value != aside[name]},
    )


def require_repeatable(model: nn.Module) -> None:
    """Raise ModelError where a checkpoint's own settings make answers depend on machine or batch."""
    given = _given(model)
    for name, (neutral, why) in REFUSED.items():
        if name in given and given[name] != neutral:
            raise ModelError(
                f"the model's generation_config.json sets {name} to {_short(given[name])}, which {why}; "
                f"remove it there, or in Python set model.generation_config.{name} = None"
            )


def decoding(model: nn.Module, *, temperature: float = 0.0, top_p: float | None = None) -> dict[str, Any]:
    """Arguments of `generate` for the one way of decoding: greedy at temperature 0, else sampled; from the
    whole distribution where `top_p` says how much of it, else as the checkpoint's own settings cut it.
    """
    fixed = {**ASIDE, **{name: value for name, (value, _) in REFUSED.items()}}
    known = _fields()  # an older or newer transformers lacks some
    settings = {name: value for name, value in fixed.items() if name in known}
    settings["return_dict_in_generate"] = False
    if not temperature:
        return {**settings, "do_sample": False}
    cut = {**SAMPLED, "top_p": 1.0 if top_p is None else top_p}
    if top_p is None:
        given = _given(model)
        cut = {name: given.get(name, value) for name, value in cut.items()}
    return {**settings, "do_sample": True, "temperature": temperature, **cut}


def _fields() -> dict[str, Any]:
    """The fields of the installed transformers, with its defaults."""
    return vars(GenerationConfig())  # type: ignore[no-untyped-call]


def _given(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint's own settings say, as plain values; nothing for a model that does not generate."""
    config = getattr(model, "generation_config", None)
    said = {} if config is None else json.loads(json.dumps(config.to_dict(), default=_plain))
    return {name: value for name, value in said.items() if value is not None and not name.startswith("_")}


def text_ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """Ids of the tokens that end a text: the model's own, else the tokenizer's if one is given.

    Raises:
        ModelError: the model's settings give something else.
    """
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    try:
        found = [] if ends is None else np.atleast_1d(ends).tolist()
        return [operator.index(end) for end in found]
    except (ValueError, TypeError):
        raise ModelError(
            f"the model's eos_token_id is {ends!r} (generation_config.json); right is a token's id, or some"
        ) from None


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Raise ModelError where a model cannot generate, or fails while it does: what its own
    generation_config.json asks for can fail in many ways.
    """
    if not callable(getattr(model, "generate", None)):
        raise ModelError(f"{type(model).__name__} cannot generate: give a model with a language-model head")
    try:
        with finding_stop_strings():
            yield
    except (ValueError, TypeError, IndexError, AssertionError) as error:
        if isinstance(error, SteersmanError):
            raise
        raise _cannot_generate(model, error) from error


@contextmanager
def finding_stop_strings() -> Iterator[None]:
    """Raise ModelError where transformers cannot look for stop strings. It writes a word of its own,
    "abcdef", before each token, and fails with a tokenizer that cannot, such as the lab's.
    """
    try:
        yield
    except ValueError as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if where != stopping_criteria.__file__ or str(error) != "substring not found":
            raise
        raise ModelError(
            "stop_strings need a tokenizer that can write any word, and this one has only the words of its "
            "vocabulary: leave them out, or give stopping_criteria that look at token ids"
        ) from error


def _cannot_generate(model: nn.Module, error: Exception) -> ModelError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    acting = ", ".join(
        f"{name} {_short(value)}" for name, value in own_settings(model, sampled=True).acting.items()
    )
    where = f" with what its generation_config.json sets: {acting}" if acting else ""
    return ModelError(f"the model cannot generate{where} ({reason})")


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:36]} … ({len(value)})"
