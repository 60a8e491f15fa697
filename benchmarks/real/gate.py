"""Error rates and power of the transplantation gate on the states of real models.

    python benchmarks/real/gate.py SOURCE TARGET MAP OUT CONCEPT=PAIRS[=OTHERS]… [--target-chat-template FILE]
        --states FOLDER [--nulls 200] [--power 3]

Each concept's pairs are read once by either model, and their states kept in FOLDER; every concept below is
refined from these, and judged by the gate as `steersman transplant --check` judges it: projection, map, and
probe where it can be asked. Nulls, in turn: `flipped` (the sides of random groups swapped, in both models and
in the probe), `split` (both sides of a pair are one side of two groups: nothing but topics), `permuted` (a
map of random rows: its target dimensions are permuted, its R² is drawn from its control's). Power: the true
concept with a random half, or third, of its groups.

OTHERS are pairs to judge a concept with whose own are of too few groups; it is in the verdicts alone. OUT, a
JSON file, keeps what others wrote there under other targets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import steersman
from steersman.concepts.dose import DEFAULT_DOSE, Strength
from steersman.concepts.pair_states import PairStates, read_pairs
from steersman.concepts.refinement import _Folds, _refine_layer, _stacked
from steersman.concepts.relabelling import FEWEST_UNITS
from steersman.concepts.transplant_check import _check_layers, _direction_rows, _probed
from steersman.models.encoding import hash_of_cluster
from steersman.pairs import ContrastPair, ContrastPairs

States = dict[int, NDArray[np.float32]]
"""{layer: [pairs, 2, width]}"""
DOSE = Strength.parse(DEFAULT_DOSE)
NULLS = ("flipped", "split", "permuted")


@dataclass
class Judged:
    """A concept with what both models made of its pairs."""

    bridge: steersman.AffineMap
    concept: steersman.ConceptVector
    opened: tuple[Any, Any]
    pairs: Sequence[ContrastPair]
    clusters: NDArray[np.int64]
    source: States
    target: States
    others: ContrastPairs | None = None

    def of(self, rows: NDArray[np.int64]) -> Judged:
        """Some of the pairs."""
        return replace(
            self,
            pairs=[self.pairs[row] for row in rows],
            clusters=self.clusters[rows],
            source={layer: states[rows] for layer, states in self.source.items()},
            target={layer: states[rows] for layer, states in self.target.items()},
        )

    def check(self) -> steersman.TransplantCheck:
        """The concept refined from its pairs, and the gate asked."""
        with _kept(self.source, self.clusters) as source, _kept(self.target, self.clusters) as target:
            folds = _Folds(source.clusters)
            found = {layer: _refine_layer(source, layer, folds, "mean_difference") for layer in source.layers}
            concept = replace(
                self.concept,
                vectors={
                    layer: torch.from_numpy(one.directions.whole).float() for layer, one in found.items()
                },
                separation={layer: one.separation for layer, one in found.items()},
                fold_vectors=_stacked([one.directions.of_folds for one in found.values()]),
                fold_clusters=torch.from_numpy(folds.clusters),
                cluster_units=torch.from_numpy(folds.unit_of_cluster),
                unit_sums=_stacked([one.directions.unit_sums for one in found.values()]),
                unit_sizes=torch.from_numpy(np.bincount(folds.numbers % 100)),
            )
            rows = _direction_rows(concept, target.clusters)
            rows[np.isin(target.clusters, [*self.bridge.fitted_groups])] = -1
            layers = _check_layers(self.bridge, concept, target, rows)
            layers = _probed(
                self.bridge, concept, self.opened, ContrastPairs(self.pairs, "real"), layers, DOSE, 6
            )
            held = target.clusters[rows >= 0]
        depth = self.bridge.architecture.layer_count
        return steersman.TransplantCheck(
            layers, {"name": "", "sha256": ""}, len(held), len(np.unique(held)), 0, 0, depth
        )


def _kept(states: States, clusters: NDArray[np.int64]) -> PairStates:
    width = next(iter(states.values())).shape[-1]
    found = PairStates(sorted(states), width, clusters, 0)
    found.append(states)
    return found


def read(
    bridge: steersman.AffineMap,
    concept: steersman.ConceptVector,
    pairs: ContrastPairs,
    source: tuple[Any, Any],
    target: tuple[Any, Any],
    folder: Path,
) -> Judged:
    """Both models read the pairs, unless the folder has what they gave."""
    bridge = bridge.of_concept(concept)
    layers = [layer for layer in bridge.layers if bridge.layer_map(layer).source_layer in concept.vectors]
    sources = sorted({bridge.layer_map(layer).source_layer for layer in layers})
    kept, clusters = [], []
    for side, opened, chosen in (("source", source, sources), ("target", target, layers)):
        file = folder / f"{pairs.sha256}-{concept.position}-{side}.npz"
        if not file.exists():
            with read_pairs(*opened, pairs, chosen, concept.position) as states:
                every = {
                    str(n): np.concatenate([chunk.copy() for _, chunk in states.chunks(n)]) for n in chosen
                }
                np.savez(file, clusters=states.clusters, **every)  # type: ignore[arg-type]
        with np.load(file, allow_pickle=False) as found:
            kept.append({n: found[str(n)] for n in chosen})
            clusters.append(found["clusters"])
    if not np.array_equal(*clusters):
        raise SystemExit(f"{pairs.name}: the models leave out different pairs, which this does not follow")
    names = [hash_of_cluster(pair.cluster) for pair in pairs]
    first = {name: number for number, name in reversed(list(enumerate(names)))}
    order = sorted(range(len(names)), key=lambda n: first[names[n]])
    if len(order) != len(clusters[0]):
        raise SystemExit(f"{pairs.name}: pairs are left out as alike, which this does not follow")
    return Judged(bridge, concept, target, [pairs[n] for n in order], clusters[0], *kept)


# Nulls, and less of the truth ----------------------------------------


def flipped(one: Judged, draw: np.random.Generator) -> Judged:
    """The sides of random groups swapped, everywhere."""
    names = np.unique(one.clusters)
    swap = np.isin(one.clusters, names[draw.random(len(names)) < 0.5])

    def turned(states: States) -> States:
        return {n: np.where(swap[:, None, None], value[:, ::-1], value) for n, value in states.items()}

    pairs = [_turned(pair) if turn else pair for pair, turn in zip(one.pairs, swap, strict=True)]
    return replace(one, pairs=pairs, source=turned(one.source), target=turned(one.target))


def _turned(pair: ContrastPair) -> ContrastPair:
    return replace(
        pair,
        positive=pair.negative,
        negative=pair.positive,
        positive_target=pair.negative_target,
        negative_target=pair.positive_target,
    )


def split(one: Judged, draw: np.random.Generator) -> Judged:
    """One side of the pairs of one group against the same side of another's, both seen by the map or not."""
    side = int(draw.integers(2))
    names = np.unique(one.clusters)
    seen = np.isin(names, [*one.bridge.fitted_groups])
    rows: list[tuple[int, int]] = []
    for kind in (False, True):
        some = draw.permutation(names[seen == kind])
        for first, second in zip(some[::2], some[1::2], strict=False):
            rows += zip(
                np.flatnonzero(one.clusters == first), np.flatnonzero(one.clusters == second), strict=False
            )
    left, right = np.array(rows).T

    def joined(states: States) -> States:
        return {n: np.stack([value[left, side], value[right, side]], axis=1) for n, value in states.items()}

    pairs = [
        replace(
            one.pairs[a],
            negative=(one.pairs[b].positive, one.pairs[b].negative)[side],
            positive=(one.pairs[a].positive, one.pairs[a].negative)[side],
            negative_target=(one.pairs[b].positive_target, one.pairs[b].negative_target)[side],
            positive_target=(one.pairs[a].positive_target, one.pairs[a].negative_target)[side],
        )
        for a, b in rows
    ]
    return replace(
        one,
        pairs=pairs,
        clusters=one.clusters[left],
        source=joined(one.source),
        target=joined(one.target),
    )


