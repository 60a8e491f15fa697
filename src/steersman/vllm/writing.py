"""What an engine writes: answers of token ids, ended as the model's own settings say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steersman.errors import ServingError
from steersman.models.decoding import own_settings, text_ends
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
    top_p: float | None = 1.0,
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
        top_p: Tokens are drawn from the likeliest that have this share together; None: from those that the
            checkpoint's own settings leave.
        seeds: Of what is drawn, for each prompt.
        answers: To each prompt.

    Raises:
        ServingError: the checkpoint's own settings ask for what an engine cannot do.
        ModelError: they name no token that ends an answer, but something else.
    """
    from vllm import SamplingParams

    own = own_of_engine(engine.model, sampled=temperature > 0 and top_p is None)
    if top_p is not None:
        own["top_p"] = top_p
    settings = [
        SamplingParams(
            n=answers,
            temperature=temperature,
            seed=None if seeds is None else seeds[number],
            max_tokens=max_new_tokens,
            ignore_eos=True,  # the model's settings alone say what ends an answer, as in transformers
            stop_token_ids=text_ends(engine.model),
            detokenize=False,
            **own,
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


_AS_THE_ENGINE_SAYS = {
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
}
"""A checkpoint's settings that an engine can follow, as `SamplingParams` calls them."""


def own_of_engine(model: Any, *, sampled: bool = False) -> dict[str, Any]:
    """The checkpoint's own settings that act, as `SamplingParams` takes them.

    Raises:
        ServingError: one acts that an engine does not know: answers would not be those of transformers.
    """
    acting = own_settings(model, sampled=sampled).acting
    unknown = [name for name in acting if name not in _AS_THE_ENGINE_SAYS]
    if unknown:
        raise ServingError(
            f"the model's generation_config.json sets {unknown[0]}, which the engine cannot follow: leave "
            "out --backend vllm, or remove it there"
        )
    return {_AS_THE_ENGINE_SAYS[name]: value for name, value in acting.items()}
