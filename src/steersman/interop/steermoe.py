"""Rankings of the SteerMoE reference (github.com/adobe-research/SteerMoE): pickled tables, one row an expert,
best first.

Columns, as its detection computes them over the target tokens of `messages_0` (1, our positive side) and
`messages_1` (2, negative): `a1`, `a2` how many tokens chose the expert, `d1`, `d2` how many did not; `a1_n` =
a1/(a1 + d1) and `a2_n` the rates; `risk_diff` = a1_n - a2_n; `risk_diff_abs` its size, by which rows descend;
`Layer_Expert` a label. So a + d is the side's number of tokens, the same in every row, and a layer's a add up
to k times that: both are checked, and k is what they say. Selection takes rows with risk_diff > 0 and < 0
from the top, then activates at most k in a layer.

Errors cannot be had from such a table (it keeps no pairs), so there are none.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from steersman.errors import ArtifactError, valid_name
from steersman.experts.contrast import RoutingContrast
from steersman.experts.estimate import Floats
from steersman.experts.moments import Integers
from steersman.experts.risk_difference import ClusterSums
from steersman.interop.foreign_files import read_bytes
from steersman.interop.pickled_arrays import Column
from steersman.interop.pickled_frame import read_frame
from steersman.models.architecture import read_architecture
from steersman.models.identity import model_name, weights_id
from steersman.models.loading import Named, structure_of
from steersman.steering import Architecture

COUNTS = ("layer", "expert", "a1", "a2", "d1", "d2")
"""Whole numbers; pandas mostly keeps them as float64."""
DERIVED = ("a1_n", "a2_n", "risk_diff", "risk_diff_abs")
"""What follows from the counts: compared with them where it is there. Other columns are not read."""
TOLERANCE = 1e-9
_LARGEST_COUNT = 2.0**53


@dataclass(frozen=True)
class Ranking:
    """A reference ranking in its own order: one entry a row, int64 [rows], and tokens of either side [2]."""

    layer: Integers
    expert: Integers
    activations: Integers
    """int64 [2, rows]."""
    tokens: Integers
    top_k: Mapping[int, int]
    """{layer: experts chosen for a token}, from the sums of the layer's rows."""
    name: str
    sha256: str

    @property
    def experts(self) -> dict[int, int]:
        """{layer: number of experts}."""
        return {layer: int((self.layer == layer).sum()) for layer in self.top_k}


def import_steermoe(source: str | Path, model: Named) -> RoutingContrast:
    """Read a ranking of the SteerMoE reference as a contrast of `model`, which it must have been made with.

    The contrast keeps the file's order, has the file's counts, and no standard errors (NaN): `select` takes
    its experts as the reference's code does. The pickle is read as data; nothing in it is run.

    Args:
        source: A file that the reference's `DataFrame.to_pickle` wrote.
        model: The model, or its name: layers, experts and k of the ranking are checked against its routers.

    Raises:
        ArtifactError: the file is damaged, foreign or hostile, contradicts itself, or is of another model.

    Example:
        >>> steersman.import_steermoe("activations.pkl", "lab:moe")
        <RoutingContrast: ...of lab:moe>
    """
    model = structure_of(model)
    ranking = read_ranking(source)
    name, revision = model_name(model)
    contrast = contrast_of(ranking, read_architecture(model), weights_id(model))
    return replace(contrast, model=name, revision=revision)


def contrast_of(ranking: Ranking, architecture: Architecture, weights: str) -> RoutingContrast:
    """A ranking as a contrast of a model. Raises `ArtifactError` where it is another model's."""
    routers = [router for router in architecture.routers if router.steerable]
    expected = {router.layer: (router.experts, router.top_k) for router in routers}
    found = {layer: (number, ranking.top_k[layer]) for layer, number in ranking.experts.items()}
    _check_model(ranking.name, found, expected)
    shape = (len(routers), max(router.experts for router in routers))
    row_of = {router.layer: row for row, router in enumerate(routers)}
    rows = np.array([row_of[layer] for layer in ranking.layer.tolist()])
    activations = np.full((2, *shape), -1, np.int64)
    activations[:, rows, ranking.expert] = ranking.activations
    sums = ClusterSums.zeros(*shape)
    sums.a1, sums.a2 = np.maximum(activations, 0)
    sums.n1, sums.n2 = ranking.tokens.tolist()
    return RoutingContrast(
        activations=activations,
        tokens=ranking.tokens,
        sums=sums,
        architecture=architecture,
        weights_id=weights,
        cluster_ids=np.zeros(0, np.int64),
        pairs=0,
        made_from=({"kind": "steermoe_ranking", "name": ranking.name, "sha256": ranking.sha256},),
        order=rows * shape[1] + ranking.expert,
    )