def permuted(one: Judged, draw: np.random.Generator) -> Judged:
    """The map's target dimensions in another order, with an R² as its control's."""
    maps = {}
    for layer, of_map in one.bridge.maps.items():
        order = torch.from_numpy(draw.permutation(len(of_map.bias)))
        r2 = of_map.r2_control + of_map.control_sd * float(draw.normal())
        maps[layer] = replace(of_map, weight=of_map.weight[order], bias=of_map.bias[order], r2=r2)
    return replace(one, bridge=replace(one.bridge, maps=maps))


def part(one: Judged, share: int, draw: np.random.Generator) -> Judged:
    """A random half or third of the groups."""
    names = np.unique(one.clusters)
    some = draw.permutation(names)[: len(names) // share]
    return one.of(np.flatnonzero(np.isin(one.clusters, some)))


# What is written ----------------------------------------


def verdict(check: steersman.TransplantCheck) -> dict[str, Any]:
    """The layer taken, with its figures."""
    best = check.best.to_json()
    keys = ("layer", "source_layer", "auroc", "z", "p", "map_p", "probe", "unprobed", "passed")
    return {key: best[key] for key in keys} | {
        "groups": check.clusters,
        "passing": [layer for layer, one in sorted(check.layers.items()) if one.passed],
        "arriving": [layer for layer, one in sorted(check.layers.items()) if one.arrives],
    }


def _whole(one: Judged) -> steersman.TransplantCheck:
    if one.others is None:
        return one.check()
    return steersman.check_transplant(one.bridge, one.concept, one.opened, one.others)


def measured(judged: dict[str, Judged], nulls: int, power: int) -> dict[str, Any]:
    """Verdicts, nulls that pass by kind, and true parts that pass by concept."""
    began = time.perf_counter()
    found: dict[str, Any] = {"verdicts": {name: verdict(_whole(one)) for name, one in judged.items()}}
    print(json.dumps(found, indent=1), flush=True)
    asked, passed, arrived = Counter[str](), Counter[str](), Counter[str]()
    names = [name for name, one in judged.items() if len(np.unique(one.clusters)) >= 4 * FEWEST_UNITS]
    for number in range(nulls if names else 0):
        kind, name = NULLS[number % 3], names[number // 3 % len(names)]
        make = {"flipped": flipped, "split": split, "permuted": permuted}[kind]
        check = make(judged[name], np.random.default_rng([1, number])).check()
        asked[kind] += 1
        passed[kind] += check.passed
        arrived[kind] += any(one.arrives for one in check.layers.values())
        if number % 20 == 19 or check.passed:
            print(f"{number + 1} nulls, {sum(passed.values())} pass: {kind} {name} {check!r}", flush=True)
    found["nulls"] = {
        kind: {"n": asked[kind], "without_probe": arrived[kind], "pass": passed[kind]} for kind in asked
    }
    found["power"] = (
        {
            name: {
                word: {
                    "n": power,
                    "pass": sum(
                        part(judged[name], share, np.random.default_rng([2, share, seed])).check().passed
                        for seed in range(power)
                    ),
                }
                for share, word in ((2, "half"), (3, "third"))
            }
            for name in names
        }
        if power
        else {}
    )
    found["seconds"] = round(time.perf_counter() - began)
    return found


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("map")
    parser.add_argument("out", type=Path)
    parser.add_argument("concepts", nargs="+", metavar="CONCEPT=PAIRS")
    parser.add_argument("--target-chat-template")
    parser.add_argument("--states", type=Path, required=True)
    parser.add_argument("--nulls", type=int, default=200)
    parser.add_argument("--power", type=int, default=3)
    given = parser.parse_args(arguments if arguments is None else list(arguments))
    bridge = steersman.AffineMap.from_pretrained(given.map)
    source = steersman.load_model(given.source)
    target = steersman.load_model(given.target, chat_template=given.target_chat_template)
    given.states.mkdir(parents=True, exist_ok=True)
    judged = {}
    for word in given.concepts:
        place, pairs, *others = word.split("=")
        concept = steersman.ConceptVector.from_pretrained(place)
        judged[Path(place).name] = read(
            bridge, concept, steersman.load_pairs(pairs), source, target, given.states
        )
        if others:
            judged[Path(place).name].others = steersman.load_pairs(others[0])
        print(f"{place}: {len(judged[Path(place).name].pairs)} pairs read", flush=True)
    del source
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    name = f"{Path(given.source).name} to {Path(given.target).name}"
    found[name] = {
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        **measured(judged, given.nulls, given.power),
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
