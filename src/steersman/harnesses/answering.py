"""Answers of a model to a batch of prompts, under a plan, with what a harness wants to know of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from steersman.errors import PairsError
from steersman.evaluation.prompts import Batch, batches
from steersman.models.architecture import check_ids
from steersman.models.decoding import decoding, generating, require_repeatable, text_ends
from steersman.models.reading import pad_id
from steersman.steering import Steering

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Stop = Literal["stop", "max_tokens", "model_length"]


@dataclass(frozen=True)
class Settings:
    """How answers are drawn: greedily at temperature 0. Equal settings may share a batch.

    `likelihoods` is how many of the likeliest tokens are reported at each place; None: no likelihoods.
    `frequency_penalty` is taken off a token's logit for each time that the answer already has it,
    `presence_penalty` once; `logit_bias` are pairs of a token and what is added to its logit.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    likelihoods: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def of_generate(self, model: PreTrainedModel) -> dict[str, Any]:
        """The settings as `generate` takes them."""
        top_p = 1.0 if self.top_p is None else self.top_p
        settings = decoding(model, temperature=self.temperature, top_p=top_p)
        return {**settings, "top_k": self.top_k or 0} if self.temperature else settings


@dataclass(frozen=True)
class TokenLikelihood:
    """A generated token: its text, log p in nats, and the likeliest tokens in its place with theirs."""

    text: str
    log_p: float
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Answered:
    """An answer, and what it took: tokens read and written, why it ended, the batch's receipt."""

    text: str
    stop: Stop
    prompt_tokens: int
    new_tokens: int
    batch: int
    likelihoods: tuple[TokenLikelihood, ...] | None
    receipt: dict[str, int] | None


class Answerer:
    """A model that answers batches under a plan (None: as it is).

    Raises ModelError where its own generation settings make answers depend on the machine.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plan: Steering | None,
        match: Literal["weights", "architecture"],
    ) -> None:
        require_repeatable(model)
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan if plan is not None and plan.edits else None
        self.match: Literal["weights", "architecture"] = match

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], settings: Settings) -> list[Answered]:
        """One answer for each prompt's token ids, wholly in the thread that calls: a plan holds in its own.

        Raises PairsError for a prompt that leaves no room in the model's window; SteeringNotApplied as
        `apply` does.
        """
        (batch,) = batches(prompts, len(prompts), pad_id(self.tokenizer), self.model.device)
        room = self._room(batch.input_ids.shape[1])
        limit = min(settings.max_new_tokens, room)
        stops = StoppingCriteriaList([_SaidStop(self, settings.stop, batch)] if settings.stop else [])
        check_ids(self.model, max((token for token, _ in settings.logit_bias), default=0), "logit_bias")
        biased = LogitsProcessorList([_Biased(settings, batch)])
        applied = self.plan.apply(self.model, match=self.match) if self.plan else nullcontext()
        with _seeded(settings.seed, self.model.device), applied as receipt, generating(self.model):
            output = cast(Any, self.model).generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=limit,
                pad_token_id=pad_id(self.tokenizer),
                output_logits=settings.likelihoods is not None,
                stopping_criteria=stops,
                logits_processor=biased,
                tokenizer=self.tokenizer,  # for stop strings that a checkpoint may ask for
                **{**settings.of_generate(self.model), "return_dict_in_generate": True},
            )
        tokens = receipt.tokens if receipt is not None else None
        full: Stop = "max_tokens" if limit == settings.max_new_tokens else "model_length"
        answered: list[Answered | None] = [None] * len(prompts)
        for place, index in enumerate(batch.indices):
            ids = output.sequences[place, batch.input_ids.shape[1] :].tolist()
            ids, ended = self._until_end(ids)
            whole = self.text_of(ids)
            text, cut = _before_stop(whole, settings.stop)
            cut = cut or _before_stop(whole, self._own_stops())[1]  # which stays in the text
            if cut and not ended:
                ids = _without_padding(ids, pad_id(self.tokenizer))
            likelihoods = None
            if settings.likelihoods is not None:
                logits = torch.stack([step[place] for step in output.logits[: len(ids)]])
                likelihoods = self._likelihoods(ids, logits, settings.likelihoods)
            stop: Stop = "stop" if ended or cut else full
            read = len(prompts[index])
            answered[index] = Answered(text, stop, read, len(ids), len(prompts), likelihoods, tokens)
        return cast(list[Answered], answered)

    def text_of(self, ids: list[int]) -> str:
        """What tokens say, without special ones."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _room(self, width: int) -> int:
        config = self.model.config.get_text_config()
        window = getattr(config, "max_position_embeddings", None) or 1 << 30
        if width >= window:
            raise PairsError(f"a prompt of {width} tokens leaves no room in the model's window of {window}")
        return int(window) - width

    def _until_end(self, ids: list[int]) -> tuple[list[int], bool]:
        """A row until its end token, and whether there is one; after it there is padding."""
        ends = text_ends(self.model)
        first = next((place for place, token in enumerate(ids) if token in ends), None)
        return (ids, False) if first is None else (ids[: first + 1], True)

    def _own_stops(self) -> Sequence[str]:
        """Strings at which the checkpoint's own settings end an answer."""
        own = getattr(self.model.generation_config, "stop_strings", None) or ()
        return (own,) if isinstance(own, str) else own

    def _likelihoods(self, ids: list[int], logits: Tensor, most: int) -> tuple[TokenLikelihood, ...]:
        log_p = functional.log_softmax(logits.float(), dim=-1)
        values, places = log_p.topk(min(most, log_p.shape[-1]), dim=-1)
        return tuple(
            TokenLikelihood(
                self._text(token),
                float(row[token]),
                tuple((self._text(other), float(value)) for other, value in zip(best, high, strict=True)),
            )
            for token, row, best, high in zip(ids, log_p, places.tolist(), values.tolist(), strict=True)
        )

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


