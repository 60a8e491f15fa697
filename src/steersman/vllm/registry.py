"""The front end's register of steerings: names, the slots they are in, and which requests follow them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steersman.edits import ROLES, SCOPES, ExpertEdit
from steersman.errors import PlanError, RequestError, ServingError
from steersman.steering import Steering, compose, sha256_of
from steersman.vllm.dtypes import Dtypes
from steersman.vllm.plan_rows import why_beyond
from steersman.vllm.request import Wanted, parse_request
from steersman.vllm.settings import KEY, Settings, check_name

ASKED = "steering"
"""The key under which a request names its steering."""
COMBINATIONS = 1024
"""Combinations of steerings and strengths that are remembered."""
ABANDONED = 600.0
"""Seconds after which a request that was accepted and never came to the engine is given up."""


@dataclass(frozen=True)
class Registered:
    """One steering that requests can name."""

    name: str
    slot: int
    steering: Steering
    source: str


@dataclass(frozen=True)
class Resolved:
    """What a request is given: its slots and strengths, and what its tokens are known by.

    Attributes:
        wanted: What it asked for.
        slots: (slot, strength), in order.
        keys: Of each role, what identifies the edits that hold for its tokens; empty where there are none.
        fingerprint: Of all of it as one plan: the same as of the plans composed by hand.
        fingerprints: {name: fingerprint of that steering at strength 1}.
        roles: {(point, layer): the roles whose tokens are edited there}.
    """

    wanted: tuple[Wanted, ...]
    slots: tuple[tuple[int, float], ...]
    keys: tuple[str, ...]
    fingerprint: str
    fingerprints: Mapping[str, str]
    roles: Mapping[tuple[str, int], frozenset[str]]


@dataclass
class Lease:
    """A request that was accepted, and the answers of it that run."""

    resolved: Resolved
    since: float
    answers: int = 1
    """Answers that are still to come to the engine."""
    requests: set[str] = field(default_factory=set)
    held: bool = False
    """Whether it lasts until it is released, whatever runs."""


class Registry:
    """Names → plans in slots, safe to use from several threads.

    Args:
        settings: The operator's.
        check: Raises where a plan is not for the served model.
        dtypes: Those of the engine and of its model's checkpoint; None before there is an engine.
    """

    def __init__(
        self, settings: Settings, check: Callable[[Steering], None], dtypes: Dtypes | None = None
    ) -> None:
        self.settings = settings
        self.dtypes = dtypes
        self._check = check
        self._lock = threading.RLock()
        self._by_name: dict[str, Registered] = {}
        self._known: dict[tuple[Wanted, ...], Resolved] = {}
        self._leases: dict[int, Lease] = {}
        self._lease_of: dict[str, int] = {}
        self._last_lease = 0
        self._reserved: set[int] = set()
        self._last_slot = -1

    # ------------------------------------------------------------ plans

    def names(self) -> list[Registered]:
        """What can be asked for, in order of registration."""
        with self._lock:
            return list(self._by_name.values())

    def reserve(self, steering: Steering) -> int:
        """A slot for a plan that is about to be written: no request follows what is in it.

        Raises:
            ServingError, ArchitectureMismatch, WeightsMismatch: there is none, or the plan is for another
                model.
        """
        self._check(steering)
        if why := self._why_beyond(steering):
            raise ServingError(why)
        with self._lock:
            self._forget_abandoned()
            used = {registered.slot for registered in self._by_name.values()} | self._reserved
            used.update(slot for lease in self._leases.values() for slot, _ in lease.resolved.slots)
            room = self.settings.max_steerings
            # In turn: what has just become free is written last, when no step in flight can look there.
            turn = ((self._last_slot + 1 + step) % room for step in range(room))
            free = next((slot for slot in turn if slot not in used), None)
            if free is None:
                raise ServingError(
                    f"all {self.settings.max_steerings} places for steerings are in use (those that running "
                    "requests follow included): remove one, wait, or start with a larger max_steerings"
                )
            self._reserved.add(free)
            self._last_slot = free
            return free

    def _forget_abandoned(self) -> None:
        now = time.monotonic()
        for number, lease in list(self._leases.items()):
            if not lease.held and not lease.requests and now - lease.since > ABANDONED:
                del self._leases[number]

    def publish(self, name: str, slot: int, steering: Steering, source: str) -> None:
        """Let requests follow the plan that has been written into a reserved slot, under a name, at once."""
        with self._lock:
            self._reserved.discard(slot)
            self._by_name[check_name(name)] = Registered(name, slot, steering, source)
            self._known.clear()

    def give_up(self, slot: int) -> None:
        """A reserved slot is not used after all."""
        with self._lock:
            self._reserved.discard(slot)

    def remove(self, name: str) -> None:
        """Requests cannot name a steering any more; those that follow it go on to their end.

        Raises:
            RequestError: there is none of this name.
            ServingError: the default or an alias needs it.
        """
        with self._lock:
            if name not in self._by_name:
                raise RequestError(self._unknown(name))
            needed = {"the default": self.settings.default, **self.settings.aliases}
            for where, given in needed.items():
                if given and any(one.name == name for one in parse_request(given, 1 << 30)):
                    raise ServingError(f"{where} is {given!r}: {name!r} cannot be removed, only replaced")
            del self._by_name[name]
            self._known.clear()

    # ------------------------------------------------------------ requests

    def resolve(self, given: object) -> Resolved | None:
        """What a request gets that asks for `given`; None: the model as it is.

        Raises:
            RequestError: it cannot have that, with the reason.
        """
        wanted = parse_request(given, self.settings.max_per_request)
        with self._lock:
            known = self._known.get(wanted)
            if known is None and wanted:
                known = self._resolve(wanted)
                if len(self._known) >= COMBINATIONS:
                    self._known.clear()
                self._known[wanted] = known
            return known

    def _resolve(self, wanted: tuple[Wanted, ...]) -> Resolved:
        least, most = self.settings.strengths
        plans, slots, fingerprints = [], [], {}
        for one in wanted:
            registered = self._by_name.get(one.name)
            if registered is None:
                raise RequestError(self._unknown(one.name))
            if not least <= one.strength <= most:
                raise RequestError(
                    f'steering: strength {one.strength:g} for "{one.name}" is out of bounds: this server '
                    f"takes {least:g} to {most:g}"
                )
            try:
                plans.append(registered.steering if one.strength == 1 else registered.steering * one.strength)
            except PlanError as error:
                raise RequestError(f'steering: "{one}": {error}') from None
            slots.append((registered.slot, one.strength))
            fingerprints[one.name] = registered.steering.fingerprint
        try:
            steering = compose(*plans) if len(plans) > 1 else plans[0]
        except PlanError as error:
            raise RequestError(f"steering: these cannot be had together: {error}") from None
        if why := self._why_beyond(steering):
            raise RequestError(f"steering: {why}")
        return Resolved(
            wanted, tuple(slots), keys_of(steering), steering.fingerprint, fingerprints, _roles_of(steering)
        )

    def _why_beyond(self, steering: Steering) -> str | None:
        served = None if self.dtypes is None else getattr(torch, self.dtypes.served)
        return why_beyond(steering, served) if served is torch.float16 else None

    def _unknown(self, name: str) -> str:
        known = ", ".join(self._by_name) or "none"
        return f'steering: there is no "{name}" (there are: {known})'

    # ------------------------------------------------------------ who follows what

    def accept(self, resolved: Resolved, answers: int = 1) -> dict[str, Any]:
        """What the engine is told of a request for so many answers; its plans' slots are held from now on."""
        with self._lock:
            if self._known.get(resolved.wanted) is not resolved and not self._is_followed(resolved):
                resolved = self._resolve(resolved.wanted)  # a plan of it was replaced this very moment
            self._last_lease += 1
            if self._last_lease % COMBINATIONS == 0:
                self._forget_abandoned()
            self._leases[self._last_lease] = Lease(resolved, time.monotonic(), answers)
            return {
                "slots": [list(one) for one in resolved.slots],
                "plans": [resolved.fingerprints[one.name] for one in resolved.wanted],
                "keys": list(resolved.keys),
                "lease": self._last_lease,
            }

    def _is_followed(self, resolved: Resolved) -> bool:
        return any(lease.resolved is resolved for lease in self._leases.values())

    @contextmanager
    def following(self, given: object) -> Iterator[Resolved | None]:
        """What a call gets that asks for `given`: one plan for all that it generates, held until its end.

        Raises:
            RequestError: it cannot have that, with the reason.
        """
        with self._lock:
            resolved = None if given is None else self.resolve(given)
            if resolved is not None:
                self._last_lease += 1
                number = self._last_lease
                self._leases[number] = Lease(resolved, time.monotonic(), held=True)
        try:
            yield resolved
        finally:
            if resolved is not None:
                with self._lock:
                    self._leases.pop(number, None)

    def abandon(self, told: Mapping[str, Any]) -> None:
        """A request that was accepted does not come to the engine after all."""
        with self._lock:
            self._leases.pop(told["lease"], None)

    def enter(self, request_id: str, told: Mapping[str, Any]) -> Resolved:
        """A request that was accepted has come to the engine (each of several answers is one)."""
        with self._lock:
            lease = self._leases.get(told["lease"])
            if lease is None:
                raise RequestError(
                    "steering: the request came to the engine after it was given up; send it again"
                )
            lease.requests.add(request_id)
            lease.answers -= 1
            self._lease_of[request_id] = told["lease"]
            return lease.resolved

    def leave(self, request_ids: Iterable[str]) -> None:
        """Requests have ended, however."""
        with self._lock:
            for request_id in request_ids:
                number = self._lease_of.pop(request_id, None)
                lease = self._leases.get(number) if number is not None else None
                if lease is not None and number is not None:
                    lease.requests.discard(request_id)
                    if not lease.requests and lease.answers <= 0:
                        del self._leases[number]

    @property
    def followers(self) -> int:
        """Requests that hold a plan in its place now."""
        with self._lock:
            return len(self._leases)

    def with_default(self, default: str | None) -> None:
        """Change what requests get that ask for nothing. Raises `RequestError` where it cannot be had."""
        if default is not None:
            self.resolve(default)
        with self._lock:
            self.settings = replace(self.settings, default=default)


def keys_of(steering: Steering) -> tuple[str, ...]:
    """Of each role, what identifies the edits that hold for its tokens: sha256 of architecture and edits."""
    keys = []
    for role in ROLES:
        held = [edit.canonical() for edit in steering.edits if role in SCOPES[edit.scope]]
        keys.append(sha256_of({KEY: steering.architecture_id, "edits": held}) if held else "")
    return tuple(keys)


def _roles_of(steering: Steering) -> dict[tuple[str, int], frozenset[str]]:
    roles: dict[tuple[str, int], frozenset[str]] = {}
    for edit in steering.edits:
        for layer in edit.layers:
            acts = any(edit.strengths[layer].values()) if isinstance(edit, ExpertEdit) else edit.strength
            if acts:
                site = (edit.point, layer)
                roles[site] = roles.get(site, frozenset()) | SCOPES[edit.scope]
    return roles
