"""Inspect AI's provider `steersman`: `--model steersman/MODEL -M steering=PATH[@STRENGTH][+PATH…]`.

MODEL is a folder, a name on the Hub, or `lab:NAME[@SEED]`. Answers are greedy unless a temperature is given.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    TopLogprob,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from steersman.chats.format import NotedChats
from steersman.chats.setting import set_chat_format
from steersman.errors import PairsError
from steersman.evaluation.prompts import encode_prompt
from steersman.harnesses.answering import Answered, Answerer, Settings
from steersman.harnesses.batching import Batcher
from steersman.harnesses.plans import check_fits, open_plan
from steersman.models.decoding import own_settings
from steersman.models.loading import load_model
from steersman.pairs import Content, check_content
from steersman.steering import Steering

MAX_NEW_TOKENS = 2048
"""Where a task says nothing; less where the model's window is shorter."""

Request = tuple[tuple[int, ...], Settings, int]
"""A prompt, how it is answered, and how many answers it gets."""

CARRIED_OUT = frozenset(
    {"max_tokens", "temperature", "top_p", "top_k", "seed", "stop_seqs", "logprobs", "top_logprobs"}
    | {"num_choices", "frequency_penalty", "presence_penalty", "logit_bias"}
)
"""Fields of `GenerateConfig` that answers follow."""

OF_INSPECT = frozenset(
    {"max_retries", "timeout", "attempt_timeout", "max_connections", "adaptive_connections"}
    | {"system_message", "reasoning_history", "fail_on_refusal", "cache", "batch"}
    # of what is not done here, streaming, tools and prompts cached at a provider: they change no answer
    | {"stream_idle_timeout", "parallel_tool_calls", "internal_tools", "max_tool_output", "cache_prompt"}
)
"""Fields that Inspect itself carries out, before or after a model is asked, or that can change no answer."""
# All others are refused by name where they are set.

READ = frozenset({"role", "content"})
"""Fields of a message that are put before the model."""

UNREAD = frozenset({"id", "source", "metadata", "model", "tool_call_id", "function"})
"""Fields that no chat template is given: names and origins."""
# All others are refused by name where they are set: what a message says must reach the model.


