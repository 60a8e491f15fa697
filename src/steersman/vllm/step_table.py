"""Who of a step follows what, as the table that is copied to the device: `followed` of the bank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from steersman.errors import SteeringNotApplied
from steersman.vllm.live import Span


def followed(spans: Sequence[Span], tokens: int, components: int) -> NDArray[np.int32]:
    """The bank's table `followed`, int32 [tokens, 2 · components], for some spans of tokens.

    Raises:
        SteeringNotApplied: a token follows more rows than the table holds.
    """
    table = np.zeros((tokens, 2 * components), np.int32)
    if not spans:
        return table
    ends = np.fromiter((span.end for span in spans), np.int64, len(spans))
    lengths = ends - np.fromiter((span.first for span in spans), np.int64, len(spans))
    # Token t of a span lies at end - (tokens up to the span's end) + (its number among all tokens).
    at = np.repeat(ends - np.cumsum(lengths), lengths) + np.arange(lengths.sum())
    known: dict[object, NDArray[np.int32]] = {}
    packed = []
    for span in spans:
        row = known.get(span.follows)
        if row is None:
            row = known[span.follows] = _packed(span, components)
        packed.append(row)
    table[at] = np.repeat(np.stack(packed), lengths, axis=0)
    return table


def _packed(span: Span, components: int) -> NDArray[np.int32]:
    if len(span.follows) > components:
        raise SteeringNotApplied(
            f"a request follows {len(span.follows)} steerings; this engine has room for {components}"
        )
    packed = np.zeros(2 * components, np.int32)
    for component, (row, strength) in enumerate(span.follows):
        packed[component] = row
        packed[components + component] = np.float32(strength).view(np.int32)
    return packed
