"""Screening on an engine: every candidate is a plan of the bank, and many of them share a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from steersman.edits import ExpertEdit, Scope
from steersman.errors import ModelError, PairsError
from steersman.evaluation.screening.exact import Base, Edit, Floats, Instrument, Integers
from steersman.evaluation.screening.screen import Runs
from steersman.evaluation.screening.texts import Batch, Reading
from steersman.models.architecture import RouterSite
from steersman.models.replay import Recording
from steersman.models.scored_text import Text
from steersman.steering import Steering
from steersman.vllm.backend import Engine
from steersman.vllm.detection import engine_version
from steersman.vllm.evaluation import EngineSubject, greedy


def on_engine(engine: Engine) -> Runs:
    """What `screen_experts` runs its measurements with, to have them on an engine."""

    @contextmanager
    def opened(
        model: nn.Module, tokenizer: Any, sites: Sequence[RouterSite], *, scope: Scope, batch_size: int
    ) -> Iterator[Instrument]:
        yield EngineInstrument(engine, sites, scope=scope, batch_size=batch_size)

    return Runs(opened, EngineSubject.of(engine), f"vllm {engine_version()}")


class EngineInstrument(Instrument):
    """Scores texts under edits of the routers. Nothing is left out of a forward; there are no gradients."""

    has_gradients = False

    def __init__(self, engine: Engine, sites: Sequence[RouterSite], *, scope: Scope, batch_size: int) -> None:
        self.engine = engine
        self.model, self.tokenizer = engine.model, engine.tokenizer
        self.sites = {site.facts.layer: site for site in sites}
        self.scope, self.batch_size = scope, batch_size
        self.device = torch.device("cpu")
        self.cuts = {}
        self.room = None
        self.rows_run = 0
        self._any = Steering.from_experts(engine.model, {sites[0].facts.layer: [0]})
        self._readings: WeakKeyDictionary[Batch, Reading] = WeakKeyDictionary()

    def batches(self, reading: Reading, size: int | None = None) -> list[Batch]:
        """The texts of a reading. Raises PairsError where one is too long, or the scope holds no token."""
        longest = max(len(text.ids) for text in reading.texts)
        if longest + 2 > self.engine.context:
            raise PairsError(
                f"{reading.name}: a prompt of {longest} tokens, but the engine takes "
                f"{self.engine.context - 2}"
            )
        found = super().batches(reading, size)
        for batch in found:
            self._readings[batch] = reading
        return found

    def base(self, batch: Batch, plan: tuple[Edit, ...] = ()) -> Base:
        """A batch's values under a plan."""
        steering = self._steering(plan)
        values = self._values(batch, range(batch.rows), [steering] * batch.rows)
        return Base(plan, values, Recording(), {})

    def singles(self, batch: Batch, base: Base, edits: Sequence[Edit]) -> Floats:
        """The batch's values when each edit joins the base's plan alone, float64 [edits, rows]."""
        plans = [self._steering((*base.plan, edit)) for edit in edits]
        rows = list(range(batch.rows)) * len(edits)
        each = [plan for plan in plans for _ in range(batch.rows)]
        return self._values(batch, rows, each).reshape(len(edits), batch.rows)

    def sets(
        self,
        batch: Batch,
        base: Base,
        plans: Sequence[Sequence[Edit]],
        advance: Callable[[int], object] = lambda _: None,
    ) -> Floats:
        """The batch's values under each of several plans, float64 [plans, rows]."""
        rows = list(range(batch.rows)) * len(plans)
        each = [steering for plan in plans for steering in [self._steering(plan)] * batch.rows]
        found = self._values(batch, rows, each).reshape(len(plans), batch.rows)
        advance(len(rows))
        return found

    def subsets(self, batch: Batch, rows: Integers, plans: Mapping[int, Tensor]) -> Floats:
        """Values of some rows of a batch, each under strengths of its own: {layer: [n, experts]}."""
        each = []
        for place in range(len(rows)):
            strengths = {layer: values[place] for layer, values in plans.items()}
            edits = [
                (layer, int(expert), float(values[expert]))
                for layer, values in strengths.items()
                for expert in values.nonzero()[:, 0]
            ]
            each.append(self._steering(edits))
        return self._values(batch, rows.tolist(), each)

    def _steering(self, edits: Sequence[Edit]) -> Steering | None:
        if not edits:
            return None
        strengths: dict[int, dict[int, float]] = {}
        for layer, expert, strength in edits:
            strengths.setdefault(layer, {})[expert] = strength
        return replace(self._any, edits=(ExpertEdit(strengths, scope=self.scope),))

    def _values(self, batch: Batch, rows: Sequence[int], plans: Sequence[Steering | None]) -> Floats:
        """Σ weight · log p of rows of a batch, each under a plan of its own."""
        reading = self._readings[batch]
        texts = [reading.texts[batch.texts[row]] for row in rows]
        asked = [_asked(text) for text in texts]
        outputs = self.engine.ask(
            [ids for ids, _ in asked],
            plans,
            [settings for _, settings in asked],
            prompts=[text.prompt_length for text in texts],
        )
        self.rows_run += len(rows)
        found = np.array([_value(text, output) for text, output in zip(texts, outputs, strict=True)])
        if not np.isfinite(found).all():
            raise ModelError("the engine gives no finite log probability for an item (nan or infinity)")
        return found


def _asked(text: Text) -> tuple[tuple[int, ...], Any]:
    """What the engine is given to read, and what it is to tell: of tokens that come next, or of its own."""
    if _next_alone(text):
        tokens = [token for _, token, _ in text.scored]
        return text.ids, greedy(1, logprobs=len(tokens), logprob_token_ids=tokens)
    return (*text.ids, text.scored[-1][1]), greedy(1, prompt_logprobs=0)


def _value(text: Text, output: Any) -> float:
    if _next_alone(text):
        said = output.outputs[0].logprobs[0]
        terms = [weight * said[token].logprob for _, token, weight in text.scored]
    else:
        terms = [
            weight * output.prompt_logprobs[place + 1][token].logprob for place, token, weight in text.scored
        ]
    return float(np.sum(terms, dtype=np.float64))


def _next_alone(text: Text) -> bool:
    return all(place == len(text.ids) - 1 for place, _, _ in text.scored)
