"""Evaluations on an engine: the same items under the same arms, answered by vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from steersman.errors import PairsError, ServingError
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.condition import Condition, LogLikelihood, Reading
from steersman.evaluation.prompt_rates import PromptRates, first_routers, rates_of
from steersman.evaluation.prompts import Fork, encode_answer
from steersman.models.decoding import require_repeatable
from steersman.pairs import Content
from steersman.vllm.backend import Engine, ask
from steersman.vllm.counting import CountedText, merged
from steersman.vllm.detection import engine_version
from steersman.vllm.settings import KEY
from steersman.vllm.writing import Written, write

if TYPE_CHECKING:
    from steersman.steering import Steering

UNDIVERGED = (
    "The engine tells how probable what was said is, not the rest of the distribution: no divergence to the "
    "unsteered model was measured."
)


class EngineSubject(Subject):
    """A model in an engine, asked as one in this process is."""

    limits = (UNDIVERGED,)
    gives_states = False

    def __init__(
        self,
        engine: Engine,
        *,
        batch_size: int = 64,
        max_new_tokens: int = 16,
        match: Literal["weights", "architecture"] = "weights",
    ) -> None:
        super().__init__(
            engine.model,
            engine.tokenizer,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            match=match,
        )
        self.asked = engine
        self.engine = f"vllm {engine_version()}"

    @classmethod
    def of(cls, engine: Engine) -> Callable[..., Subject]:
        """What `evaluate` makes its subject with."""
        return lambda model, tokenizer, **settings: cls(engine, **settings)

    def condition(self, arm: Arm, *, seed: int = 0) -> Condition:
        """The model under an arm."""
        return EngineCondition(self, arm, seed=seed)

    def held(self) -> dict[str, str]:
        """In what the engine computes."""
        config = self.asked.llm.llm_engine.vllm_config
        ranks = (
            f"{config.parallel_config.tensor_parallel_size}×{config.parallel_config.pipeline_parallel_size}"
        )
        return {
            "dtype": self.asked.dtype,
            "device": str(config.device_config.device_type),
            "engine": f"{self.engine}, {ranks} ranks, quantised {config.model_config.quantization}",
        }

    def preference(self, forks: Sequence[Fork], steering: Steering | None = None) -> NDArray[np.float64]:
        """As `Subject.preference`."""
        settings = [greedy(1, logprobs=2, logprob_token_ids=[fork.positive, fork.negative]) for fork in forks]
        outputs = self.asked.ask(
            [fork.ids for fork in forks],
            [steering] * len(forks),
            settings,
            prompts=[fork.prompt_length for fork in forks],
        )
        found = [output.outputs[0].logprobs[0] for output in outputs]
        return np.array(
            [
                float(one[fork.positive].logprob) - float(one[fork.negative].logprob)
                for one, fork in zip(found, forks, strict=True)
            ]
        )

    def prompt_rates(self, rows: Sequence[Sequence[int]]) -> PromptRates:
        """Which experts the unsteered model uses for prompts of token ids."""
        sites = first_routers(self.model)
        settings = [greedy(1, extra_args={KEY: CountedText(((0, len(ids), 0),))}) for ids in rows]
        ask(self.asked.llm, rows, settings)
        answers = self.asked.llm.collective_rpc("steersman_counts", args=(1,))
        widest = max(site.facts.experts for site in sites.values())
        counts = merged(answers, list(sites), 1, widest)[0].astype(np.int64)
        tokens = sum(map(len, rows))
        top_k = np.array([site.facts.top_k for site in sites.values()])
        if (counts.sum(axis=-1) != tokens * top_k).any():
            raise ServingError("the engine has not counted each token of the prompts once")
        return rates_of(sites, counts, tokens)


class EngineCondition(Condition):
    """A model in an engine under one arm."""

    subject: EngineSubject
    tells_divergences = False

    def answers(self, contents: Sequence[Content], *, max_new_tokens: int | None = None) -> list[str]:
        """Greedy answers, without special tokens."""
        return [text for (text,) in self._written(contents, max_new_tokens)]

    def samples(
        self,
        contents: Sequence[Content],
        count: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
    ) -> list[list[str]]:
        """`count` sampled answers to each prompt; the same ones whenever the same prompt is asked again."""
        return self._written(
            contents,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            answers=count,
            seeds=[self._seed_of([content]) for content in contents],
        )

    def log_likelihoods(
        self, contents: Sequence[Content], continuations: Sequence[Sequence[str]]
    ) -> list[list[LogLikelihood]]:
        """log p of each prompt's continuations, teacher-forced.

        Raises PairsError where a continuation adds no token.
        """
        rows = [
            encode_answer(self.subject.tokenizer, self.prompt(content), text)
            for content, texts in zip(contents, continuations, strict=True)
            for text in texts
        ]
        read = iter(self._read([ids for ids, _ in rows], [length for _, length in rows]))
        return [[next(read) for _ in texts] for texts in continuations]

    def readings(self, texts: Sequence[str]) -> list[Reading]:
        """How plain texts are read; without divergences, for which an engine does not tell enough.

        Longer texts than the model takes are cut. Raises PairsError for a text of fewer than two tokens.
        """
        tokenizer, limit = self.subject.tokenizer, self._context() - 1
        rows = [tuple(tokenizer(text, verbose=False)["input_ids"])[:limit] for text in texts]
        if short := [text for text, ids in zip(texts, rows, strict=True) if len(ids) < 2]:
            raise PairsError(f"{short[0]!r}: a text to read must have at least two tokens")
        return [Reading(-one.total, one.tokens, None) for one in self._read(rows, [1] * len(rows))]

    def token_shifts(
        self, contents: Sequence[Content], texts: Sequence[str], base: Condition
    ) -> list[list[tuple[str, float]]]:
        """Not to be had. Raises `ServingError`."""
        raise ServingError(UNDIVERGED)

    # ---------------------------------------------------------------- inside

    def _written(self, contents: Sequence[Content], limit: int | None, **settings: Any) -> list[list[str]]:
        require_repeatable(self.subject.model)
        rows = [self.subject.encoded(self.prompt(content)) for content in contents]
        most = limit or self.subject.max_new_tokens
        self._check_room(rows, most)
        plans = [self.steering] * len(rows)
        written = write(self.subject.asked, rows, plans, max_new_tokens=most, **settings)
        for one in written:
            self._add(one.receipt)
        return [self._texts(one) for one in written]

    def _texts(self, written: Written) -> list[str]:
        texts = self.subject.tokenizer.batch_decode(list(map(list, written.ids)), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _read(self, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[LogLikelihood]:
        """log p of what comes after each row's prompt."""
        self._check_room(rows, 1)
        settings = [greedy(1, prompt_logprobs=0)] * len(rows)
        outputs = self.subject.asked.ask(rows, [self.steering] * len(rows), settings, prompts=prompts)
        found = []
        for ids, start, output in zip(rows, prompts, outputs, strict=True):
            self._add(output.steersman)
            said = [output.prompt_logprobs[place][ids[place]] for place in range(start, len(ids))]
            total = float(np.sum([one.logprob for one in said], dtype=np.float64))
            found.append(LogLikelihood(total, len(said), all(one.rank == 1 for one in said)))
        return found

    def _add(self, receipt: dict[str, Any]) -> None:
        for site, tokens in receipt["tokens"].items():
            self.receipt[site] = self.receipt.get(site, 0) + tokens

    def _context(self) -> int:
        """How many tokens the engine takes at once."""
        return min(super()._context(), self.subject.asked.context)


def greedy(tokens: int, **more: Any) -> Any:
    """Settings of a request that is answered by so many tokens, whatever they are."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)
