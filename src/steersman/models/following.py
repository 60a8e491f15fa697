"""Following a call of `generate` from its input to the rows' ends, so that every token's role is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from steersman.errors import SteeringNotApplied
from steersman.models.overflow import Overflows
from steersman.models.packing import refuse_packed
from steersman.models.tokens import Generation
from steersman.steering import Steering

if TYPE_CHECKING:
    from steersman.models.apply import Context

_UNFOLLOWED = (
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "penalty_alpha",
    "dola_layers",
    "token_healing",
)
"""Settings under which the decoder is fed candidates, contrasts or another prompt than the one given."""

_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""What transformers calls a cache: from 5.24 on; before, of keys and values, of Mamba and xLSTM, of RWKV."""

_STATE = "a recurrent state given cannot be steered: it does not tell how many tokens it holds"


class Following:
    """A call of `generate`: its input as given, then its `Generation` once transformers has settled the
    configuration.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], contexts: tuple[Context, ...]) -> None:
        self.contexts = contexts
        """The blocks under which it began."""
        if kwargs.get("cache_implementation") == "paged":
            raise SteeringNotApplied("generate with a paged cache cannot be steered: it packs rows")
        for name in ("assistant_model", "custom_generate", "negative_prompt_ids"):
            if kwargs.get(name) is not None:
                raise SteeringNotApplied(f"generate with {name} cannot be steered exactly: leave it out")
        given = cache_of(kwargs)
        if given is not None and cache_length(given) is None:
            raise SteeringNotApplied(f"generate with {_STATE}: leave it out")
        ids = args[0] if args else kwargs.get("inputs")
        ids = ids if ids is not None else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        self._ids: Tensor | None = ids
        self._given: Tensor | None = embeds if embeds is not None else ids
        self._mask: Tensor | None = kwargs.get("attention_mask")
        self._cached = cache_length(given) or 0
        plans = [plan for context in contexts for plan in context.plans]
        if isinstance(self._given, Tensor) and needs_roles(plans):
            positions, mask = kwargs.get("position_ids"), self._mask
            columns = self._given.shape[1] if positions is None else positions.shape[-1]
            cached = mask.shape[1] - columns if mask is not None and mask.dim() == 2 else 0
            refuse_packed(kwargs, len(self._given), columns, mask, max(cached, 0))
        self._generation: Generation | None = None
        self._may_feed_back = True
        self._samples = False
        self._overflows = Overflows()

    def start(self, config: Any, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """Begin to follow: read the prompt's padding, and watch the criteria for rows that end."""
        for name in _UNFOLLOWED:
            if getattr(config, name, None):
                raise SteeringNotApplied(f"generate with {name} cannot be steered exactly: leave it out")
        if getattr(config, "guidance_scale", None) not in (None, 1, 1.0):
            raise SteeringNotApplied("generate with guidance_scale cannot be steered exactly: leave it out")
        # A compiled forward would keep the plan of its first call.
        config.disable_compile = True
        self._samples = bool(getattr(config, "do_sample", False))
        self._generation = Generation(self._prompt(config), self._cached)
        longest = getattr(criteria, "max_length", None)
        # Counted in ids, as transformers does: embeddings have none, and ids given beside a cache may be the
        # new ones alone.
        ids = self._ids.shape[1] if self._ids is not None else int(self._given is None)
        self._may_feed_back = longest is None or longest > ids + 1
        beams = (getattr(config, "num_beams", None) or 1) > 1
        # Beams are reordered between steps and drop finished ones by themselves: no row ends early.
        return criteria if beams else _WatchedCriteria(criteria, self._generation)

    def started(self) -> Generation:
        """The generation that is followed.

        Raises `SteeringNotApplied` where it was never begun.
        """
        if self._generation is None:
            raise SteeringNotApplied(
                "this way of generating is not known, so its tokens' roles cannot be told"
            )
        return self._generation

    def overflowed(self, overflows: Overflows) -> None:
        """Take note of what a forward's edits did to numbers in float16. Read at the end; at once before a
        token is drawn, which no device does from NaN.
        """
        self._overflows.add(overflows)
        if self._samples:
            self._overflows.check()

    def finish(self, plans: Iterable[Steering | None]) -> None:
        """Check a call that has ended well.

        Raises:
            SteeringNotApplied: no forward was steered, a scope could select nothing (one new token is never
                fed back), or numbers went beyond float16.
        """
        self._overflows.check()
        if self._generation is None or self._generation.fed == self._cached:
            raise SteeringNotApplied("generate returned without a steered forward: its output is not steered")
        if not self._may_feed_back:
            refuse_empty_scope(plans)

    def _prompt(self, config: Any) -> Tensor:
        if self._mask is not None:
            return self._mask != 0
        if self._given is None:
            return torch.ones(1, 1, dtype=torch.bool)
        everything = torch.ones(self._given.shape[:2], dtype=torch.bool, device=self._given.device)
        pad, eos = getattr(config, "_pad_token_tensor", None), getattr(config, "_eos_token_tensor", None)
        if self._ids is None or self._given is not self._ids or pad is None:
            return everything
        if eos is not None and bool(torch.isin(eos, pad).any()):
            return everything  # transformers' own rule: padding that is also an end cannot be told from it
        return self._ids.ne(pad.to(self._ids.device))


class _WatchedCriteria(StoppingCriteriaList):
    """Stopping criteria that tell the followed generation which rows have ended."""

    def __init__(self, criteria: StoppingCriteriaList, generation: Generation) -> None:
        super().__init__(criteria)
        self._generation = generation

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self._generation.end_rows(done)
        return done


def needs_roles(plans: Iterable[Steering | None]) -> bool:
    """Whether a plan's scope does not hold every token."""
    return any(edit.scope != "all" for plan in plans if plan is not None for edit in plan.edits)


def refuse_empty_scope(plans: Iterable[Steering | None]) -> None:
    """Raise `SteeringNotApplied` where a plan's scope needs generated tokens and there can be none."""
    if any(edit.scope == "generated" for plan in plans if plan is not None for edit in plan.edits):
        raise SteeringNotApplied(
            "scope 'generated' selects nothing here: no generated token is fed back; "
            "generate more than one token, give prompt_lengths, or take another scope: "
            'plan.with_scope("answer") (compose --scope answer)'
        )


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache that a call is given; None without one."""
    return next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)


def check_lengths(cache: Any) -> None:
    """Raise `SteeringNotApplied` where prompts' lengths say nothing, because of a cache of unknown length."""
    if cache is not None and cache_length(cache) is None:
        raise SteeringNotApplied(f"prompt_lengths with {_STATE}: use generate")


def cache_length(cache: Any) -> int | None:
    """Columns that a cache holds; None without a cache, or where it holds a state and no columns."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return None
    layers = getattr(cache, "layers", None) or ()
    counting = [layer for layer in layers if hasattr(layer, "get_seq_length")]
    if layers and not counting:
        return None
    # It asks the first layer, which in RecurrentGemma keeps nothing (transformers 5.19).
    return int(cache.get_seq_length()) or max((int(layer.get_seq_length()) for layer in counting), default=0)
