"""The states of a model while it reads: what its decoder layers give to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from steersman.errors import ModelError
from steersman.models.architecture import decoder_config, decoder_layers
from steersman.models.reading import read_batch

Ints = np.ndarray[Any, Any]


def block_outputs(
    model: nn.Module, layers: Sequence[int], ids: Sequence[Ints | Sequence[int]]
) -> dict[int, Tensor]:
    """What decoder layers give for a batch of texts, before any final norm.

    Args:
        model: A transformers decoder model, in evaluation mode (`models.reading.evaluating`).
        layers: Decoder layers, from 0.
        ids: Token ids of each text.

    Returns:
        {layer: states [texts, columns, width]} in the model's dtype, on the layer's device. Texts are padded
        on the right: the state of token i of a text is in column i; columns beyond its length are arbitrary.

    Raises:
        ModelError: a layer does not exist, did not run, or does not give one state a token.
    """
    found: dict[int, Tensor] = {}
    with recording_blocks(model, layers, found.__setitem__):
        read_batch(model, ids)
    rows, columns, width = len(ids), max(map(len, ids)), decoder_config(model).hidden_size
    for layer in layers:
        shape = tuple(found[layer].shape) if layer in found else None
        if shape != (rows, columns, width):
            what = "did not run" if shape is None else f"gives states of shape {list(shape)}"
            raise ModelError(f"layer {layer} {what}; [{rows}, {columns}, {width}] were expected")
    return found


@contextmanager
def recording_blocks(
    model: nn.Module, layers: Sequence[int], collect: Callable[[int, Tensor], object]
) -> Iterator[None]:
    """Call `collect(layer, states)` whenever one of these layers has run. Raises ModelError for a layer that
    does not exist.
    """
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
    """The residual stream in a decoder layer's output: the output, or the first of a tuple."""
    state = output[0] if isinstance(output, tuple) else output
    if not isinstance(state, Tensor):
        raise ModelError(f"a decoder layer gives {type(state).__name__}, not a tensor")
    return state


def check_layers(layers: Sequence[int], count: int) -> None:
    """Raise `ModelError` where a layer does not exist among `count`."""
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise ModelError(f"layer {layer!r} does not exist: the model has layers 0 to {count - 1}")
