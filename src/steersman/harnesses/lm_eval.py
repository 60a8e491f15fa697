"""lm-evaluation-harness's `hf` model, steered: `--model steersman --model_args pretrained=…,steering=…`.

Without a plan every call is that of `hf`. With one, a scope means what it means everywhere in Steersman:

- `loglikelihood`: the context is the prompt, the continuation the answer.
- `generate_until`: the context is the prompt, what is generated the answer.
- `loglikelihood_rolling`: the text is the answer to its first token, which in the first window is the prefix
  token that the harness puts before the text, and in a later window the last token that was read before.

A batch of rows of unlike length is given its attention mask, which `hf` leaves out (it pads on the right,
where no real token looks): padding must be told from text to be left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import pad_and_concat
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from steersman.errors import ArtifactError, PairsError, SteeringNotApplied
from steersman.harnesses.plans import check_fits, open_plan
from steersman.models.identity import weights_id
from steersman.models.loading import load_model
from steersman.steering import Steering

_LOG = logging.getLogger(__name__)

_CACHE_MARK = "steersman"
"""Where a cache of answers says under which plan they were given."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness asks for: the two texts (None: a window of a rolling text), context and continuation."""


@dataclass
class _Row:
    """One forward's row: what is fed, how much of it is prompt, and the requests that it answers."""

    fed: tuple[int, ...]
    prompt_length: int
    requests: list[int] = field(default_factory=list)


