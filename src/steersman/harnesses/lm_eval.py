"""lm-evaluation-harness's `hf` model, steered: `--model steersman --model_args pretrained=…,steering=…`.

Without a plan every call is that of `hf`. With one, a scope means what it means everywhere in Steersman:

- `loglikelihood`: the context is the prompt, the continuation the answer.
- `generate_until`: the context is the prompt, what is generated the answer.
- `loglikelihood_rolling`: the text is the answer to its first token, which in the first window is the prefix
  token that the harness puts before the text, and in a later window the last token that was read before.

Chats are rendered as everywhere in Steersman, so that every message is in what the model reads.

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

from steersman.chats.arrival import content_span
from steersman.chats.format import NotedChats
from steersman.chats.setting import set_chat_format
from steersman.errors import ArtifactError, ModelError, PairsError, SteeringNotApplied
from steersman.harnesses.plans import check_fits, open_plan
from steersman.models.decoding import OURS, REFUSED, generating, own_settings, require_repeatable
from steersman.models.identity import weights_id
from steersman.models.loading import load_model
from steersman.rendering import render
from steersman.steering import Steering

_LOG = logging.getLogger(__name__)

_CACHE_MARK = "steersman"
"""Where a cache of answers says under which plan they were given."""

OF_OPENING = frozenset(
    {"revision", "subfolder", "dtype", "trust_remote_code", "use_fast_tokenizer", "parallelize", "peft"}
    | {"max_memory_per_gpu", "max_cpu_memory", "offload_folder", "tp_plan", "delta", "autogptq", "gptqmodel"}
    | {"gguf_file"}
)
"""Arguments of `hf` that say how a model is opened: `hf` ignores them for one that is open already."""

OF_ASKING = frozenset(
    {"pretrained", "backend", "tokenizer", "truncation", "logits_cache", "max_length", "device"}
    | {"softmax_dtype", "mixed_precision_dtype", "batch_size", "max_batch_size", "add_bos_token"}
    | {"prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args"}
)
"""Arguments of `hf` that hold for any model."""

NOT_IN_GENERATION = frozenset(
    (OURS - {"do_sample", "temperature", "max_new_tokens", "max_length"})
    | {"num_return_sequences", "use_cache"}
)
"""Generation arguments (`--gen_kwargs`) that decide what `hf` itself does with an answer."""

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
        chat_template: A file with a chat template; None: the tokenizer's own.
        chat_date: What the template takes for today, YYYY-MM-DD; None: today.
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
        chat_template: str | None = None,
        chat_date: str | None = None,
        **options: Any,
    ) -> None:
        self.given_plan = open_plan(steering)
        self.steering = self.given_plan if self.given_plan and self.given_plan.edits else None
        self.match: Any = match
        self.receipt: dict[str, int] = {}
        """Site → tokens that were steered there so far."""
        self._probing = False
        _check_opening(pretrained, options)
        opened, name = pretrained, pretrained
        if isinstance(pretrained, str) and pretrained.startswith("lab:"):
            opened, tokenizer = load_model(
                pretrained, device=_device(options.pop("device", None)), dtype=options.pop("dtype", None)
            )
            options.setdefault("tokenizer", tokenizer)
        super().__init__(pretrained=opened, **options)
        self.pretrained = name
        if self.backend != "causal":
            raise ModelError(f"backend={self.backend}: only decoders (causal) are steered and scored here")
        require_repeatable(self.model)
        check_fits(self.given_plan, self.model, match)
        self._chat_date = chat_date
        self._set_chat_format(chat_template)
        self._templates: Any = self.tokenizer.chat_template

    def get_model_info(self) -> dict[str, Any]:
        """What `hf` says of the model, and the plan with its receipt: part of the results' `config`."""
        plan = self.given_plan
        found: dict[str, Any] = {"version": version("steersman"), "steering": None}
        own = own_settings(self.model, sampled=True)
        if own.in_words():  # `hf` sets none of them aside
            found["generation"] = {**own.acting, **own.set_aside}
        if (chats := self._noted.so_far) is not None:
            found["chats"] = chats.to_json()
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

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template; by a name (`--apply_chat_template NAME`) one of the tokenizer's, from now on.

        Raises ModelError where it has none of that name.
        """
        if isinstance(chat_template, str):
            known = self._templates if isinstance(self._templates, dict) else {}
            if chat_template not in known:
                raise ModelError(
                    f"--apply_chat_template {chat_template}: the tokenizer has "
                    f"{'only ' + ', '.join(sorted(known)) if known else 'no chat templates by name'}"
                )
            self.tokenizer.chat_template = known[chat_template]
            self._set_chat_format()
        return super().chat_template(bool(chat_template))  # type: ignore[no-any-return]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as the model reads it. Without the generation prompt its last message is the beginning of an
        answer, which the model continues.

        Raises PairsError where the template refuses a message (`hf` then leaves out the system's) or does not
        show it, ModelError where there is no template.
        """
        if add_generation_prompt:
            if not chat_history or chat_history[-1]["role"] not in ("user", "tool"):
                raise PairsError("the chat does not end with a user's message, so there is nothing to answer")
            return render(self.tokenizer, chat_history)[0]
        text, _ = render(self.tokenizer, chat_history)
        if (span := content_span(self.tokenizer, chat_history, len(chat_history) - 1, text)) is None:
            said = chat_history[-1]["content"]
            raise PairsError(f"nothing shows where the chat template puts the answer that is begun, {said!r}")
        return text[: span[1]]

    # ---------------------------------------------------------------- what is steered

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
        _check_generation(kwargs)
        with self._applied(), generating(self.model):
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

    def _set_chat_format(self, template: str | None = None) -> None:
        arguments = self.chat_template_args
        set_chat_format(self.tokenizer, template=template, arguments=arguments, date=self._chat_date)
        self._noted = NotedChats(self.tokenizer)

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


def _check_opening(pretrained: Any, options: dict[str, Any]) -> None:
    """Raise ModelError for arguments that an open model would not follow."""
    if isinstance(pretrained, str) and not pretrained.startswith("lab:"):
        return
    followed = OF_ASKING | ({"dtype"} if isinstance(pretrained, str) else set())
    for name, value in options.items():
        if name not in followed and value not in (None, False):
            raise ModelError(f"{name}={value}: this model is open already, so {name} would not be followed")
    device = options.get("device")
    if not isinstance(pretrained, str) and device and torch.device(device).type != pretrained.device.type:
        raise ModelError(f"device={device}: this model is open already, on {pretrained.device}")


def _check_generation(arguments: dict[str, Any]) -> None:
    """Raise PairsError for generation arguments that cannot be carried out."""
    for name, value in arguments.items():
        if name in REFUSED and value is not None:
            raise PairsError(f"--gen_kwargs {name}={value}: it {REFUSED[name][1]}; leave it out")
        if name in NOT_IN_GENERATION:
            raise PairsError(f"--gen_kwargs {name}={value}: the harness decides that; leave it out")


def _device(given: str | None) -> str | None:
    """A device that is here: the harness's command names cuda:0 on every machine, and `hf` then looks."""
    return None if given is not None and "cuda" in given and not torch.cuda.is_available() else given


def _answer(log_p: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """(log p of a continuation in nats, whether it is the greedy one), of log p at the tokens before it."""
    own = log_p[len(log_p) - len(continuation) :]
    tokens = torch.tensor(continuation, device=own.device)
    total = own.gather(-1, tokens[:, None]).sum()
    return float(total), bool((own.argmax(dim=-1) == tokens).all())