class SteersmanAPI(ModelAPI):
    """A transformers model under a plan.

    Args:
        model_name: A folder, a name on the Hub, or `lab:NAME[@SEED]`.
        steering: `PATH[@STRENGTH][+PATH…]`, or a `Steering`; None: the model as it is.
        match: `weights` or `architecture`, as of `apply`.
        device, dtype, revision: As of `load_model`.
        chat_template, chat_template_args, chat_date: As of `set_chat_format`: a file, names and values, day.
        batch_size: Prompts that are answered together, where `max_connections` does not say otherwise.

    Raises:
        ModelError: the model cannot be opened.
        ArchitectureMismatch, WeightsMismatch: the plan is for another model.
        ArtifactError, PlanError: the plan cannot be read, scaled or summed.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 as of ModelAPI
        *,
        steering: str | Steering | None = None,
        match: Any = "weights",
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        batch_size: int = 32,
        chat_template: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        chat_date: Any = None,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        plan = open_plan(steering)
        model, self.tokenizer = load_model(model_name, device=device, dtype=dtype, revision=revision)
        check_fits(plan, model, match)
        set_chat_format(self.tokenizer, template=chat_template, arguments=chat_template_args, date=chat_date)
        self._noted = NotedChats(self.tokenizer)
        self.batch_size = batch_size
        self.answerer: Answerer | None = Answerer(model, self.tokenizer, plan, match)
        self._batcher: Batcher[Request, tuple[Answered, ...]] = Batcher(
            self._answer, config.max_connections or batch_size, kind=lambda request: request[1:]
        )

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """The answers to a chat. Raises PairsError for tools, pictures, a chat that ends with an answer, and
        for what is asked that is not carried out.
        """
        if tools or tool_choice not in ("auto", "none"):
            raise PairsError("the provider steersman hands no tools to the model: use a task without tools")
        begin = time.monotonic()
        settings = _settings(config)
        prompt = encode_prompt(self.tokenizer, self._content(input))
        answered = await self._batcher.ask((prompt, settings, config.num_choices or 1))
        return self._output(answered, time.monotonic() - begin)

    def max_tokens(self) -> int | None:
        """New tokens where a task says nothing."""
        return MAX_NEW_TOKENS

    def max_connections(self) -> int:
        """Prompts that are under way at once: a batch."""
        return self.batch_size

    def collapse_user_messages(self) -> bool:
        """Chat templates mostly want roles to alternate."""
        return True

    def close(self) -> None:
        """Let go of the model."""
        self.answerer = None
        gc.collect()

    # ---------------------------------------------------------------- inside

    def _answer(self, requests: Sequence[Request]) -> list[tuple[Answered, ...]]:
        if self.answerer is None:
            raise PairsError("this model has been closed")
        _, settings, choices = requests[0]
        prompts = [prompt for prompt, _, _ in requests for _ in range(choices)]
        answered = self.answerer.answer(prompts, settings)
        return [tuple(answered[place : place + choices]) for place in range(0, len(answered), choices)]

    def _content(self, messages: Sequence[ChatMessage]) -> Content:
        """The chat as Steersman renders it; a single message stays plain text where there is no template."""
        if not messages or messages[-1].role not in ("user", "tool"):
            raise PairsError("the chat does not end with a user's message, so there is nothing to answer")
        for message in messages:
            _check_message(message)
        content: Content = [{"role": message.role, "content": message.text} for message in messages]
        if len(messages) == 1 and not getattr(self.tokenizer, "chat_template", None):
            content = str(messages[0].text)
        check_content(content, "the chat")
        return content

    def _output(self, answers: Sequence[Answered], seconds: float) -> ModelOutput:
        choices = [
            ChatCompletionChoice(
                message=ChatMessageAssistant(content=each.text, model=self.model_name, source="generate"),
                stop_reason=each.stop,
                logprobs=_logprobs(each),
            )
            for each in answers
        ]
        read, written = answers[0].prompt_tokens, sum(each.new_tokens for each in answers)
        return ModelOutput(
            model=self.model_name,
            choices=choices,
            usage=ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written),
            time=seconds,
            metadata=self._metadata(answers[0]),
        )

    def _metadata(self, answered: Answered) -> dict[str, Any] | None:
        """What was applied, in the batch that the answer was part of, and which of the checkpoint's own
        settings acted; None where nothing was to be and none did.
        """
        plan = self.answerer.plan if self.answerer else None
        own = own_settings(self.answerer.model) if self.answerer else None
        said: dict[str, Any] = {"generation": own.to_json()} if own is not None and own.in_words() else {}
        chats = self._noted.so_far
        if plan is not None and chats is not None:
            said["chats"] = chats.to_json()
        if plan is not None:
            said |= {
                "fingerprint": plan.fingerprint,
                "match": self.answerer.match if self.answerer else None,
                "batch": answered.batch,
                "receipt": answered.receipt,
            }
        return {"steersman": said} if said else None


def _check_message(message: ChatMessage) -> None:
    """Raise PairsError for what a message says and no chat template is given."""
    parts = message.content if isinstance(message.content, list) else []
    kind = next((part.type for part in parts if part.type != "text"), None)
    if kind is not None:
        raise PairsError(f"a {message.role} message holds more than text ({kind}), which is all that is read")
    for name, value in message:
        if value and name not in READ | UNREAD:
            raise PairsError(
                f"a {message.role} message has {name}, which the provider steersman does not put before the "
                "model: use a task without tools"
            )


def _settings(config: GenerateConfig) -> Settings:
    """How answers are drawn. Raises PairsError for what is asked that is not carried out."""
    for name, value in config:
        if value is not None and name not in CARRIED_OUT | OF_INSPECT:
            raise PairsError(f"the provider steersman cannot carry out {name}: leave it out")
    if config.temperature is None and (config.top_p is not None or config.top_k is not None):
        name = "top_p" if config.top_p is not None else "top_k"
        raise PairsError(f"{name} without a temperature: answers are greedy unless one is given")
    if config.top_logprobs is not None and not config.logprobs:
        raise PairsError("top_logprobs without logprobs: ask for both")
    for name, least in (("max_tokens", 1), ("num_choices", 1), ("temperature", 0), ("top_k", 0)):
        if (value := getattr(config, name)) is not None and not value >= least:
            raise PairsError(f"{name} is {value}: right is {least} or more")
    return Settings(
        max_new_tokens=config.max_tokens or MAX_NEW_TOKENS,
        temperature=config.temperature or 0.0,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=config.seed,
        stop=tuple(config.stop_seqs or ()),
        likelihoods=(config.top_logprobs or 1) if config.logprobs else None,
        frequency_penalty=config.frequency_penalty or 0.0,
        presence_penalty=config.presence_penalty or 0.0,
        logit_bias=tuple(sorted((int(token), bias) for token, bias in (config.logit_bias or {}).items())),
    )


def _logprobs(answered: Answered) -> Logprobs | None:
    if answered.likelihoods is None:
        return None
    return Logprobs(
        content=[
            Logprob(
                token=token.text,
                logprob=token.log_p,
                bytes=list(token.text.encode()),
                top_logprobs=[
                    TopLogprob(token=text, logprob=log_p, bytes=list(text.encode()))
                    for text, log_p in token.likeliest
                ],
            )
            for token in answered.likelihoods
        ]
    )
