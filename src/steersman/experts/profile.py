"""What experts are for, as far as text shows it: how often each is used, by which tokens, and in which
contexts most.

Of a token that occurs `seen` times and uses an expert `uses` times, the rate is uses / seen, and `low` the
lower end of its 95% Wilson interval: few occurrences give a low one, so that tokens can be ranked by it
without a threshold that hides rare ones. Kept are those whose `low` is above the expert's base rate (its
share of all tokens); `lift` is their rate over the base rate. Occurrences are not independent, so this ranks
and does not test; and use is not cause: what an expert does shows in steering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steersman.chat_record import ChatRecord
from steersman.errors import PlanError
from steersman.experts.estimate import Floats
from steersman.experts.moments import Integers
from steersman.limits import Router
from steersman.showing import Shown, Table, count_of, cut, first_rows, ranges
from steersman.steering import Architecture

if TYPE_CHECKING:
    import pandas

Z = 1.959963984540054
"""Normal quantile of a two-sided 95% interval."""


@dataclass(frozen=True)
class TokenUse:
    """A token that uses an expert more than tokens do on the whole."""

    token: str
    uses: int
    seen: int
    rate: float
    low: float
    lift: float


@dataclass(frozen=True)
class Context:
    """A place where an expert's mixture weight is large: what stands before the token, it, and after it."""

    before: str
    token: str
    after: str
    weight: float

    @property
    def marked(self) -> str:
        """The context on one line, its token in brackets."""
        return " ".join(f"{self.before}⟦{self.token}⟧{self.after}".split())


@dataclass(frozen=True)
class ExpertUse:
    """One expert: its base rate, the tokens and the contexts that use it most."""

    layer: int
    expert: int
    uses: int
    rate: float
    tokens: tuple[TokenUse, ...]
    contexts: tuple[Context, ...]

    def to_json(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "layer": self.layer,
            "expert": self.expert,
            "uses": self.uses,
            "rate": self.rate,
            "tokens": [vars(token) for token in self.tokens],
            "contexts": [vars(context) for context in self.contexts],
        }


