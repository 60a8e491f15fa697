"""Arms: the conditions of a comparison, and what a model does under each of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from steersman.concepts.controls import vectors_like_states
from steersman.evaluation.condition import Condition
from steersman.evaluation.judges import OUTCOMES, Outcome
from steersman.evaluation.prompt_rates import PromptRates, prompt_rates
from steersman.evaluation.prompts import Batch, Fork, batches, encode_fork, encode_prompt
from steersman.evaluation.statistics import Rate, rate
from steersman.evaluation.tasks import Task
from steersman.models.reading import pad_id
from steersman.pairs import Content

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steersman.evaluation.tuning.shared_prompts import SharedPrompts
    from steersman.steering import Steering


ArmKind = Literal["base", "steered", "reversed", "strength", "prompt", "prompt+steered", "model", "cell"]


@dataclass(frozen=True)
class Arm:
    """One condition: a name, and the plan that the model runs under (None: as it is).

    `system` is an instruction before each prompt, `template` what stands around it ("{prompt}" is its place),
    `other` the name of another model that is asked instead.
    """

    name: str
    steering: Steering | None
    kind: ArmKind = "steered"
    system: str | None = None
    template: str | None = None
    other: str | None = None


@dataclass(frozen=True)
class ArmResult:
    """What a model did on a task under one arm: each item's text and its side, and the rate of each side."""

    arm: str
    texts: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    rates: dict[Outcome, Rate]

    def on(self, outcome: Outcome) -> NDArray[np.bool_]:
        """Which items ended on a side, bool [items]."""
        return np.array([found == outcome for found in self.outcomes])

    def to_json(self) -> dict[str, Any]:
        return {"arm": self.arm, "rates": {outcome: found.to_json() for outcome, found in self.rates.items()}}


class Subject:
    """A model with its tokenizer, asked by every arm alike: greedy, left-padded, batched by length."""

    engine: str | None = None
    """What runs the model, where it is not transformers in this process."""
    limits: tuple[str, ...] = ()
    """What cannot be measured this way, in sentences."""
    gives_states = True
    """Whether the states of its residual stream can be read."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 64,
        max_new_tokens: int = 16,
        match: Literal["weights", "architecture"] = "weights",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.match: Literal["weights", "architecture"] = match
        self._encoded: dict[tuple[bool, str], tuple[int, ...]] = {}
        self.shared_prompts: SharedPrompts | None = None
        """Prompts that are read once for all arms which leave them as they are, where that is worth keeping
        them.
        """
        self.unsteered: tuple[list[tuple[int, ...]], tuple[torch.Tensor, torch.Tensor, list[int]]] | None = (
            None
        )
        """The texts that were read last, and what the unsteered model gave for them (see `readings`)."""

    def encoded(self, content: Content) -> tuple[int, ...]:
        """Token ids of a prompt, the generation prompt included; each prompt is encoded once."""
        key = (isinstance(content, str), content if isinstance(content, str) else json.dumps(content))
        if key not in self._encoded:
            self._encoded[key] = encode_prompt(self.tokenizer, content)
        return self._encoded[key]

    def condition(self, arm: Arm, *, seed: int = 0) -> Condition:
        """The model under an arm."""
        return Condition(self, arm, seed=seed)

    def prompt_rates(self, rows: Sequence[Sequence[int]]) -> PromptRates:
        """Which experts the unsteered model uses for prompts of token ids."""
        return prompt_rates(self.model, rows)

    def state_vectors(
        self, rows: Sequence[Sequence[int]], layers: Sequence[int], count: int, seed: int
    ) -> dict[int, torch.Tensor]:
        """Vectors drawn like the unsteered model's states on prompts of token ids (`vectors_like_states`)."""
        return vectors_like_states(self.model, rows, layers, count, seed, batch_size=self.batch_size)

    def held(self) -> dict[str, str]:
        """In what the model computes: number format and device."""
        return {"dtype": str(self.model.dtype), "device": str(self.model.device.type)}

    def run(self, task: Task, arm: Arm) -> ArmResult:
        """Answer every item of a task under an arm, and judge the answers."""
        texts = self.generate(task, arm.steering)
        outcomes = task.judge(texts)
        rates = {side: rate([found == side for found in outcomes], task.groups) for side in OUTCOMES}
        return ArmResult(arm.name, tuple(texts), tuple(outcomes), rates)

    def generate(self, task: Task, steering: Steering | None = None) -> list[str]:
        """Greedy answers, one per item, without special tokens."""
        return self.condition(Arm("", steering)).answers([item.content for item in task])

    def receipt_of(self, task: Task, steering: Steering) -> dict[str, Any]:
        """What is applied of a plan while the model answers a task, batch by batch, added up."""
        condition = self.condition(Arm("", steering))
        condition.answers([item.content for item in task])
        return {"fingerprint": steering.fingerprint, "tokens": condition.receipt}

    def forks(self, task: Task) -> list[Fork]:
        """Where each item's two answers part; encode once, measure many plans."""
        return [encode_fork(self.tokenizer, item) for item in task]

    @torch.inference_mode()
    def preference(self, forks: Sequence[Fork], steering: Steering | None = None) -> NDArray[np.float64]:
        """d = log p(positive) − log p(negative) of the sides' first answer tokens, in nats, float64 [items].

        One forward per item, at the generation prompt. Where both answers begin alike, d is taken at the
        first token that differs, after what they share.
        """
        found = np.zeros(len(forks))
        for batch in self._batches([fork.ids for fork in forks]):
            chosen = [forks[index] for index in batch.indices]
            with self._applied(steering, [fork.prompt_length for fork in chosen]):
                logits = self._last_logits(batch)
            sides = torch.tensor([[fork.positive, fork.negative] for fork in chosen], device=logits.device)
            # The normaliser of the softmax is the same for both tokens and cancels.
            positive, negative = logits.gather(1, sides).double().unbind(dim=1)
            found[list(batch.indices)] = (positive - negative).cpu().numpy()
        return found

    def _last_logits(self, batch: Batch) -> torch.Tensor:
        output = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=1,
        )
        return cast(torch.Tensor, output.logits)[:, -1]

    def _batches(self, rows: Sequence[Sequence[int]]) -> list[Batch]:
        return list(batches(rows, self.batch_size, pad_id(self.tokenizer), self.model.device))

    def _applied(
        self, steering: Steering | None, prompt_lengths: list[int] | None = None
    ) -> AbstractContextManager[object]:
        if steering is None or not steering.edits:
            return nullcontext()
        return steering.apply(self.model, match=self.match, prompt_lengths=prompt_lengths)
