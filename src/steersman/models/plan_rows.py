"""Many plans on the same texts: every plan and text a row of one batch, computed from the first edited layer
on, after one cache of what no plan can change.

What a plan leaves as it is, is computed once: the layers before its first edit, and, where a scope holds
nothing before a prompt's last token (`answer`, `generated`), every layer's keys and values of the prompt.
Families differ, so this is done where it was seen to give what a whole forward gives; elsewhere every row is
a whole forward.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steersman.edits import SCOPES
from steersman.errors import ModelError
from steersman.models.apply import Match, apply_rows
from steersman.models.reading import evaluating, input_device, pad_id
from steersman.models.replay import Anatomy, CannotCut, Cuts, Recording, positions_of
from steersman.models.scored_text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steersman.steering import Steering

Floats = npt.NDArray[np.float64]
Values = Callable[["_Batch", Tensor, Tensor], Tensor]
"""What is made of logits [n, columns, vocabulary] of the batch's rows named: float64 [n]."""

_LOGITS_BYTES = 1 << 28
"""Logits, in float32, that one forward may give."""
_CACHE_BYTES = 1 << 28
"""Keys and values that one forward may copy."""
KEPT_BYTES = 1 << 30
"""Of batches that are kept for further plans."""
_TOKENS = 4096
"""Tokens of the texts in one batch, padding included."""
OLD_NAME = "past_key_values"
"""What transformers calls a cache before 5.24."""
UNFIT = (CannotCut, RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""What a model raises that does not take a forward in parts."""


class PlanRows:
    """A model that reads given texts under many plans.

    Args:
        model, tokenizer: What is steered.
        match: As of `Steering.apply`.

    Example:
        >>> model, tokenizer = steersman.load_model("lab:moe")
        >>> task = steersman.load_task("lab:refusal/dev", limit=4)
        >>> plan = steersman.Steering.from_experts(model, {3: [5]})
        >>> from steersman.evaluation.screening.texts import preferences
        >>> from steersman.models.plan_rows import PlanRows
        >>> PlanRows(model, tokenizer).scores(preferences(task, tokenizer).texts, [None, plan]).shape
        (2, 4)
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, match: Match = "weights"
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.match: Match = match
        self.rows_run = 0
        """Texts that went through a forward so far, whole or in part."""
        self._anatomy = Anatomy(model, [])
        self._cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else OLD_NAME
        self._kept: dict[tuple[bool, tuple[int, ...]], _Batch] = {}
        self._kept_bytes = 0
        self.ways: dict[tuple[bool, int], bool] = {}
        """By whether prompts are cached, and first layer: whether forwards in parts were seen to give a whole
        one's logits, in every batch so far."""

    def scores(self, texts: Sequence[Text], plans: Sequence[Steering | None]) -> Floats:
        """Σ weight · log p of each text under each plan, in nats: [plans, texts].

        Raises ModelError where one is nan or infinite.
        """
        return self._read(texts, plans, _Batch.scores)

    def divergences(self, texts: Sequence[Text], plans: Sequence[Steering | None]) -> Floats:
        """KL(plan ‖ unsteered) in nats, the mean over each text's scored places: [plans, texts]."""
        return self._read(texts, plans, _Batch.divergences)

    def greedy(self, texts: Sequence[Text], plans: Sequence[Steering | None]) -> Floats:
        """1 where every scored token of a text is the likeliest at its place, else 0: [plans, texts]."""
        return self._read(texts, plans, _Batch.greedy)

    # ---------------------------------------------------------------- inside

    @torch.no_grad()
    def _read(self, texts: Sequence[Text], plans: Sequence[Steering | None], values: Values) -> Floats:
        found = np.zeros((len(plans), len(texts)))
        cached = all(spares_prompts(plan) for plan in plans if plan is not None)
        by_layer: dict[int, list[int]] = {}
        for number, plan in enumerate(plans):
            by_layer.setdefault(_first_layer(plan, len(self._anatomy.layers)), []).append(number)
        with evaluating(self.model):
            for numbers in _in_batches(texts, cached):
                batch = self._batch([texts[n] for n in numbers], cached)
                for first, chosen in sorted(by_layer.items()):
                    rows = [(n, row) for n in chosen for row in range(len(numbers))]
                    for part in _parts(rows, batch.rows_at_once):
                        plans_of = [_touching(plans[n], batch.texts[row]) for n, row in part]
                        logits = self._logits(batch, first, plans_of, [row for _, row in part])
                        given = values(batch, logits, torch.tensor([row for _, row in part]))
                        for (n, row), value in zip(part, given.tolist(), strict=True):
                            found[n, numbers[row]] = value
        if not np.isfinite(found).all():
            raise ModelError(
                "the model gives no finite log probability for a text (nan or infinity, in "
                f"{str(self.model.dtype).removeprefix('torch.')}): is a number format too narrow, or a "
                "weight damaged?"
            )
        return found

    def _batch(self, texts: Sequence[Text], cached: bool) -> _Batch:
        """A batch with what the unsteered model gives; kept for the next plans, while there is room."""
        key = cached, tuple(map(id, texts))  # the batch holds its texts, so that no other gets their ids
        if key not in self._kept:
            batch = _Batch(self, texts, cached)
            if self._kept_bytes + batch.bytes > KEPT_BYTES:
                return batch
            self._kept[key] = batch
            self._kept_bytes += batch.bytes
        return self._kept[key]

    def _logits(
        self, batch: _Batch, first: int, plans: Sequence[Steering | None], rows: Sequence[int]
    ) -> Tensor:
        """Logits [n, columns kept, vocabulary] of rows, each under its plan; `first`: the layer before whose
        end no plan changes anything.
        """
        steered = [place for place, plan in enumerate(plans) if plan is not None]
        if not steered:
            return batch.base[list(rows)]
        # By batch, too: a sliding window or a recurrent state may fit short texts alone.
        if first not in batch.ways:
            ends = sorted({steered[0], steered[-1]})
            fits = self._fits(batch, first, [plans[n] for n in ends], [rows[n] for n in ends])
            batch.ways[first] = fits
            key = batch.cached, first
            self.ways[key] = self.ways.get(key, True) and fits
        return self._part(batch, first, plans, rows) if batch.ways[first] else self._whole(batch, plans, rows)

    def _fits(self, batch: _Batch, first: int, plans: Sequence[Steering | None], rows: Sequence[int]) -> bool:
        """Whether a forward in parts gives a whole one's logits, within rounding."""
        whole = self._whole(batch, plans, rows)
        try:
            part = self._part(batch, first, plans, rows)
        except UNFIT:
            return False
        return alike(part, whole, batch.held(rows)[..., None])

    def _part(
        self, batch: _Batch, first: int, plans: Sequence[Steering | None], rows: Sequence[int]
    ) -> Tensor:
        if batch.prefix.shape[1] and batch.cache is None:
            raise CannotCut("the prompts' keys and values are not at hand")
        chosen = torch.tensor(list(rows), device=batch.device)
        cuts = Cuts(children=False, columns=False)
        before = first + all(_begins_with_output(plan, first) for plan in plans if plan is not None)
        cache = None if batch.cache is None else rows_of(batch.cache, chosen)
        recorded = batch.recorded
        # The stand-ins come first, so that edits are applied to what they give.
        with self._anatomy.replaying(recorded, before, cuts, batch.keep, chosen):
            return self._forward(
                plans,
                batch.suffix[chosen],
                batch.mask[chosen],
                batch.positions[chosen],
                batch.keep,
                [batch.prompt_lengths[row] for row in rows],
                cache,
            )

    def _whole(self, batch: _Batch, plans: Sequence[Steering | None], rows: Sequence[int]) -> Tensor:
        chosen = torch.tensor(list(rows), device=batch.device)
        mask = batch.mask[chosen]
        return self._forward(
            plans,
            torch.cat([batch.prefix, batch.suffix], dim=1)[chosen],
            mask,
            positions_of(mask),
            batch.keep,
            [batch.prompt_lengths[row] for row in rows],
            None,
        )

    def _forward(
        self,
        plans: Sequence[Steering | None],
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        keep: int,
        prompt_lengths: Sequence[int],
        cache: Any,
    ) -> Tensor:
        self.rows_run += len(ids)
        steered = (
            nullcontext()
            if all(plan is None for plan in plans)
            else apply_rows(self.model, plans, match=self.match, prompt_lengths=list(prompt_lengths))
        )
        more = {} if cache is None else {self._cache_name: cache}
        with steered:
            output = cast(Any, self.model)(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=cache is not None,
                logits_to_keep=keep,
                **more,
            )
        logits: Tensor = output.logits[:, -keep:]
        return logits


class _Batch:
    """Texts of like length: what comes before every edit, padded on the left, and the rest, on the right.

    Attributes:
        prefix, suffix: Token ids int64 [rows, columns]; the prefix is empty unless `cached`.
        mask: int64 [rows, prefix and suffix].
        positions: Of the suffix's tokens, from each row's first real one.
        keep: How many of the last columns are read.
        cache: Keys and values of the prefix; None without one.
    """

    def __init__(self, reader: PlanRows, texts: Sequence[Text], cached: bool) -> None:
        self._reader = reader
        self.device = input_device(reader.model)
        self.cached = cached
        self.texts = texts
        self.prompt_lengths = [text.prompt_length for text in texts]
        cuts = [text.prompt_length - 1 if cached else 0 for text in texts]
        before = [text.ids[:cut] for text, cut in zip(texts, cuts, strict=True)]
        after = [text.ids[cut:] for text, cut in zip(texts, cuts, strict=True)]
        pad, left, right = pad_id(reader.tokenizer), max(map(len, before)), max(map(len, after))
        self.prefix = self._tensor([[pad] * (left - len(ids)) + [*ids] for ids in before])
        self.suffix = self._tensor([[*ids] + [pad] * (right - len(ids)) for ids in after])
        self.mask = self._tensor(
            [
                [0] * (left - len(one)) + [1] * (len(one) + len(other)) + [0] * (right - len(other))
                for one, other in zip(before, after, strict=True)
            ]
        )
        self.positions = positions_of(self.mask)[:, left:]
        places = [[place - cut for place, _, _ in text.scored] for text, cut in zip(texts, cuts, strict=True)]
        self.keep = right - min(map(min, places))
        widest = max(map(len, places))
        offset = right - self.keep

        def padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
            return torch.tensor([[*row] + [0] * (widest - len(row)) for row in rows], dtype=dtype)

        self._places = padded([[place - offset for place in row] for row in places], torch.int64)
        self._tokens = padded([[token for _, token, _ in text.scored] for text in texts], torch.int64)
        self._weights = padded([[weight for *_, weight in text.scored] for text in texts], torch.float64)
        self._scored = padded([[1.0] * len(row) for row in places], torch.float64)
        self._run()

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device).reshape(len(rows), -1)

    def _run(self) -> None:
        """The unsteered model, once: the prefix's cache, then every layer's output and the logits."""
        self.cache: Any = None
        self.recorded = Recording()
        self.ways: dict[int, bool] = {}
        if not self.prefix.shape[1]:
            self.base = self._after(None)
            return
        rows = range(len(self.texts))
        whole = self._reader._whole(self, [None for _ in rows], rows)
        try:
            self.cache = self._of_prefix()
            self.base = self._after(rows_of(self.cache, torch.arange(len(rows), device=self.device)))
            if alike(self.base, whole, self.held(rows)[..., None]):
                return
        except UNFIT:  # the family has no cache, or none that can be split into rows
            pass
        self.cache, self.base = None, whole

    def _of_prefix(self) -> Any:
        """Keys and values of what comes before every edit."""
        mask = self.mask[:, : self.prefix.shape[1]]
        output = cast(Any, self._reader.model)(
            input_ids=self.prefix,
            attention_mask=mask,
            position_ids=positions_of(mask),
            use_cache=True,
            logits_to_keep=1,
        )
        return output.get(self._reader._cache_name)

    def _after(self, cache: Any) -> Tensor:
        """The unsteered logits of the rest; notes what every layer gives."""
        nobody = [None] * len(self.texts)
        with self._reader._anatomy.recording() as self.recorded:
            return self._reader._forward(
                nobody, self.suffix, self.mask, self.positions, self.keep, self.prompt_lengths, cache
            )

    @cached_property
    def _cache_bytes(self) -> int:
        return cache_bytes(self.cache)

    @property
    def bytes(self) -> int:
        """What it holds of the unsteered model."""
        return _bytes(self.base) + self._cache_bytes + sum(map(_bytes, self.recorded.outputs.values()))

    @cached_property
    def rows_at_once(self) -> int:
        """How many rows a forward takes: by the logits that it gives, and the cache that it copies."""
        logits = 4 * self.keep * self.base.shape[-1]
        copied = self._cache_bytes // len(self.texts)
        by_tokens = max(1, _TOKENS // self.suffix.shape[1])
        return max(1, min(_LOGITS_BYTES // logits, _CACHE_BYTES // max(copied, 1), by_tokens))

    def held(self, rows: Sequence[int]) -> Tensor:
        """Which of the kept columns are scored, [n, columns]."""
        found = torch.zeros(len(rows), self.keep, device=self.base.device)
        chosen = list(rows)
        return found.scatter_reduce_(
            1,
            self._places[chosen].to(found.device),
            self._scored[chosen].float().to(found.device),
            "amax",
        )

    # ------------------------------------------------------------ what is made of logits

    def _at_places(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Logits at the scored places, float32 [n, scored, vocabulary]."""
        at = torch.arange(len(rows), device=logits.device)[:, None]
        return logits[at, self._places[rows].to(logits.device)].float()

    def scores(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Σ weight · log p, float64 [n]."""
        chosen = self._at_places(logits, rows)
        tokens = self._tokens[rows].to(chosen.device)[..., None]
        own = chosen.gather(-1, tokens)[..., 0].double()
        weights = self._weights[rows].to(chosen.device)
        if bool((weights.sum(dim=1) != 0).any()):  # two answers' tokens at one place cancel the normaliser
            own = own - chosen.logsumexp(dim=-1).double()
        return (own * weights).sum(dim=1).cpu()

    def greedy(self, logits: Tensor, rows: Tensor) -> Tensor:
        """1 where every scored token is the likeliest, float64 [n]."""
        found = self._at_places(logits, rows).argmax(dim=-1).cpu() == self._tokens[rows]
        return (found | (self._scored[rows] == 0)).all(dim=1).double()

    def divergences(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Mean KL to the unsteered model over the scored places, float64 [n]."""
        own = self._at_places(logits, rows).log_softmax(dim=-1)
        other = self._at_places(self.base[rows.to(self.base.device)], rows).log_softmax(dim=-1)
        terms = torch.where(own.isneginf(), 0.0, own.exp() * (own - other)).sum(dim=-1).clamp(min=0)
        scored = self._scored[rows].to(terms.device)
        return ((terms.double() * scored).sum(dim=1) / scored.sum(dim=1)).cpu()


def alike(part: Tensor, whole: Tensor, held: Tensor) -> bool:
    """Whether logits are the same within rounding where they are read."""
    off = ((part - whole).float().abs() * held).max()
    tolerance = max(1e-5, 8 * torch.finfo(whole.dtype).eps)
    return bool(off <= tolerance * (1 + (whole.float().abs() * held).max()))


def spares_prompts(plan: Steering) -> bool:
    """Whether a plan edits nothing before a prompt's last token."""
    return all("prompt" not in SCOPES[edit.scope] for edit in plan.edits)


def _touching(plan: Steering | None, text: Text) -> Steering | None:
    """A plan; None where its scopes hold no token of a text, which then is as unsteered."""
    fed_back = len(text.ids) > text.prompt_length
    if plan is None or fed_back or any(SCOPES[edit.scope] != SCOPES["generated"] for edit in plan.edits):
        return plan
    return None


def _first_layer(plan: Steering | None, layers: int) -> int:
    """The first layer that a plan edits; one after the last where it edits none."""
    return min((layer for edit in (plan.edits if plan else ()) for layer in edit.layers), default=layers)


def _begins_with_output(plan: Steering, first: int) -> bool:
    """Whether a plan leaves what happens inside its first layer as it is."""
    return all(edit.point == "block_output" for edit in plan.edits if first in edit.layers)


def _in_batches(texts: Sequence[Text], cached: bool) -> Iterator[list[int]]:
    """Numbers of texts, those of like length together, so many as `_TOKENS` allows."""

    def shape(number: int) -> tuple[int, int, int]:
        text = texts[number]
        return (len(text.ids) - text.prompt_length if cached else 0, len(text.ids), number)

    batch: list[int] = []
    for number in sorted(range(len(texts)), key=shape):
        longest = max(len(texts[n].ids) for n in [*batch, number])
        if batch and longest * (len(batch) + 1) > _TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def cache_bytes(cache: Any) -> int:
    """What the keys and values of a cache take."""
    return sum(_bytes(part) for layer in getattr(cache, "layers", ()) for part in vars(layer).values())


def _bytes(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(map(_bytes, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _parts(rows: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def rows_of(cache: Any, rows: Tensor) -> Any:
    """Some rows of a cache, again and again if named so, as a cache of its own; what it was made from stays
    as it is. Raises as `UNFIT` where the family's cache has no rows.
    """
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in found.layers:
        layer.batch_select_indices(rows)
    return found
