"""What screening found: the effect of each expert when it alone is steered, and sets of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from steersman.certainty import CANNOT_TELL, NOT_SHOWN, SHOWN, Verdict
from steersman.chat_record import ChatRecord, in_provenance
from steersman.edits import ExpertEdit, Scope, finite_number
from steersman.errors import PlanError
from steersman.experts.causal_effects import (
    DIRECTIONS,
    SIGNS,
    Bools,
    ChosenSet,
    Direction,
    Effects,
    Gate,
    Sign,
)
from steersman.experts.estimate import Floats
from steersman.experts.selection import Choice, asked_sizes, choose
from steersman.limits import Router
from steersman.showing import Shown, Table, count_of, cut, first_rows, ranges
from steersman.steering import Architecture, Steering, sha256_of
from steersman.ties import MEASURED, ranks

if TYPE_CHECKING:
    import pandas


POWER = 0.8
"""The chance with which an effect that is called detectable is found."""


@dataclass(frozen=True, eq=False, repr=False)
class CausalScreen(Shown):
    """Effects of single experts on d = log p(positive answer) − log p(negative answer), and the sets chosen.

    Rows of arrays are the layers that have a steerable router (`layers`, true indices).
    """

    effects: Effects
    exact: Bools
    """[2, layers, experts]: measured by a run of its own; else estimated to first order."""
    gate: Gate
    sets: Mapping[Direction, ChosenSet]
    items: int
    """How many were screened by; the sets were chosen by `choosing_items` others."""
    clusters: int
    choosing_items: int
    method: str
    scope: Scope
    architecture: Architecture
    weights_id: str
    model: str = ""
    revision: str | None = None
    made_from: tuple[Mapping[str, Any], ...] = field(default=())
    chat: ChatRecord | None = None
    """How its chats were rendered; None where there were none."""
    subsets: Effects | None = None
    """Of randomised subsets: each expert's average effect while random others are steered too."""
    risk_difference: Floats | None = None
    """Of a contrast of the same model, [layers, experts]; NaN where a layer has fewer."""
    harm: tuple[Mapping[str, Any], ...] = field(default=())
    """What the sets change elsewhere, task by task, with intervals."""
    notes: tuple[str, ...] = field(default=())
    """What did not go as asked, such as experts that can only be screened by exact runs."""

    @property
    def routers(self) -> tuple[Router, ...]:
        """The routers that were screened, by layer."""
        return tuple(router for router in self.architecture.routers if router.steerable)

    @property
    def layers(self) -> list[int]:
        """True layer index of each row."""
        return [router.layer for router in self.routers]

    @property
    def deactivate(self) -> Effects:
        """The effects of keeping an expert out, arrays [layers, experts]."""
        return self.effects.of("deactivate")

    @property
    def activate(self) -> Effects:
        """The effects of putting an expert in, arrays [layers, experts]."""
        return self.effects.of("activate")

    @property
    def signs(self) -> tuple[Sign, ...]:
        """Which were screened."""
        return tuple(sign for row, sign in enumerate(SIGNS) if self.effects.measured[row].any())

    @cached_property
    def passing(self) -> Bools:
        """Which effects pass the gate, those of subsets included, bool [2, layers, experts]."""
        passing = self.effects.passing(self.gate)
        return passing if self.subsets is None else passing | self.subsets.passing(self.gate)

    @property
    def found(self) -> bool:
        """Whether any expert was found that causes the behaviour."""
        return bool(self.passing.any())

    @property
    def reason(self) -> str:
        """What was found, or why nothing was, in words."""
        measured = self.effects.measured
        tested = int(measured.any(axis=0).sum())
        words = f"q < {self.gate.q:g} and an effect of {self.gate.effect:g} nats or more"
        if self.found:
            return (
                f"{count_of(int(self.passing.sum()), 'effect')} of {tested} experts passed the gate: {words}"
            )
        largest = float(np.abs(self.effects.mean[measured]).max()) if measured.any() else 0.0
        significant = int((self.effects.q_values[measured] < self.gate.q).sum())
        none, untold = ((self.verdicts == verdict).sum() for verdict in (NOT_SHOWN, CANNOT_TELL))
        read = f"{count_of(self.items, 'item')} in {count_of(self.clusters, 'group')}"
        return (
            f"no effect of {tested} experts passes the gate ({words}): the largest is {largest:.3f} nats, "
            f"{significant} are significant but too small; of {none} experts none is shown (intervals inside "
            f"±{self.gate.effect:g} nats), of {untold} nobody can tell. Verdict: {self.verdict}; {read} show "
            f"an effect from {self.detectable:.2f} nats on, with a chance of {POWER:.0%}"
        )

    @property
    def verdict(self) -> Verdict:
        """What may be said of the model: "shown" where an expert passes, "not shown" where none of any expert
        is shown, else "cannot tell".
        """
        if self.found:
            return SHOWN
        told = self.verdicts[self.effects.measured.any(axis=0)]
        return NOT_SHOWN if len(told) and (told == NOT_SHOWN).all() else CANNOT_TELL

    @property
    def detectable(self) -> float:
        """The smallest effect in nats that these items show with a chance of `POWER`, if it is the only one:
        (t_{1 − α/2} + t_{POWER}) standard errors, the median's over all that was measured, with α = q / tests
        (Benjamini-Hochberg's bound for the smallest p); the gate's size at least.
        """
        measured = self.effects.measured
        if not measured.any() or self.clusters < 2:
            return math.inf
        freedom = self.clusters - 1
        alpha = self.gate.q / int(measured.sum())
        reach = float(stats.t.ppf(1 - alpha / 2, freedom) + stats.t.ppf(POWER, freedom))
        return max(self.gate.effect, reach * float(np.median(self.effects.standard_error[measured])))

    @cached_property
    def verdicts(self) -> npt.NDArray[np.object_]:
        """What may be said of each expert, [layers, experts]: "shown" where an effect of it passes the gate,
        "not shown" where the 95% intervals of all lie inside ± the gate's size, else "cannot tell"; None
        where nothing was measured. Effects are means over items, their intervals t over clusters.
        """
        measured = self.effects.measured
        half = stats.t.ppf(0.975, max(self.clusters - 1, 1)) * self.effects.standard_error
        with np.errstate(invalid="ignore"):
            inside = np.abs(self.effects.mean) + half <= self.gate.effect
        found = np.full(measured.shape[1:], None, dtype=object)
        found[measured.any(axis=0)] = CANNOT_TELL
        found[measured.any(axis=0) & (inside | ~measured).all(axis=0)] = NOT_SHOWN
        found[self.passing.any(axis=0)] = SHOWN
        return found

    @cached_property
    def sha256(self) -> str:
        """Of what was found: effects, sets and what they were made from."""
        parts = [
            # What was not measured is nan, which JSON does not know; `measured` says which.
            [np.nan_to_num(v).tolist() for v in (e.mean, e.standard_error, e.p_values, e.measured)]
            for e in (self.effects, self.subsets)
            if e is not None
        ]
        sets = {direction: chosen.to_json() for direction, chosen in self.sets.items()}
        return sha256_of([self.weights_id, parts, sets, [dict(source) for source in self.made_from]])

    def ranking(self, *, reverse: bool = False, significant: bool = False) -> list[tuple[int, int, float]]:
        """(layer, expert, score) of the effects that pass the gate and go the way asked for, largest first; a
        negative score is for deactivation. With `significant` also those that are sure, but too small.
        """
        among = self.passing
        if significant:
            with np.errstate(invalid="ignore"):
                among = among | (self.effects.measured & (self.effects.q_values < self.gate.q))
        return self._ranked(among, reverse)

    def _ranked(self, among: Bools, reverse: bool) -> list[tuple[int, int, float]]:
        """Of the effects `among` those that go the way asked for, each expert's larger one."""
        toward = -self.effects.mean if reverse else self.effects.mean
        if self.subsets is not None:
            other = -self.subsets.mean if reverse else self.subsets.mean
            toward = np.where(
                self.subsets.passing(self.gate) & (np.abs(other) > np.abs(toward)), other, toward
            )
        found: dict[tuple[int, int], float] = {}
        for sign, row, expert in np.argwhere(among & (toward > 0)):
            score = float(toward[sign, row, expert]) * (1 if SIGNS[sign] == "activate" else -1)
            place = (self.layers[row], int(expert))
            if abs(score) > (1 + MEASURED) * abs(found.get(place, 0.0)):
                found[place] = score
        entries = [(layer, expert, score) for (layer, expert), score in found.items()]
        entries.sort()
        return [entries[n] for n in np.argsort(ranks([abs(score) for *_, score in entries]), kind="stable")]

    def order(self, *, reverse: bool = False) -> list[tuple[int, int, float]]:
        """(layer, expert, score) of all experts in the order in which sets of growing size take them: those
        of the chosen set as they were chosen, then by the size of their effect, whether it passes or not.
        """
        chosen = self.sets.get(DIRECTIONS[int(reverse)])
        picks = [(pick.layer, pick.expert, pick.strength) for pick in chosen.picks] if chosen else []
        held = {(layer, expert) for layer, expert, _ in picks}
        rest = self._ranked(self.effects.measured, reverse)
        return picks + [entry for entry in rest if entry[:2] not in held]

    def select(
        self,
        *,
        activate: int | None = None,
        deactivate: int | None = None,
        top: int | None = None,
        reverse: bool = False,
        scope: Scope | None = None,
        strength: float = 1.0,
    ) -> Steering:
        """A steering toward the positive side: the set that was chosen, or so many single experts by effect.

        Args:
            activate: How many to activate, of those that pass the gate, largest effect first.
            deactivate: How many to deactivate, likewise.
            top: How many of either; instead of the other two. Without any of the three: the chosen set.
            reverse: Steer toward the negative side.
            scope: Which tokens to steer; None: those that were screened.
            strength: 0 to 1, the size of every λ.

        Raises:
            PlanError: nothing was found to cause the behaviour, or less than asked for. What breaks a
                router's limit is skipped and listed in the steering's `provenance["skipped"]`.
        """
        if not 0 <= finite_number(strength) <= 1:
            raise PlanError(
                f"strength {strength:g} must lie between 0 and 1; use reverse for the other direction"
            )
        if not self.found:
            raise PlanError(f"the screen found nothing to steer: {self.reason}")
        numbers = asked_sizes(activate=activate, deactivate=deactivate, top=top)
        asked = {name: number for name, number in numbers.items() if number is not None}
        choice = self._choose(asked, strength, reverse) if asked else self._chosen_set(reverse)
        strengths = {
            layer: {expert: sign * strength for expert, sign in experts.items()}
            for layer, experts in choice.signs.items()
        }
        return Steering(
            edits=(ExpertEdit(strengths, scope or self.scope),),
            architecture=self.architecture,
            weights_id=self.weights_id,
            model=self.model,
            revision=self.revision,
            provenance={
                "made": "selection",
                "by": "causal",
                "reverse": bool(reverse),
                **asked,
                "skipped": list(choice.skipped),
                **in_provenance(self.chat),
                "from": [{"kind": "causal_screen", "sha256": self.sha256}, *map(dict, self.made_from)],
            },
        )

    def _chosen_set(self, reverse: bool) -> Choice:
        direction = DIRECTIONS[int(reverse)]
        chosen = self.sets.get(direction)
        if chosen is None:
            raise PlanError(
                "no sets were chosen in this screen: say how many experts (top, activate, deactivate)"
            )
        if not chosen.picks:
            single = len(self.ranking(reverse=reverse))
            way_out = "; screen again with a lower least_t (--least-t)"
            if single:
                way_out += f", or take single experts: up to {single} pass the gate (top, --top)"
            raise PlanError(f"the screen chose no expert {direction}: {chosen.reason}{way_out}")
        return Choice(chosen.strengths, ())

    def _choose(self, asked: Mapping[str, int], strength: float, reverse: bool) -> Choice:
        ranking = self.ranking(reverse=reverse)
        there = {
            "top": len(ranking),
            "activate": sum(score > 0 for *_, score in ranking),
            "deactivate": sum(score < 0 for *_, score in ranking),
        }
        for name, number in asked.items():
            if number > there[name]:
                raise PlanError(
                    f"{name} asks for {count_of(number, 'expert')}, but {there[name]} pass the gate in "
                    "this direction: filling up with others does harm and no good"
                )
        routers = {router.layer: router for router in self.routers}
        return choose(ranking, routers, strength=strength or 1.0, **asked)

    def agreement(self) -> dict[str, float] | None:
        """Spearman correlation of the risk difference with the effect of activating, and with minus that of
        deactivating; None without a contrast.
        """
        if self.risk_difference is None:
            return None
        found: dict[str, float] = {}
        for row, (sign, factor) in enumerate((("deactivate", -1), ("activate", 1))):
            usable = self.effects.measured[row] & ~np.isnan(self.risk_difference)
            if usable.sum() > 2:
                pair = factor * self.effects.mean[row][usable], self.risk_difference[usable]
                value = float(stats.spearmanr(*pair).statistic) if all(np.ptp(v) for v in pair) else 0.0
                found[sign] = value
        return found

    def table(self) -> pandas.DataFrame:
        """One row an expert, largest effect first: its effects, whether one passes, its place in the chosen
        sets (from 1; 0 where it is in none), and where it stands by risk difference.
        """
        import pandas

        measured = self.effects.measured
        rows, experts = np.nonzero(measured.any(axis=0))
        columns: dict[str, Any] = {"layer": np.array(self.layers)[rows], "expert": experts}
        for number, sign in enumerate(SIGNS):
            columns |= self._columns(sign, number, rows, experts)
        size = np.where(measured, np.abs(self.effects.mean), -np.inf).max(axis=0)[rows, experts]
        columns["passes"] = np.asarray(self.passing.any(axis=0))[rows, experts]
        columns["verdict"] = self.verdicts[rows, experts].astype(str)
        for direction, chosen in self.sets.items():
            place = {(pick.layer, pick.expert): n for n, pick in enumerate(chosen.picks, 1)}
            pairs = zip(columns["layer"].tolist(), experts.tolist(), strict=True)
            columns[direction] = [place.get(pair, 0) for pair in pairs]
        columns["causal_rank"] = _ranks(size, columns["layer"], experts)
        if self.risk_difference is not None:
            delta = self.risk_difference[rows, experts]
            columns["risk_difference"] = delta
            columns["observational_rank"] = _ranks(np.abs(delta), columns["layer"], experts)
        return pandas.DataFrame(columns).sort_values("causal_rank").reset_index(drop=True)

    def _columns(self, sign: str, number: int, rows: Any, experts: Any) -> dict[str, Any]:
        there = self.effects.measured[number][rows, experts]

        def of(values: Any) -> Any:
            return np.where(there, values[number][rows, experts], np.nan)

        columns = {
            f"{sign}_effect": of(self.effects.mean),
            f"{sign}_standard_error": of(self.effects.standard_error),
            f"{sign}_p": of(self.effects.p_values),
            f"{sign}_q": of(self.effects.q_values),
            f"{sign}_exact": self.exact[number][rows, experts],
        }
        if self.subsets is not None:
            columns |= {
                f"{sign}_in_subsets": of(self.subsets.mean),
                f"{sign}_in_subsets_q": of(self.subsets.q_values),
            }
        return columns

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the screen as a folder (manifest.json, tensors.safetensors), atomically."""
        from steersman.artifacts import save_screen

        save_screen(self, folder, force=force)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> CausalScreen:
        """Read a screen from a folder or the Hub.

        Raises `ArtifactError` for anything damaged, foreign or newer.
        """
        from steersman.artifacts import load_screen

        return load_screen(source, revision=revision)

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **options: Any) -> str:
        """Upload the screen to the Hugging Face Hub with a model card; returns the commit's address.

        `license` is asked for, as the Hub names it ("apache-2.0"); options are `base_model`, `private`,
        `revision`, `token`, and those of `HfApi.upload_folder`. Raises `ArtifactError` where it fails.
        """
        from steersman.artifacts import push_folder

        return push_folder(self.save_pretrained, repo_id, license=license, **options)

    def in_words(self) -> str:
        """What was screened, and how many experts pass."""
        passed = count_of(int(self.passing.any(axis=0).sum()), "expert")
        read = f"{count_of(self.items, 'item')} in {count_of(self.clusters, 'group')}"
        return (
            f"{read}; layers {ranges(self.layers)}; {passed} passed the gate; of "
            f"{cut(self.model or 'a model', 100)}"
        )

    def as_tables(self) -> list[Table]:
        """The experts with the largest effects."""
        return [first_rows(self.table())]


def _ranks(size: Floats, layers: Any, experts: Any) -> npt.NDArray[np.int64]:
    """Places from 1, largest first, ties by layer and expert."""
    order = np.lexsort((experts, layers, ranks(size)))
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(1, len(order) + 1)
    return places
