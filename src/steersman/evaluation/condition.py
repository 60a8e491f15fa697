"""A condition: a model under one arm, and the ways in which items are put to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from steersman.errors import PairsError
from steersman.evaluation.instructing import instructed
from steersman.evaluation.prompts import Batch, batches, encode_answer
from steersman.models.architecture import check_ids
from steersman.models.decoding import decoding, generating, require_repeatable
from steersman.models.reading import pad_id
from steersman.pairs import Content

if TYPE_CHECKING:
    from steersman.evaluation.arms import Arm, Subject
    from steersman.steering import Steering

AT_ONCE = 12
"""Answers whose logits over the whole vocabulary are held at once."""


@dataclass(frozen=True)
class LogLikelihood:
    """log p of a continuation in nats, over how many tokens, and whether each is the most probable one."""

    total: float
    tokens: int
    greedy: bool


@dataclass(frozen=True)
class Reading:
    """A text as read: −log p of its tokens but the first, how many they are, and the mean KL divergence to
    the unsteered model over them, KL(arm ‖ base) in nats; None where there is none to compare with.
    """

    negative_log_likelihood: float
    tokens: int
    divergence: float | None


class Condition:
    """A model under one arm.

    Args:
        subject: The model that is asked, with its tokenizer.
        arm: What it is asked under: a plan, an instruction, a template around the prompt.
        seed: Of every sample; the same items get the same random numbers under each arm.
    """

    tells_divergences = True
    """Whether it knows what is expected of every token, and not of the one that came alone."""

    def __init__(self, subject: Subject, arm: Arm, *, seed: int = 0) -> None:
        self.subject = subject
        self.arm = arm
        self.seed = seed
        self.receipt: dict[str, int] = {}
        """Site → tokens that were steered there so far."""

    @property
    def steering(self) -> Steering | None:
        """The plan, None where the model runs as it is."""
        plan = self.arm.steering
        return plan if plan is not None and plan.edits else None

    def prompt(self, content: Content) -> Content:
        """A prompt as this arm puts it: inside the template, after the instruction."""
        return instructed(content, self.arm.system, self.arm.template, self.subject.tokenizer)

    def answers(self, contents: Sequence[Content], *, max_new_tokens: int | None = None) -> list[str]:
        """Greedy answers, without special tokens."""
        settings = decoding(self.subject.model)
        return [text for (text,) in self._generated(contents, max_new_tokens, 1, settings)]

    def samples(
        self,
        contents: Sequence[Content],
        count: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
    ) -> list[list[str]]:
        """`count` sampled answers to each prompt; the same ones whenever the same batch is asked again."""
        settings = decoding(self.subject.model, temperature=temperature, top_p=top_p)
        with torch.random.fork_rng(devices=_devices(self.subject.model)):
            torch.manual_seed(self._seed_of(contents))
            return self._generated(contents, max_new_tokens, count, settings)

    @torch.inference_mode()
    def log_likelihoods(
        self, contents: Sequence[Content], continuations: Sequence[Sequence[str]]
    ) -> list[list[LogLikelihood]]:
        """log p of each prompt's continuations, teacher-forced.

        Raises PairsError where a continuation adds no token.
        """
        rows, places = [], []
        for index, (content, texts) in enumerate(zip(contents, continuations, strict=True)):
            for text in texts:
                rows.append(encode_answer(self.subject.tokenizer, self.prompt(content), text))
                places.append(index)
        self._check_room([ids for ids, _ in rows])
        found: list[list[LogLikelihood]] = [[] for _ in contents]
        scored: list[LogLikelihood | None] = [None] * len(rows)
        for batch in self._batches([ids for ids, _ in rows]):
            logits, targets, starts = self._forced(batch, [rows[index][1] for index in batch.indices])
            for place, index in enumerate(batch.indices):
                scored[index] = _likelihood(logits[place], targets[place], starts[place])
        for index, value in zip(places, scored, strict=True):
            found[index].append(cast(LogLikelihood, value))
        return found

    @torch.inference_mode()
    def readings(self, texts: Sequence[str]) -> list[Reading]:
        """How plain texts are read: every token but the first counts, and is steered as an answer would be.

        Longer texts than the model takes are cut. Raises PairsError for a text of fewer than two tokens.
        """
        limit = self._context()
        rows = [tuple(self.subject.tokenizer(text, verbose=False)["input_ids"])[:limit] for text in texts]
        if short := [text for text, ids in zip(texts, rows, strict=True) if len(ids) < 2]:
            raise PairsError(f"{short[0]!r}: a text to read must have at least two tokens")
        found: list[Reading | None] = [None] * len(rows)
        for batch in self._batches(rows):
            base, targets, starts = self._unsteered(batch, [rows[index] for index in batch.indices])
            steered = self.steering is not None
            logits = self._forced(batch, [1] * len(batch.indices))[0] if steered else base
            for place, index in enumerate(batch.indices):
                own, wanted = logits[place, starts[place] :], targets[place, starts[place] :]
                total = -_log_p(own, wanted).sum().item()
                other = base[place, starts[place] :]
                shift = divergences(own, other).mean().item() if steered else None
                found[index] = Reading(total, len(wanted), shift)
        return cast(list[Reading], found)

    @torch.inference_mode()
    def token_shifts(
        self, contents: Sequence[Content], texts: Sequence[str], base: Condition
    ) -> list[list[tuple[str, float]]]:
        """Each token of an answer with the KL divergence of what this arm expected there from what the base
        did: KL(arm ‖ base) in nats, both after the same answer so far. An empty answer has none.
        """
        found: list[list[tuple[str, float]]] = [[] for _ in contents]
        chosen = [index for index, text in enumerate(texts) if text.strip()]
        for start in range(0, len(chosen), AT_ONCE):
            places = chosen[start : start + AT_ONCE]
            asked = [(contents[index], texts[index]) for index in places]
            own, other = self._answer_logits(asked), base._answer_logits(asked)
            for index, (pieces, mine), (_, theirs) in zip(places, own, other, strict=True):
                length = min(len(mine), len(theirs))
                shifts = divergences(mine[-length:], theirs[-length:]).tolist()
                found[index] = list(zip(pieces[-length:], shifts, strict=True))
        return found

    # ---------------------------------------------------------------- inside

    @torch.inference_mode()
    def _generated(
        self, contents: Sequence[Content], limit: int | None, count: int, settings: dict[str, Any]
    ) -> list[list[str]]:
        tokenizer = self.subject.tokenizer
        require_repeatable(self.subject.model)
        rows = [self.subject.encoded(self.prompt(content)) for content in contents]
        self._check_room(rows, limit or self.subject.max_new_tokens)
        texts: list[list[str]] = [[] for _ in rows]
        shared = self.subject.shared_prompts if count == 1 else None
        for batch in self._batches(rows):
            known = {} if shared is None else shared.arguments(batch, self.steering)
            with self._steered(), generating(self.subject.model):
                produced = cast(Any, self.subject.model).generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    max_new_tokens=limit or self.subject.max_new_tokens,
                    pad_token_id=pad_id(tokenizer),
                    tokenizer=tokenizer,  # for stop strings that a checkpoint may ask for
                    **{**settings, **known, "num_return_sequences": count},
                )
            answers = produced[:, batch.input_ids.shape[1] :]
            for row, text in enumerate(tokenizer.batch_decode(answers, skip_special_tokens=True)):
                texts[batch.indices[row // count]].append(text.strip())
        return texts

    def _answer_logits(self, asked: Sequence[tuple[Content, str]]) -> list[tuple[list[str], Tensor]]:
        """Of each answer its tokens as text, and the logits [tokens, vocabulary] that expected them."""
        tokenizer = self.subject.tokenizer
        rows = [encode_answer(tokenizer, self.prompt(content), text) for content, text in asked]
        found: list[tuple[list[str], Tensor] | None] = [None] * len(rows)
        for batch in self._batches([ids for ids, _ in rows]):
            logits, targets, starts = self._forced(batch, [rows[index][1] for index in batch.indices])
            for place, index in enumerate(batch.indices):
                ids = targets[place, starts[place] :].tolist()
                pieces = [str(tokenizer.decode([token])) for token in ids]
                found[index] = (pieces, logits[place, starts[place] :])
        return cast(list[tuple[list[str], Tensor]], found)

    def _unsteered(self, batch: Batch, rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor, list[int]]:
        """What the unsteered model gives for texts that are read whole; once for all arms that follow each
        other on the same texts.
        """
        if self.subject.unsteered is None or self.subject.unsteered[0] != rows:
            self.subject.unsteered = None  # one is held at a time
            found = self._forced(batch, [1] * len(rows), steered=False)
            self.subject.unsteered = (list(rows), found)
        return self.subject.unsteered[1]

    def _forced(
        self, batch: Batch, prompt_lengths: Sequence[int], *, steered: bool = True
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Logits [rows, n, vocabulary] before the last n columns, the tokens [rows, n] in them, and where
        each row's answer starts among them.
        """
        lengths = batch.attention_mask.sum(dim=1).tolist()
        answers = [length - prompt for length, prompt in zip(lengths, prompt_lengths, strict=True)]
        widest = max(answers)
        with self._steered(list(prompt_lengths)) if steered else nullcontext():
            output = self.subject.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=widest + 1,
            )
        logits = output.logits[:, -widest - 1 : -1]
        return logits, batch.input_ids[:, -widest:], [widest - answer for answer in answers]

    @contextmanager
    def _steered(self, prompt_lengths: list[int] | None = None) -> Iterator[None]:
        plan = self.steering
        if plan is None:
            yield
            return
        match = self.subject.match
        with plan.apply(self.subject.model, match=match, prompt_lengths=prompt_lengths) as receipt:
            yield
        for site, tokens in receipt.tokens.items():
            self.receipt[site] = self.receipt.get(site, 0) + tokens

    def _context(self) -> int:
        """How many tokens the model takes at once."""
        config = self.subject.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    def _check_room(self, rows: Sequence[Sequence[int]], new: int = 0) -> None:
        """Raise PairsError where a row is empty, or longer with its `new` tokens than the model's context."""
        lengths = [len(row) for row in rows]
        if lengths and min(lengths) == 0:
            raise PairsError("a prompt has no tokens")
        check_ids(self.subject.model, max(map(max, rows), default=0), self.arm.name)
        if lengths and max(lengths) + new > self._context():
            more = f" and {new} new ones" if new else ""
            raise PairsError(
                f"{self.arm.name}: a prompt of {max(lengths)} tokens{more}, but the model's context holds "
                f"{self._context()}; shorten it" + (", or lower --max-new-tokens" if new else "")
            )

    def _batches(self, rows: Sequence[Sequence[int]]) -> list[Batch]:
        subject = self.subject
        return list(batches(rows, subject.batch_size, pad_id(subject.tokenizer), subject.model.device))

    def _seed_of(self, contents: Sequence[Content]) -> int:
        digest = hashlib.sha256(repr((self.seed, list(contents))).encode()).digest()
        return int.from_bytes(digest[:7], "big")


def divergences(first: Tensor, second: Tensor) -> Tensor:
    """KL(first ‖ second) in nats at each position, of logits [positions, vocabulary] each; never below 0."""
    own = functional.log_softmax(first.double(), dim=-1)
    other = functional.log_softmax(second.double().to(own.device), dim=-1)
    # A token that has no probability at all adds nothing.
    terms = torch.where(own.isneginf(), torch.zeros_like(own), own.exp() * (own - other))
    return terms.sum(dim=-1).clamp(min=0)


def _log_p(logits: Tensor, wanted: Tensor) -> Tensor:
    return functional.log_softmax(logits.float(), dim=-1).gather(-1, wanted[:, None])[:, 0]


def _likelihood(logits: Tensor, wanted: Tensor, start: int) -> LogLikelihood:
    own, tokens = logits[start:], wanted[start:]
    greedy = bool((own.argmax(dim=-1) == tokens).all())
    return LogLikelihood(_log_p(own, tokens).double().sum().item(), len(tokens), greedy)


def _devices(model: Any) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
