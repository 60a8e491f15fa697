"""The states of a model while it reads: what its decoder layers give to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import numpy as np
from torch import Tensor, nn

from steersman.errors import ModelError
from steersman.models.adapters import unwrap
from steersman.models.architecture import decoder_config, decoder_layers
from steersman.models.reading import read_batch
from steersman.models.streams import why_no_stream

Ints = np.ndarray[Any, Any]
Kept = TypeVar("Kept")


@overload
def block_outputs(
    model: nn.Module, layers: Sequence[int], ids: Sequence[Ints | Sequence[int]]
) -> dict[int, Tensor]: ...
@overload
def block_outputs(
    model: nn.Module,
    layers: Sequence[int],
    ids: Sequence[Ints | Sequence[int]],
    keep: Callable[[Tensor], Kept],
) -> dict[int, Kept]: ...
def block_outputs(
    model: nn.Module,
    layers: Sequence[int],
    ids: Sequence[Ints | Sequence[int]],
    keep: Callable[[Tensor], Any] | None = None,
) -> dict[int, Any]:
    """What decoder layers give for a batch of texts, before any final norm.

    Args:
        model: A transformers decoder model, in evaluation mode (`models.reading.evaluating`).
        layers: Decoder layers, from 0.
        ids: Token ids of each text.
        keep: What to keep of a layer's states, taken as soon as it has run, so that not all states of all
            layers are in memory. They themselves, where nothing is given.

    Returns:
        {layer: states [texts, columns, width]} in the model's dtype, on the layer's device; or what is kept
        of them. Texts are padded on the right: the state of token i of a text is in column i; columns beyond
        its length are arbitrary.

    Raises:
        ModelError: a layer does not exist, did not run once, or does not give one state a token.
    """
    found: dict[int, Any] = {}
    expected = (len(ids), max(map(len, ids)), decoder_config(model).hidden_size)

    def collect(layer: int, states: Tensor) -> None:
        if tuple(states.shape) != expected:
            raise _unlike(layer, f"gives states of shape {list(states.shape)}", expected)
        if layer in found:
            raise _unlike(layer, "ran twice", expected)
        found[layer] = states if keep is None else keep(states)

    with recording_blocks(model, layers, collect):
        read_batch(model, ids)
    for layer in layers:
        if layer not in found:
            raise _unlike(layer, "did not run", expected)
    return found


def _unlike(layer: int, what: str, expected: tuple[int, int, int]) -> ModelError:
    rows, columns, width = expected
    return ModelError(f"layer {layer} {what}; [{rows}, {columns}, {width}] were expected")


@contextmanager
def recording_blocks(
    model: nn.Module, layers: Sequence[int], collect: Callable[[int, Tensor], object]
) -> Iterator[None]:
    """Call `collect(layer, states)` whenever one of these layers has run. Raises ModelError for a layer that
    does not exist, and for models whose layers do not give one residual stream.
    """
    if reason := why_no_stream(model, layers):
        raise ModelError(f"{type(unwrap(model)).__name__} gives no states of its residual stream: {reason}")
    modules = decoder_layers(model)
    check_layers(layers, len(modules))

    def hook(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: void(collect(layer, state_of(output)))

    handles = [modules[layer].register_forward_hook(hook(layer)) for layer in dict.fromkeys(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def void(_value: object) -> None:
    """Nothing: a hook that returns a value would change the output."""


def state_of(output: Any) -> Tensor:
    """The residual stream in a decoder layer's output: the output, or the first of a tuple or list."""
    state = output[0] if type(output) in (tuple, list) and output else output
    if not isinstance(state, Tensor):
        raise ModelError(f"a decoder layer gives {type(state).__name__}, not a tensor")
    return state


def check_layers(layers: Sequence[int], count: int) -> None:
    """Raise `ModelError` where a layer does not exist among `count`."""
    for layer in layers:
        if not 0 <= layer < count:
            raise ModelError(f"layer {layer!r} does not exist: the model has layers 0 to {count - 1}")
