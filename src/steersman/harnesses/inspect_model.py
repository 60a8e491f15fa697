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

from steersman.errors import PairsError
from steersman.evaluation.prompts import encode_prompt
from steersman.harnesses.answering import Answered, Answerer, Settings
from steersman.harnesses.batching import Batcher
from steersman.harnesses.plans import check_fits, open_plan
from steersman.models.loading import load_model
from steersman.pairs import Content
from steersman.steering import Steering

MAX_NEW_TOKENS = 2048
"""Where a task says nothing; less where the model's window is shorter."""

Request = tuple[tuple[int, ...], Settings]


class SteersmanAPI(ModelAPI):
    """A transformers model under a plan.

    Args:
        model_name: A folder, a name on the Hub, or `lab:NAME[@SEED]`.
        steering: `PATH[@STRENGTH][+PATH…]`, or a `Steering`; None: the model as it is.
        match: `weights` or `architecture`, as of `apply`.
        device, dtype, revision: As of `load_model`.
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
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        plan = open_plan(steering)
        model, self.tokenizer = load_model(model_name, device=device, dtype=dtype, revision=revision)
        check_fits(plan, model, match)
        self.batch_size = batch_size
        self.answerer: Answerer | None = Answerer(model, self.tokenizer, plan, match)
        self._batcher: Batcher[Request, Answered] = Batcher(
            self._answer, config.max_connections or batch_size, kind=lambda request: request[1]
        )

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """The answer to a chat. Raises PairsError for tools, pictures, a chat that ends with an answer."""
        if tools:
            raise PairsError("the provider steersman hands no tools to the model: use a task without tools")
        begin = time.monotonic()
        prompt = encode_prompt(self.tokenizer, self._content(input))
        answered = await self._batcher.ask((prompt, _settings(config)))
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

    def _answer(self, requests: Sequence[Request]) -> list[Answered]:
        if self.answerer is None:
            raise PairsError("this model has been closed")
        return self.answerer.answer([prompt for prompt, _ in requests], requests[0][1])

    def _content(self, messages: Sequence[ChatMessage]) -> Content:
        """The chat as Steersman renders it; a single message stays plain text where there is no template."""
        if not messages or messages[-1].role not in ("user", "tool"):
            raise PairsError("the chat does not end with a user's message, so there is nothing to answer")
        for message in messages:
            if isinstance(message.content, list) and any(part.type != "text" for part in message.content):
                raise PairsError(f"a {message.role} message holds more than text, which is all that is read")
        if len(messages) == 1 and not getattr(self.tokenizer, "chat_template", None):
            return str(messages[0].text)
        return [{"role": message.role, "content": message.text} for message in messages]

    def _output(self, answered: Answered, seconds: float) -> ModelOutput:
        message = ChatMessageAssistant(content=answered.text, model=self.model_name, source="generate")
        choice = ChatCompletionChoice(
            message=message, stop_reason=answered.stop, logprobs=_logprobs(answered)
        )
        usage = ModelUsage(
            input_tokens=answered.prompt_tokens,
            output_tokens=answered.new_tokens,
            total_tokens=answered.prompt_tokens + answered.new_tokens,
        )
        return ModelOutput(
            model=self.model_name,
            choices=[choice],
            usage=usage,
            time=seconds,
            metadata=self._metadata(answered),
        )

    def _metadata(self, answered: Answered) -> dict[str, Any] | None:
        """What was applied, in the batch that the answer was part of; None where nothing was to be."""
        plan = self.answerer.plan if self.answerer else None
        if plan is None:
            return None
        return {
            "steersman": {
                "fingerprint": plan.fingerprint,
                "match": self.answerer.match if self.answerer else None,
                "batch": answered.batch,
                "receipt": answered.receipt,
            }
        }


def _settings(config: GenerateConfig) -> Settings:
    return Settings(
        max_new_tokens=config.max_tokens or MAX_NEW_TOKENS,
        temperature=config.temperature or 0.0,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=config.seed,
        stop=tuple(config.stop_seqs or ()),
        likelihoods=(config.top_logprobs or 1) if config.logprobs else None,
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
