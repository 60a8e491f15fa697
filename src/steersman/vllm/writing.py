"""What an engine writes: answers of token ids, ended as the model's own settings say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steersman.steering import Steering
from steersman.vllm.backend import Engine


@dataclass(frozen=True)
class Written:
    """What an engine wrote after one prompt.

    Attributes:
        ids: Of each answer, its tokens, an end included.
        receipt: What was applied, as the engine says it.
    """

    ids: tuple[tuple[int, ...], ...]
    receipt: dict[str, Any]


def write(
    engine: Engine,
    ids: Sequence[Sequence[int]],
    plans: Sequence[Steering | None],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    answers: int = 1,
) -> list[Written]:
    """Let an engine answer prompts of token ids, each under a plan of its own, all in one go.

    Args:
        engine: Where.
        ids: Of each prompt.
        plans: What each is steered by; None: nothing.
        max_new_tokens: Of an answer at most.
        temperature: 0 takes the likeliest token.
        top_p: Tokens are drawn from the likeliest that have this share together.
        seeds: Of what is drawn, for each prompt.
        answers: To each prompt.
    """
    from vllm import SamplingParams

    wishes = engine.model.generation_config
    settings = [
        SamplingParams(
            n=answers,
            temperature=temperature,
            top_p=top_p,
            seed=None if seeds is None else seeds[number],
            max_tokens=max_new_tokens,
            ignore_eos=True,  # the model's settings alone say what ends an answer, as in transformers
            stop_token_ids=ends_of(engine.model),
            repetition_penalty=getattr(wishes, "repetition_penalty", None) or 1.0,
            detokenize=False,
        )
        for number in range(len(ids))
    ]
    return [
        Written(
            tuple(tuple(answer.token_ids) for answer in sorted(output.outputs, key=lambda one: one.index)),
            output.steersman,
        )
        for output in engine.ask(ids, plans, settings)
    ]


def ends_of(model: Any) -> list[int]:
    """Ids of the tokens that end what a model generates; none where its settings name none."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return []
    return [int(end) for end in (ends if isinstance(ends, list | tuple) else [ends])]
