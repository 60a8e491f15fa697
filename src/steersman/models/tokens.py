"""What each token of a forward is to its row: padding, prompt, the prompt's last token, or generated and fed
back.

Shapes alone cannot tell: the last chunk of a chunked prefill looks like a decode step, finished rows are fed
padding with mask 1, beams multiply rows, a static cache hides the 2-D mask. So a generation is followed from
its input to its end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steersman.edits import ROLES, SCOPES, Scope
from steersman.errors import SteeringNotApplied
from steersman.showing import count_of

OUTSIDE = 0
"""Role code of padding and of what is fed after a row's end: neither edited nor counted."""
PROMPT, LAST, GENERATED = (1 + ROLES.index(role) for role in ("prompt", "last", "generated"))
ROLE_CODES = 1 + len(ROLES)


class Tokens:
    """The tokens of one decoder forward.

    Args:
        roles: Role codes, int64 [rows, columns]; or None where `counts` says it all.
        counts: Tokens of each role code in every row, where no row differs (no padding, no end): known
            without a look at the device. A row is then its prompt, its last token, what was generated.
        fresh: Columns before this one were fed before (generation without a cache feeds everything again):
            they are edited but not counted again.
        copies: How many rows of the forward stand for one row given: beams, or several answers to one prompt.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        device: torch.device,
        *,
        roles: Tensor | None = None,
        counts: tuple[int, ...] | None = None,
        fresh: int = 0,
        copies: int = 1,
    ) -> None:
        self.rows = rows
        self.columns = columns
        self.device = device
        self.counts = counts
        self.fresh = fresh
        self.copies = copies
        self._roles = roles

    @property
    def roles(self) -> Tensor:
        """Role codes, int64 [rows, columns]."""
        if self._roles is None:
            row = [code for code, count in enumerate(self.counts or ()) for _ in range(count)]
            self._roles = torch.tensor(row, device=self.device).expand(self.rows, -1)
        return self._roles


def codes_of(scope: Scope) -> list[int]:
    """The role codes that a scope holds."""
    return [1 + ROLES.index(role) for role in ROLES if role in SCOPES[scope]]


class Generation:
    """One call of `generate`, followed from its input on.

    Args:
        prompt: bool [rows of the input, columns], False at padding; the cached columns are the first
            `cached` ones.
        cached: Columns that a cache passed in holds already; the tokens after them are the prompt.
    """

    def __init__(self, prompt: Tensor, cached: int) -> None:
        self.input_rows = prompt.shape[0]
        self.prompt_columns = prompt.shape[1]
        self.fed = cached
        self._rows = self.input_rows
        self._prompt = prompt
        self._roles: Tensor | None = None
        self._done: Tensor | None = None
        # While all rows are alike, their roles follow from the columns alone.
        self._alike = self.prompt_columns > 0 and bool(prompt.all())

    def end_rows(self, done: Tensor) -> None:
        """Mark rows [rows] bool as ended: what is fed to them from now on is outside."""
        if self._done is None and not bool(done.any()):
            return
        if self._alike:
            self._alike = False
            self._known_roles(self.fed, done.device)  # the columns until now, in which nothing had ended
        self._done = done if self._done is None else self._done | done

    def next(
        self,
        rows: int,
        columns: int,
        *,
        has_cache: bool,
        cache_length: int | None,
        device: torch.device | None = None,
    ) -> Tokens:
        """The tokens of the next forward, [rows, columns].

        Raises:
            SteeringNotApplied: the forward does not continue this generation, so its roles cannot be told.
        """
        self._multiply(rows)
        start = self.fed if has_cache else 0
        if cache_length is not None and has_cache and cache_length != start:
            raise SteeringNotApplied(
                f"the cache holds {cache_length} tokens where generation has fed {start}: "
                "roles cannot be told"
            )
        end = start + columns
        if not has_cache and end < self.fed:
            raise SteeringNotApplied(
                f"without a cache generation fed {end} tokens after {self.fed}: roles cannot be told"
            )
        # The prompt comes first, whole or in chunks, then one token at a time: anything else (virtual tokens
        # before the prompt, candidates after it) would shift the roles.
        expected = self.prompt_columns if self.fed < self.prompt_columns else self.fed + 1
        if end > expected:
            raise SteeringNotApplied(
                f"generation fed {end} tokens where {expected} were expected: roles cannot be told"
            )
        device = device or self._prompt.device
        copies = rows // self.input_rows
        fresh = max(0, self.fed - start)
        self.fed = max(self.fed, end)
        if self._alike and not fresh:
            return Tokens(rows, columns, device, counts=self._counts(start, end), copies=copies)
        roles = self._known_roles(end, device)[:, start:end]
        return Tokens(rows, columns, device, roles=roles, fresh=fresh, copies=copies)

    def _multiply(self, rows: int) -> None:
        """Follow rows that beams, or several answers to one prompt, have multiplied."""
        if rows == self._rows:
            return
        if self._rows != self.input_rows or rows % self.input_rows:
            raise SteeringNotApplied(
                f"generate was given {self.input_rows} rows but fed {rows}: roles cannot be told"
            )
        self._rows = rows
        if self._roles is not None:
            self._roles = self._roles.repeat_interleave(rows // self.input_rows, dim=0)

    def _counts(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens of each role code in the columns from `start` to `end`, the same in every row."""
        last = self.prompt_columns - 1
        generated = end - max(start, self.prompt_columns) if end > self.prompt_columns else 0
        lasts = int(start <= last < end)
        return 0, end - start - lasts - generated, lasts, generated

    def _known_roles(self, columns: int, device: torch.device) -> Tensor:
        """Role codes of the first columns at least, int64 [rows, columns or more]."""
        if self._roles is None:
            prompt = self._prompt.to(device)
            roles = _prompt_roles(prompt)
            self._roles = roles.repeat_interleave(self._rows // self.input_rows, dim=0)
        self._roles = self._roles.to(device)
        missing = columns - self._roles.shape[1]
        if missing > 0:
            added = self._roles.new_full((self._rows, missing), GENERATED)
            if self._done is not None and self._done.shape[0] == self._rows:
                added = added.masked_fill(self._done.to(device)[:, None], OUTSIDE)
            self._roles = torch.cat([self._roles, added], dim=1)
        return self._roles


def tokens_of_forward(
    rows: int,
    columns: int,
    *,
    mask: Tensor | None,
    cached: int,
    prompt_lengths: Sequence[int] | None,
    device: torch.device,
) -> Tokens:
    """The tokens of a forward outside `generate`.

    Without `prompt_lengths` every token given is prompt. With them a row's first P real tokens are its
    prompt, cached ones included, and the rest is generated.

    Args:
        mask: The attention mask: [rows, columns] or [rows, cached + columns], or 4-D; None where nothing is
            padding.
        cached: Columns in the cache before this forward.
        prompt_lengths: P of each row, in real tokens.

    Raises:
        SteeringNotApplied: the lengths do not fit the rows, or the mask has an unknown form.
    """
    if prompt_lengths is None and columns and (mask is None or _is_full(mask, rows, cached, columns)):
        return Tokens(rows, columns, device, counts=(0, columns - 1, 1, 0))
    before, real = split_mask(mask, rows, columns, cached, device)
    if prompt_lengths is None:
        return Tokens(rows, columns, device, roles=_prompt_roles(real))
    if len(prompt_lengths) != rows:
        given = count_of(len(prompt_lengths), "entry", "entries")
        raise SteeringNotApplied(f"prompt_lengths has {given} for {count_of(rows, 'row')}")
    lengths = torch.tensor(list(prompt_lengths), device=device)[:, None]
    ordinal = before[:, None] + real.long().cumsum(dim=1) - 1
    roles = torch.full_like(ordinal, GENERATED)
    roles = roles.masked_fill(ordinal < lengths, PROMPT).masked_fill(ordinal == lengths - 1, LAST)
    return Tokens(rows, columns, device, roles=roles.masked_fill(~real, OUTSIDE))


def _is_full(mask: Tensor, rows: int, cached: int, columns: int) -> bool:
    """Whether a mask in the host's memory has no padding; on a device the question would make it wait."""
    known = mask.shape in ((rows, columns), (rows, cached + columns))
    return known and mask.device.type == "cpu" and bool(mask.all())


def split_mask(
    mask: Tensor | None, rows: int, columns: int, cached: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(real tokens before this forward [rows], which of its tokens are real, bool [rows, columns])."""
    everything = torch.ones(rows, columns, dtype=torch.bool, device=device)
    before = torch.full((rows,), cached, device=device)
    if mask is None:
        return before, everything
    if mask.dim() == 2 and mask.shape == (rows, cached + columns):
        real = mask.to(device) != 0
        return real[:, :cached].sum(dim=1), real[:, cached:]
    if mask.dim() == 2 and mask.shape == (rows, columns):
        return before, mask.to(device) != 0
    if mask.dim() == 4 and mask.shape[0] in (1, rows) and mask.shape[2] == columns:
        visible = visible_keys(mask).to(device).expand(rows, -1, -1)
        seen = visible[:, :, :cached].sum(dim=2).amax(dim=1)  # cached padding is seen by no token
        # A real token sees itself, padding never does.
        return seen, visible.diagonal(offset=cached, dim1=1, dim2=2)
    raise SteeringNotApplied(
        f"an attention mask of shape {tuple(mask.shape)} does not tell which of {rows}×{columns} tokens "
        "are padding"
    )


def visible_keys(mask: Tensor) -> Tensor:
    """Which keys each token sees by a 4-D mask, boolean or additive; bool [rows, columns, keys]."""
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0


def _prompt_roles(real: Tensor) -> Tensor:
    """Role codes of a prompt: PROMPT, LAST at each row's last real token, OUTSIDE at padding."""
    columns = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, columns, -1).amax(dim=1, keepdim=True) if real.shape[1] else columns[None]
    roles = torch.where(columns == last, LAST, PROMPT)
    return roles.masked_fill(~real.bool(), OUTSIDE)