def _check_model(name: str, found: dict[int, tuple[int, int]], expected: dict[int, tuple[int, int]]) -> None:
    if sorted(found) != sorted(expected):
        other = sorted(found.keys() ^ expected.keys())[0]
        where = "in the ranking, not in the model" if other in found else "in the model, not in the ranking"
        raise ArtifactError(
            f"{name}: a ranking of {len(found)} layers, for a model with {len(expected)} routers: "
            f"layer {other} is {where}; it belongs to another model"
        )
    for layer, (experts, top_k) in sorted(found.items()):
        if (experts, top_k) != expected[layer]:
            raise ArtifactError(
                f"{name}: its layer {layer} chooses {top_k} of {experts} experts, the model's "
                f"{expected[layer][1]} of {expected[layer][0]}: it belongs to another model"
            )


def read_ranking(source: str | Path) -> Ranking:
    """Read and check a ranking. Raises `ArtifactError` as `import_steermoe` does."""
    path = Path(valid_name(source, ArtifactError))
    content = read_bytes(path)
    columns = read_frame(content, str(path))
    missing = [name for name in (*COUNTS, "risk_diff") if name not in columns]
    if missing:
        raise ArtifactError(
            f"{path}: not a SteerMoE ranking: it has no column {missing[0]!r} "
            f"(needed: {', '.join((*COUNTS, 'risk_diff'))})"
        )
    if not len(columns["layer"]):
        raise ArtifactError(f"{path}: the ranking is empty")
    layer, expert, a1, a2, d1, d2 = (_whole(path, name, columns[name]) for name in COUNTS)
    tokens = np.array([_only(path, side + 1, a + d) for side, (a, d) in enumerate([(a1, d1), (a2, d2)])])
    activations = np.stack([a1, a2])
    _check_derived(path, columns, activations / tokens[:, None])
    ranking = Ranking(
        layer=layer,
        expert=expert,
        activations=activations,
        tokens=tokens,
        top_k=_top_k(path, layer, expert, activations, tokens),
        name=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    if (np.diff(np.abs(columns["risk_diff"].astype(np.float64))) > TOLERANCE).any():
        warnings.warn(
            f"{path}: its rows do not descend by |risk_diff|; they are taken in the order they have",
            stacklevel=3,
        )
    return ranking


def _whole(path: Path, name: str, column: Column) -> Integers:
    if column.dtype.kind not in "iuf":
        raise ArtifactError(f"{path}: column {name!r} holds no numbers")
    values = column.astype(np.float64)
    bad = ~((values >= 0) & (values < _LARGEST_COUNT) & (values == np.floor(values)))
    if bad.any():
        row = int(np.argmax(bad))
        raise ArtifactError(f"{path}: row {row}, column {name!r}: {values[row]:g} is not a count")
    return values.astype(np.int64)


def _only(path: Path, side: int, totals: Integers) -> int:
    """The number of tokens that every row of a side has."""
    other = totals != totals[0]
    if other.any():
        row = int(np.argmax(other))
        raise ArtifactError(
            f"{path}: row {row}: a{side} + d{side} is {totals[row]}, in the first row {totals[0]}; every row "
            "counts the same tokens"
        )
    if not totals[0]:
        raise ArtifactError(f"{path}: a{side} + d{side} is 0: nothing was counted")
    return int(totals[0])


def _check_derived(path: Path, columns: Mapping[str, Column], rates: Floats) -> None:
    difference = rates[0] - rates[1]
    right = dict(zip(DERIVED, (rates[0], rates[1], difference, np.abs(difference)), strict=True))
    for name in DERIVED:
        column = columns.get(name)
        if column is None:
            continue
        if column.dtype.kind not in "iuf":
            raise ArtifactError(f"{path}: column {name!r} holds no numbers")
        wrong = ~(np.abs(column.astype(np.float64) - right[name]) <= TOLERANCE)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ArtifactError(
                f"{path}: row {row}: {name} is {float(column[row]):g}, its counts give {right[name][row]:g}"
            )


def _top_k(
    path: Path, layer: Integers, expert: Integers, activations: Integers, tokens: Integers
) -> dict[int, int]:
    """{layer: k}: a layer's activations add up to k for each token, on both sides alike."""
    found: dict[int, int] = {}
    for number in np.unique(layer).tolist():
        rows = layer == number
        if sorted(expert[rows].tolist()) != list(range(int(rows.sum()))):
            raise ArtifactError(f"{path}: layer {number}: its experts are not 0 to E - 1, each once")
        sums = [int(total) for total in activations[:, rows].astype(object).sum(axis=1)]
        k = sums[0] // int(tokens[0])
        if not k or any(total != k * int(count) for total, count in zip(sums, tokens, strict=True)):
            raise ArtifactError(
                f"{path}: layer {number}: its activations add up to {sums[0]} and {sums[1]}, which are not "
                f"the same k for each of {tokens[0]} and {tokens[1]} tokens"
            )
        found[number] = k
    return found
