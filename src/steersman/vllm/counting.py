"""Counting which experts the tokens of texts use, on the device, inside the running engine.

A text that is counted is a request of its own. Each of its target tokens is counted once, whatever the
engine does with it: chunks of a prompt are steps of their own, and positions that were counted before a
preemption are not counted when they are computed anew. What a step counts is laid out before its forward;
the operation after each router's choice adds it up.

| table | shape | holds |
|---|---|---|
| `counts` | int32 [places + 1, routers, experts] | by place of a text; the last is nobody's |
| `owners` | int32 [tokens] | the place of each token of the step, where the device reads it |
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steersman.errors import ServingError, SteeringNotApplied
from steersman.vllm.bank import RouterPlace
from steersman.vllm.settings import KEY

COUNT = "count"
"""Where the engine is told, in what it is told of a request, that it is a text to count."""
LISTENED = 4
"""Tokens that are counted at start-up, to see that they are."""
_PROCESS = uuid.uuid4().hex
_numbers = itertools.count()

Run = tuple[int, int, int]
"""(first position, one past the last, place in the table)"""


@dataclass(frozen=True)
class CountedText:
    """A text to count, which a caller in this process puts into `extra_args["steersman"]` of its request.

    No client can: what comes over HTTP is JSON, which makes no object of this class.

    Attributes:
        runs: Its target tokens, in order: positions of the prompt, and where they are counted.
    """

    runs: tuple[Run, ...]

    def __deepcopy__(self, memo: object) -> CountedText:
        return self  # the engine copies a request's settings more than once

    def told(self) -> dict[str, Any]:
        """What the engine is told: no steering, what to count, and a name that no other text ever has."""
        count = {"text": f"{_PROCESS}:{next(_numbers)}", "runs": [list(run) for run in self.runs]}
        return {"slots": [], "keys": ["", "", ""], COUNT: count}


def counted_key(told: Mapping[str, Any], end: int) -> tuple[str, str] | None:
    """What a block of the prefix cache that ends before position `end` is known by, besides; None: nothing.

    A target token has to be computed, so the block of the first one, and with it every later one, is the
    text's own; what is before it may be found, and shared.
    """
    count = told.get(COUNT)
    if count is None or not count["runs"] or end <= count["runs"][0][0]:
        return None
    return COUNT, count["text"]


class _Text(NamedTuple):
    name: str
    firsts: tuple[int, ...]
    ends: tuple[int, ...]
    places: tuple[int, ...]


class Counter:
    """What one worker counts.

    Args:
        routers: Those of this worker, in the order of their sites.
        places: Rows of the table: texts that can be counted at a time, times the parts of each.
        tokens: Of a step, at most.
        device: Where the model runs.
    """

    def __init__(
        self, routers: Sequence[RouterPlace], places: int, tokens: int, device: torch.device
    ) -> None:
        self.places = places
        self.layers = [router.layer for router in routers]
        self._texts: dict[str, _Text] = {}
        """By request."""
        self._counted: dict[str, int] = {}
        """Of each text, the position up to which it has been counted."""
        self._table = torch.zeros(
            places + 1,
            len(routers),
            max(router.experts for router in routers),
            dtype=torch.int32,
            device=device,
        )
        self._flat = self._table.view(-1)
        self._routers, self._experts = self._table.shape[1:]
        self._owners = torch.full((tokens,), places, dtype=torch.int32, device=device)
        self._on_host = device.type == "cpu"
        self._due: set[int] = set()
        """Where the host counts: the routers that have not run yet in this step."""
        self._tokens = torch.zeros(0, dtype=torch.int64)
        self._starts = torch.zeros(0, 1, dtype=torch.int64)
        self._ones = torch.ones(0, dtype=torch.int32)
        self._busy = False

    # ------------------------------------------------------------ requests

    def add(self, request_id: str, extra_args: Mapping[str, Any] | None) -> None:
        """Take note of a request that the engine has scheduled for the first time (or once more)."""
        count = ((extra_args or {}).get(KEY) or {}).get(COUNT)
        if count is not None:
            firsts, ends, places = zip(*count["runs"], strict=True) if count["runs"] else ((), (), ())
            self._texts[request_id] = _Text(count["text"], firsts, ends, places)

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests that have ended; what was counted of them stays."""
        if self._texts:
            for request_id in request_ids:
                self._texts.pop(request_id, None)

    # ------------------------------------------------------------ steps

    def lay_out(self, request_ids: Sequence[str], scheduled: Sequence[int], computed: Sequence[int]) -> None:
        """Prepare what the next forward counts. The arguments are those of `LiveRequests.spans`."""
        runs: list[Run] = []
        start = 0
        for request_id, tokens, before in zip(request_ids, scheduled, computed, strict=True):
            text = self._texts.get(request_id) if self._texts else None
            if text is not None:
                runs += self._due_of(text, int(before), int(before) + int(tokens), start)
            start += int(tokens)
        self._count_runs(runs)

    def rest(self) -> None:
        """The next forward counts nothing."""
        self._count_runs([])

    def _due_of(self, text: _Text, first: int, end: int, start: int) -> list[Run]:
        """Of positions first … end − 1, which lie from token `start` on, those that are yet to count."""
        known = self._counted.get(text.name, 0)
        self._counted[text.name] = max(known, end)
        low, shift = max(first, known), start - first
        return [
            (max(low, begins) + shift, min(end, ends) + shift, place)
            for begins, ends, place in zip(text.firsts, text.ends, text.places, strict=True)
            if max(low, begins) < min(end, ends)
        ]

    def _count_runs(self, runs: Sequence[Run]) -> None:
        if self._on_host:
            self._due = set(range(self._routers)) if runs else set()
            if runs:
                self._tokens = torch.from_numpy(np.concatenate([np.arange(a, b) for a, b, _ in runs]))
                owners = np.repeat([place for *_, place in runs], [b - a for a, b, _ in runs])
                self._starts = torch.from_numpy(owners * (self._routers * self._experts))[:, None]
        elif runs or self._busy:  # what was laid out last is taken back
            owner = np.full(len(self._owners), self.places, np.int32)
            for first, end, place in runs:
                owner[first:end] = place
            given = torch.from_numpy(owner)
            if self._owners.device.type == "cuda":
                given = given.pin_memory()  # freshly: it is not written again while it is read
            self._owners.copy_(given, non_blocking=True)
        self._busy = bool(runs)

    # ------------------------------------------------------------ what the graph's operation does

    def count(self, ids: Tensor, site: Tensor) -> None:
        """Count the experts that a router has chosen, ids [tokens, k]."""
        if not self._on_host:
            starts = self._owners[: len(ids), None].long() * (self._routers * self._experts)
            keys = starts + site.long() * self._experts + ids.long()
            self._flat.scatter_add_(0, keys.view(-1), torch.ones_like(keys, dtype=torch.int32).view(-1))
            return
        index = int(site)
        if index not in self._due:  # once a step: the engine may run its model on nothing in between
            return
        self._due.discard(index)
        keys = (self._starts + (index * self._experts) + ids[self._tokens]).view(-1)
        if len(self._ones) < len(keys):
            self._ones = torch.ones(len(keys), dtype=torch.int32)
        self._flat.scatter_add_(0, keys, self._ones[: len(keys)])

    def listen(self, forward: Callable[[int], object]) -> None:
        """Count a few tokens at start-up: a graph that was compiled without the operation counts none.

        Args:
            forward: Runs the model on so many tokens, whichever.

        Raises:
            SteeringNotApplied: a router's choices are not counted.
        """
        self._count_runs([(0, LISTENED, 0)])
        forward(LISTENED)
        self.rest()
        counts = self._table[0].sum(dim=-1).tolist()
        self._table.zero_()
        silent = [self.layers[row] for row, count in enumerate(counts) if not count or count % LISTENED]
        if silent:
            raise SteeringNotApplied(
                f"the model that the engine runs does not count the experts of layers {silent}: clear the "
                "engine's compile cache (VLLM_CACHE_ROOT, VLLM_DISABLE_COMPILE_CACHE=1) and start again"
            )

    # ------------------------------------------------------------ results

    def take(self, places: int) -> bytes:
        """The counts in the first places, int32 [places, routers, experts], which are 0 again then.

        What has not ended is counted no further.

        Raises:
            ServingError: there are not so many places.
        """
        if not 0 <= places <= self.places:
            raise ServingError(f"there are {self.places} places for counts, not {places}")
        self._texts.clear()
        self.rest()
        taken = self._table[:places].cpu().numpy().tobytes()
        self._table.zero_()
        self._counted.clear()
        return taken


def merged(
    answers: Iterable[Mapping[str, Any]], layers: Sequence[int], places: int, experts: int
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Counts of all workers, int32 [places, layers, experts].

    Ranks that share a layer's tokens have seen the same choices, and one of them answers for all; ranks with
    layers of their own are put side by side; ranks with requests of their own are added up.

    Args:
        answers: What workers say to `steersman_counts`.
        layers: All layers that are to be there.
        places: How many were asked for.
        experts: The most that a router has.

    Raises:
        ServingError: a layer is missing.
    """
    total = np.zeros((places, len(layers), experts), np.int32)
    row = {layer: index for index, layer in enumerate(layers)}
    seen: set[int] = set()
    for answer in answers:
        here = [row[layer] for layer in answer["layers"] if layer in row]
        if not answer["counts"] or not here:
            continue
        counts = np.frombuffer(answer["counts"], np.int32).reshape(places, len(answer["layers"]), -1)
        kept = [index for index, layer in enumerate(answer["layers"]) if layer in row]
        total[:, here, : counts.shape[2]] += counts[:, kept]
        seen.update(answer["layers"])
    if missing := sorted(set(layers) - seen):
        raise ServingError(f"the engine does not count the experts of layers {missing}")
    return total