@dataclass(frozen=True, eq=False, repr=False)
class ExpertProfile(Shown):
    """What each expert of a model was used for in some text.

    Arrays are [layers, experts, …], their rows the layers with a router that can be steered, as in a
    `RoutingContrast`; missing experts have -1 uses, missing tokens and contexts the place -1.
    """

    uses: Integers
    """int64 [layers, experts]: tokens that chose the expert."""
    tokens: int
    """Tokens read, special ones aside."""
    texts: int
    token_places: Integers
    """int64 [layers, experts, tokens]: places in `words`, best first; -1 where there are fewer."""
    token_uses: Integers
    words: tuple[str, ...]
    """Texts of the tokens that are named."""
    word_seen: Integers
    """int64 [words]: how often each occurs."""
    context_places: Integers
    """int64 [layers, experts, contexts]: places in `snippets`, largest weight first; -1 for none."""
    context_weights: Floats
    """float64 [layers, experts, contexts]; 0 where there is none."""
    snippets: tuple[tuple[str, str, str], ...]
    """(before, token, after)."""
    architecture: Architecture
    weights_id: str
    model: str = ""
    revision: str | None = None
    made_from: tuple[Mapping[str, Any], ...] = field(default=())
    chat: ChatRecord | None = None
    """How its chats were rendered; None where there were none."""

    @property
    def routers(self) -> tuple[Router, ...]:
        """The routers that were read, by layer."""
        return tuple(router for router in self.architecture.routers if router.steerable)

    @property
    def layers(self) -> list[int]:
        """True layer index of each row."""
        return [router.layer for router in self.routers]

    @cached_property
    def rates(self) -> Floats:
        """Base rates, float64 [layers, experts]; NaN where a layer has fewer experts."""
        return np.where(self.uses < 0, np.nan, self.uses / self.tokens)

    def expert(self, layer: int, expert: int) -> ExpertUse:
        """One expert. Raises `PlanError` where there is none."""
        router = self.architecture.router(layer)
        if not 0 <= expert < router.experts:
            raise PlanError(
                f"layer {layer} has no expert {expert}: its experts are 0 to {router.experts - 1}"
            )
        row = self.layers.index(layer)
        base = float(self.rates[row, expert])
        return ExpertUse(
            layer=layer,
            expert=expert,
            uses=int(self.uses[row, expert]),
            rate=base,
            tokens=tuple(
                self._token(int(place), int(uses), base)
                for place, uses in zip(
                    self.token_places[row, expert], self.token_uses[row, expert], strict=True
                )
                if place >= 0
            ),
            contexts=tuple(
                self._context(int(place), float(weight))
                for place, weight in zip(
                    self.context_places[row, expert], self.context_weights[row, expert], strict=True
                )
                if place >= 0
            ),
        )

    def _token(self, place: int, uses: int, base: float) -> TokenUse:
        seen = int(self.word_seen[place])
        low = float(wilson_low(np.array(uses), np.array(seen)))
        return TokenUse(self.words[place], uses, seen, uses / seen, low, uses / seen / base)

    def _context(self, place: int, weight: float) -> Context:
        before, token, after = self.snippets[place]
        return Context(before, token, after, weight)

    def experts(self, layer: int | None = None, expert: int | None = None) -> list[ExpertUse]:
        """All experts, or those of one layer, or with one number. Raises `PlanError` where there is none."""
        numbers = {router.layer: router.experts for router in self.routers}
        layers = list(numbers) if layer is None else [self.architecture.router(layer).layer]
        most = max(numbers[each] for each in layers)
        if expert is not None and expert >= most:
            raise PlanError(f"there is no expert {expert} there: experts are 0 to {most - 1}")
        return [
            self.expert(each, number)
            for each in layers
            for number in range(numbers[each])
            if expert in (None, number)
        ]

    def table(self) -> pandas.DataFrame:
        """One row a token that an expert is used by: layer, expert, base rate, token, uses, seen, rate, low,
        lift.
        """
        import pandas

        rows = [
            {"layer": use.layer, "expert": use.expert, "base_rate": use.rate, **vars(token)}
            for use in self.experts()
            for token in use.tokens
        ]
        columns = ["layer", "expert", "base_rate", "token", "uses", "seen", "rate", "low", "lift"]
        return pandas.DataFrame(rows, columns=columns)

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the profile as a folder (manifest.json, tensors.safetensors), atomically."""
        from steersman.artifacts import save_profile

        save_profile(self, folder, force=force)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> ExpertProfile:
        """Read a profile from a folder or the Hub.

        Raises `ArtifactError` for anything damaged, foreign or newer.
        """
        from steersman.artifacts import load_profile

        return load_profile(source, revision=revision)

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **options: Any) -> str:
        """Upload the profile to the Hugging Face Hub with a model card; returns the commit's address.

        `license` is asked for, as the Hub names it ("apache-2.0"); options are `base_model`, `private`,
        `revision`, `token`, and those of `HfApi.upload_folder`. Raises `ArtifactError` where it fails.
        """
        from steersman.artifacts import push_folder

        return push_folder(self.save_pretrained, repo_id, license=license, **options)

    def in_words(self) -> str:
        """What was read, of which model."""
        tokens, texts = count_of(self.tokens, "token"), count_of(self.texts, "text")
        read = f"{tokens} of {texts}; layers {ranges(self.layers)}"
        return f"{read}; of {cut(self.model or 'a model', 100)}"

    def as_tables(self) -> list[Table]:
        """The tokens that stand out most."""
        return [first_rows(self.table().sort_values("lift", ascending=False, kind="stable"))]


def wilson_low(uses: np.ndarray[Any, Any], seen: np.ndarray[Any, Any]) -> Floats:
    """Lower end of the 95% Wilson interval of uses / seen (Wilson 1927); 0 where there are no uses."""
    n = np.maximum(seen, 1).astype(np.float64)
    p = uses / n
    centre = p + Z**2 / (2 * n)
    reach = Z * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return np.asarray(np.where(uses > 0, (centre - reach) / (1 + Z**2 / n), 0.0))