class _SaidStop(StoppingCriteria):
    """Ends each row by itself once one of some strings is in its answer.

    transformers' own criterion takes the vocabulary apart, which not every tokenizer allows.
    """

    def __init__(self, answerer: Answerer, stops: Sequence[str], batch: Batch) -> None:
        self._answerer = answerer
        self._stops = stops
        self._prompt = batch.input_ids.shape[1]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = [self._answerer.text_of(row) for row in input_ids[:, self._prompt :].tolist()]
        return torch.tensor([_before_stop(text, self._stops)[1] for text in texts], device=input_ids.device)


class _Biased(LogitsProcessor):
    """Penalties for what an answer already has, and biases, on the logits (the OpenAI API's definition)."""

    def __init__(self, settings: Settings, batch: Batch) -> None:
        self._settings = settings
        self._prompt = batch.input_ids.shape[1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        settings = self._settings
        if settings.frequency_penalty or settings.presence_penalty:
            said = input_ids[:, self._prompt :]
            counts = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
            scores = scores - settings.frequency_penalty * counts - settings.presence_penalty * (counts > 0)
        if settings.logit_bias:
            tokens, biases = zip(*settings.logit_bias, strict=True)
            place = torch.tensor(tokens, device=scores.device)
            added = torch.tensor(biases, dtype=scores.dtype, device=scores.device)
            scores = scores.index_add(1, place, added.expand(len(scores), -1))
        return scores


def _before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A text before the first of the strings that end it, and whether there was one."""
    found = [text.index(stop) for stop in stops if stop in text]
    return (text[: min(found)], True) if found else (text, False)


def _without_padding(ids: list[int], pad: int) -> list[int]:
    """A row that ended before the others of its batch, without what was fed to it after that."""
    last = max((place for place, token in enumerate(ids) if token != pad), default=-1)
    return ids[: last + 1]


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """The same random numbers for the same batch, where a seed is given; torch's own are left alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
