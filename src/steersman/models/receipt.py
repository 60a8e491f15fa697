"""The receipt of a block: what was in fact applied in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from steersman.models.program import Histogram, Program, Site, site_name
from steersman.showing import Shown, Table, count_of, cut

if TYPE_CHECKING:
    from steersman.models.apply import Context


class Receipt(Shown):
    """What was in fact applied in a block: `tokens` and `changed` count each token once a site."""

    def __init__(self, context: Context) -> None:
        plans = context.rows
        self.fingerprint: str | tuple[str | None, ...] = (
            plans[0].fingerprint
            if context.broadcast and plans[0] is not None
            else tuple(plan.fingerprint if plan is not None else None for plan in plans)
        )
        self.match = context.match
        """Whether only the weights a plan was made for were taken, or any of its architecture."""
        self._context = context
        self._histograms: dict[Program, Histogram] = {}
        self._changed: dict[Site, Tensor] | None = {} if context.receipt_kind == "changes" else None

    @property
    def tokens(self) -> dict[str, int]:
        """{"router:3": n}: tokens in scope of an edit at this site, each once."""
        counts = dict.fromkeys(self._context.sites, 0)
        for program, histogram in self._histograms.items():
            totals = histogram.tolist()
            for site in counts:
                held = program.held(self._context, site)
                counts[site] += sum(total for total, counted in zip(totals, held, strict=True) if counted)
        return {site_name(site): counts[site] for site in sorted(counts)}

    @property
    def changed(self) -> dict[str, int] | None:
        """{"router:3": n}: tokens in scope whose chosen experts differ; None unless asked for
        (`receipt="changes"`).
        """
        if self._changed is None:
            return None
        return {
            site_name(site): int(self._changed[site]) if site in self._changed else 0
            for site in sorted(self._context.sites)
        }

    def to_json(self) -> dict[str, Any]:
        """The receipt as plain JSON values."""
        fingerprint = self.fingerprint if isinstance(self.fingerprint, str) else list(self.fingerprint)
        return {
            "fingerprint": fingerprint,
            "match": self.match,
            "tokens": self.tokens,
            "changed": self.changed,
        }

    def in_words(self) -> str:
        """How many sites edited how many tokens, of which plan."""
        plans = (
            self.fingerprint
            if isinstance(self.fingerprint, str)
            else ", ".join("none" if plan is None else plan[:8] for plan in self.fingerprint)
        )
        tokens = sorted(set(self.tokens.values()))
        each = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}" if tokens else "no"
        sites = len(self.tokens)
        where = f"{count_of(sites, 'site')} ({cut(', '.join(self.tokens))})"
        return f"{each} {'token' if tokens == [1] else 'tokens'} at {where}, plan {cut(plans)}"

    def as_tables(self) -> list[Table]:
        """Tokens by site, and those whose experts changed."""
        changed = self.changed
        header = ("site", "tokens", *(["changed"] if changed is not None else []))
        rows = [
            (site, count, *([changed[site]] if changed is not None else []))
            for site, count in self.tokens.items()
        ]
        return [(header, rows)]
