"""A model's own forward from an edited layer on, with what comes before given back from a recording.

What an edit at a layer's router cannot change is not computed again: the layers before it, the attention of
its own layer, and in the last layer the experts of all positions that nobody reads. The forward itself is the
model's, masks, positions and all; only single modules are passed through. Families differ, so a cut is used
where it was seen to give what a whole forward gives (`Cuts`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from steersman.models.architecture import RouterSite, decoder_layers
from steersman.models.replacing import replace_method


class CannotCut(Exception):
    """The modules of a forward were not called as they were when it was recorded."""


@dataclass
class Recording:
    """What modules gave in one forward of a batch."""

    outputs: dict[int, Any] = field(default_factory=dict)
    """Decoder layer → its output."""
    before: dict[int, list[tuple[str, Any]]] = field(default_factory=dict)
    """Decoder layer → the children that ran before that with the router, and their outputs."""


@dataclass(frozen=True)
class Cuts:
    """What is left out of forwards from a layer on."""

    layers: bool = True
    """The layers before."""
    children: bool = True
    """In its own layer, what runs before the experts."""
    columns: bool = True
    """In the last layer, the positions that are not read."""


EVERYTHING = Cuts(layers=False, children=False, columns=False)
"""Nothing left out."""


class Anatomy:
    """The parts of a model that forwards are cut at."""

    def __init__(self, model: nn.Module, sites: list[RouterSite]) -> None:
        self.model = model
        self.layers = list(decoder_layers(model))
        self.last = len(self.layers) - 1
        self.routed = {site.facts.layer: _child_with(self.layers[site.facts.layer], site) for site in sites}
        """Layer → the name of the child that holds its router."""
        parameters = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in parameters
        config = getattr(model, "config", None)
        routed = getattr(config, "output_router_logits", False) and "output_router_logits" in parameters
        self._plain = {"output_router_logits": False} if routed else {}

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, keep: int) -> Tensor:
        """Logits [rows, keep, vocabulary] of the last columns."""
        more = {"logits_to_keep": keep} if self._keeps else {}
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **more, **self._plain
        )
        logits: Tensor = output.logits
        return logits[:, -keep:]

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """While open, take note of what a forward's modules give."""
        found = Recording()
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                stack.callback(replace_method(layer, "forward", _noting(found.outputs, number)))
                if number not in self.routed:
                    continue
                calls = found.before[number] = []
                reached = [False]
                for name, child in layer.named_children():
                    is_routed = name == self.routed[number]
                    stack.callback(
                        replace_method(child, "forward", _noting_call(calls, name, reached, is_routed))
                    )
            yield found

    @contextmanager
    def replaying(
        self, recording: Recording, layer: int, cuts: Cuts, keep: int, rows: Tensor
    ) -> Iterator[None]:
        """While open, forwards of some rows of a batch (again and again, if named so) begin at a layer;
        `keep` columns are read.
        """
        trim = keep if self.short(layer, cuts) else None
        with ExitStack() as stack:
            if cuts.layers:
                for number in range(layer):
                    given = recording.outputs[number]
                    stand_in = _giving(given, rows, trim, itself=number == layer - 1)
                    stack.callback(replace_method(self.layers[number], "forward", stand_in))
            if cuts.children:
                calls = iter(recording.before[layer])
                for name, child in self.layers[layer].named_children():
                    if name != self.routed[layer]:
                        stack.callback(replace_method(child, "forward", _replaying(calls, name, rows, trim)))
            if self.trims_last(layer, cuts):
                child = getattr(self.layers[self.last], self.routed[self.last])
                stack.callback(replace_method(child, "forward", _only_last(keep)))
            yield

    def short(self, layer: int, cuts: Cuts) -> bool:
        """Whether a forward from this layer on is given the read columns alone."""
        return cuts.columns and cuts.children and cuts.layers and layer == self.last

    def trims_last(self, layer: int, cuts: Cuts) -> bool:
        """Whether the experts of the last layer, which this is not, run for the read columns alone."""
        return cuts.columns and layer != self.last and self.last in self.routed


def _child_with(layer: nn.Module, site: RouterSite) -> str:
    """The name of a layer's child that is its router, or holds it."""
    for name, child in layer.named_children():
        if any(module is site.module for module in child.modules()):
            return name
    return ""


def _noting(outputs: dict[int, Any], number: int) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs[number] = original(*args, **kwargs)
        return outputs[number]

    return forward


def _noting_call(
    calls: list[tuple[str, Any]], name: str, reached: list[bool], routed: bool
) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        reached[0] |= routed
        output = original(*args, **kwargs)
        if not reached[0]:
            calls.append((name, output))
        return output

    return forward


def _giving(recorded: Any, rows: Tensor, trim: int | None, *, itself: bool) -> Callable[..., Any]:
    """In place of a layer: what it gave, or in its form what it is given, where nobody looks at that."""

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if itself:
            return _of_rows(recorded, rows, trim)
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *recorded[1:]) if isinstance(recorded, tuple) else hidden

    return forward


def _replaying(
    calls: Iterator[tuple[str, Any]], name: str, rows: Tensor, trim: int | None
) -> Callable[..., Any]:
    done = [False]

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not done[0]:
            call = next(calls, None)
            if call is not None:
                if call[0] != name:
                    raise CannotCut(f"{name} ran where {call[0]} had run")
                return _of_rows(call[1], rows, trim)
            done[0] = True
        return original(*args, **kwargs)

    return forward


def _only_last(keep: int) -> Callable[..., Any]:
    """In place of a layer's experts: the last columns alone; the others, which nobody reads, are 0."""

    def forward(original: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = original(hidden[:, -keep:].contiguous(), *args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        if first.dim() != 3 or hidden.dim() != 3:
            raise CannotCut("the experts are not given [rows, columns, width]")
        whole = first.new_zeros((*hidden.shape[:2], first.shape[2]))
        whole[:, -keep:] = first
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    return forward


def _of_rows(value: Any, rows: Tensor, trim: int | None) -> Any:
    """Some rows of what was recorded, and of them the last columns."""
    if isinstance(value, tuple):
        return tuple(_of_rows(entry, rows, trim) for entry in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() < 3:
        raise CannotCut("a module gives no [rows, columns, width]")
    chosen = value if trim is None else value[:, -trim:]
    return chosen.index_select(0, rows.to(value.device))


def positions_of(mask: Tensor) -> Tensor:
    """Positions counted from each row's first real token."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
