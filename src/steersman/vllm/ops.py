"""The operations that stand in the engine's graph, one at each site: opaque to compilation, safe to capture.

Each is given the number of its site as a tensor, so that layers alike compile to the same code, and finds
the bank of its engine in the engine's forward context. What they do changes by what is written into the
bank's tables between two forwards; their code does not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import Library
from vllm.forward_context import get_forward_context

from steersman.errors import SteeringNotApplied
from steersman.vllm.worker_state import WorkerState

CONTEXT_KEY = "steersman"
"""Where the engine's forward context holds the state of this worker."""

_SCHEMAS = (
    "edit_scores_(Tensor(a!) scores, Tensor site) -> ()",
    "choose_(Tensor scores, Tensor(a!) weights, Tensor(b!) ids, Tensor site) -> ()",
    "edit_states_(Tensor(a!) hidden, Tensor? residual, Tensor site) -> ()",
    "count_(Tensor(a!) ids, Tensor site) -> ()",
)


def _state() -> WorkerState:
    state = get_forward_context().no_compile_layers.get(CONTEXT_KEY)
    if not isinstance(state, WorkerState):
        raise SteeringNotApplied(
            "the engine runs a steered graph without its plans: its cache is another engine's"
        )
    return state


def _edit_scores(scores: Tensor, site: Tensor) -> None:
    _state().edit_scores(scores, site)


def _choose(scores: Tensor, weights: Tensor, ids: Tensor, site: Tensor) -> None:
    _state().choose(scores, weights, ids, site)


def _edit_states(hidden: Tensor, residual: Tensor | None, site: Tensor) -> None:
    _state().edit_states(hidden, residual, site)


def _count(ids: Tensor, site: Tensor) -> None:
    counter = _state().counter
    if counter is None:
        raise SteeringNotApplied("the engine runs a graph that counts experts, and has no room for counts")
    counter.count(ids, site)


_operations: Any = Library("steersman", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _op in zip(_SCHEMAS, (_edit_scores, _choose, _edit_states, _count), strict=True):
    _operations.define(_schema)
    _name = _schema.partition("(")[0]
    for _device in ("CPU", "CUDA"):
        _operations.impl(_name, _op, _device)
    _operations._register_fake(_name, lambda *args: None)