@register_model("steersman")
class SteeredHFLM(HFLM):
    """A transformers model under a plan.

    Args:
        pretrained: What `hf` takes, or `lab:NAME[@SEED]`.
        steering: `PATH[@STRENGTH][+PATH…]`, or a `Steering`; None: the model as it is.
        match: `weights` or `architecture`, as of `apply`.
        options: As of `hf` (dtype, batch_size, device, parallelize, peft, …).

    Raises:
        ArchitectureMismatch, WeightsMismatch: the plan is for another model.
        ArtifactError, PlanError: the plan cannot be read, scaled or summed.
    """

    def __init__(
        self,
        pretrained: Any,
        steering: str | Steering | None = None,
        match: str = "weights",
        **options: Any,
    ) -> None:
        self.given_plan = open_plan(steering)
        self.steering = self.given_plan if self.given_plan and self.given_plan.edits else None
        self.match: Any = match
        self.receipt: dict[str, int] = {}
        """Site → tokens that were steered there so far."""
        self._probing = False
        opened, name = pretrained, pretrained
        if isinstance(pretrained, str) and pretrained.startswith("lab:"):
            opened, tokenizer = load_model(
                pretrained, device=_device(options.pop("device", None)), dtype=options.pop("dtype", None)
            )
            options.setdefault("tokenizer", tokenizer)
        super().__init__(pretrained=opened, **options)
        self.pretrained = name
        check_fits(self.given_plan, self.model, match)

    def get_model_info(self) -> dict[str, Any]:
        """What `hf` says of the model, and the plan with its receipt: part of the results' `config`."""
        plan = self.given_plan
        found: dict[str, Any] = {"version": version("steersman"), "steering": None}
        if plan is not None:
            found["steering"] = {
                "fingerprint": plan.fingerprint,
                "provenance": dict(plan.provenance),
                "match": self.match,
                "model_weights_id": weights_id(self.model),
                "receipt": dict(self.receipt),
            }
        return {**super().get_model_info(), "steersman": found}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take a cache of answers (`--use_cache`), unless its answers were given under another plan.

        Raises ArtifactError where they were.
        """
        cache, own = cache_hook.dbdict, self.steering.fingerprint if self.steering else None
        if cache is not None:
            if own is not None and not len(cache):
                cache[_CACHE_MARK] = own
            if cache.get(_CACHE_MARK) != own:
                raise ArtifactError(
                    f"{cache.filename}: this cache holds answers that were given "
                    f"{'without this plan' if own else 'under a plan'}; use another file for --use_cache"
                )
        super().set_cache_hook(cache_hook)

    # ---------------------------------------------------------------- what is steered

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
        with self._applied():
            return super()._model_generate(context, *args, **kwargs)

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        if self.steering is not None and not self._probing:
            raise SteeringNotApplied(
                "this version of lm-eval asks for logits in a way that does not tell the prompt's length: "
                "they would not be steered as planned"
            )
        return super()._model_call(*args, **kwargs)

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> Any:
        self._probing = True  # of what the device can hold; the numbers are thrown away
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self._probing = False

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.steering is None:
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
            return answers
        rows = self._rows(requests)
        if rows and not any(self._selects(row) for row in rows):
            raise SteeringNotApplied(
                "scope 'generated' selects nothing here: every continuation has one token, "
                'which is not fed back; plan.with_scope("answer") (compose --scope answer) steers what '
                "precedes it"
            )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        size = self._rows_at_once(requests, override_bs)
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=quiet, desc="Running steered loglikelihood requests") as bar:
            for start in range(0, len(rows), size):
                for row, log_p in self._scored(rows[start : start + size]):
                    for index in row.requests:
                        key, _, continuation = requests[index]
                        found[index] = _answer(log_p, continuation)
                        if key is not None:
                            self.cache_hook.add_partial("loglikelihood", key, found[index])
                    bar.update(len(row.requests))
        return found

    # ---------------------------------------------------------------- inside

    @contextmanager
    def _applied(self, prompt_lengths: list[int] | None = None) -> Iterator[None]:
        if self.steering is None:
            yield
            return
        with self.steering.apply(self.model, match=self.match, prompt_lengths=prompt_lengths) as receipt:
            yield
        for site, tokens in receipt.tokens.items():
            self.receipt[site] = self.receipt.get(site, 0) + tokens

    def _rows(self, requests: Sequence[Request]) -> list[_Row]:
        """The rows to feed, longest first. Requests share one where the same is fed after the same prompt."""
        rows: dict[tuple[tuple[int, ...], int], _Row] = {}
        for index, (key, context, continuation) in enumerate(requests):
            if not continuation:
                raise PairsError(f"the continuation {key and key[1]!r} adds no token to its context")
            whole = [*context, *continuation]
            cut = max(0, len(whole) - self.max_length - 1)
            if cut:
                _LOG.warning("%d tokens are cut from the left: %d are too many", cut, len(whole))
            fed = tuple(whole[cut:-1])
            prompt_length = 1 if key is None else len(context) - cut
            row = rows.setdefault((fed, prompt_length), _Row(fed, prompt_length))
            row.requests.append(index)
        return sorted(rows.values(), key=lambda row: (-len(row.fed), row.fed))

    def _selects(self, row: _Row) -> bool:
        """Whether a plan can hold a token of a row: one that is not fed back is never `generated`."""
        edits = self.steering.edits if self.steering else ()
        feeds_back = len(row.fed) > row.prompt_length
        return feeds_back or any(edit.scope != "generated" for edit in edits)

    def _rows_at_once(self, requests: Sequence[Request], override: int | None) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        if override is not None:
            return override
        longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
        return int(self._detect_batch_size([longest], 0))

    def _scored(self, rows: Sequence[_Row]) -> Iterator[tuple[_Row, Tensor]]:
        """Each row with log p of the whole vocabulary at its real tokens, [tokens, vocabulary]."""
        width = max(len(row.fed) for row in rows)
        ids = pad_and_concat(width, [torch.tensor(row.fed, device=self.device) for row in rows])
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            mask[place, : len(row.fed)] = 1
        padded = {} if bool(mask.all()) else {"attention_mask": mask}
        steered = any(self._selects(row) for row in rows)  # else no token of theirs is in scope
        dtype = self.mixed_precision_dtype
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None),
            self._applied([row.prompt_length for row in rows]) if steered else nullcontext(),
        ):
            logits = self.model(ids, **padded).logits
        every = functional.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        for row, log_p in zip(rows, every, strict=True):
            yield row, log_p[: len(row.fed)]


def _device(given: str | None) -> str | None:
    """A device that is here: the harness's command names cuda:0 on every machine, and `hf` then looks."""
    return None if given is not None and "cuda" in given and not torch.cuda.is_available() else given


def _answer(log_p: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """(log p of a continuation in nats, whether it is the greedy one), of log p at the tokens before it."""
    own = log_p[len(log_p) - len(continuation) :]
    tokens = torch.tensor(continuation, device=own.device)
    total = own.gather(-1, tokens[:, None]).sum()
    return float(total), bool((own.argmax(dim=-1) == tokens).all())
