"""Affine maps on disk: the maps and how well they do, or the moments of a part that is to be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from steersman.artifacts.content import read_artifact, write_artifact
from steersman.artifacts.fields import (
    Tensors,
    blaming,
    exact_keys,
    mapping,
    nothing_left,
    one_of,
    take,
    text_in,
    whole,
)
from steersman.artifacts.kinds import register
from steersman.artifacts.manifest import manifest_of, model_json, read_model
from steersman.concepts.affine_map import OF_SOURCES, PAIRED, AffineMap, LayerMap, MappedModel, MapTable
from steersman.concepts.joint_moments import JointMoments, Sides
from steersman.concepts.norms import NormHistogram
from steersman.errors import ArtifactError, PairsError
from steersman.shards import Shard

_KEYS = {"source", "rows", "texts", "skipped", "alignment", "layers", "maps", "seed", "shard"}
MAP = register(
    "affine_map", "an affine map", {1: _KEYS, 2: _KEYS, 3: {*_KEYS, "pairs", "table_rows"}}, chats=2
)


def save_affine_map(of: AffineMap, folder: str | Path, *, force: bool = False) -> None:
    """Write an affine map. Raises `ArtifactError` as `save_steering` does."""
    tensors: Tensors = {f"norms.{layer}": norms.to_tensor().numpy() for layer, norms in of.norms.items()}
    every = [*of.maps.items(), *((target, of_layer) for (_, target), of_layer in of.others.items())]
    for layer, of_layer in every:
        named = of_layer.to_tensors()
        tensors |= {f"maps.{of_layer.source_layer}-{layer}.{name}": of.numpy() for name, of in named.items()}
    if of.table is not None:
        names = (*PAIRED, *OF_SOURCES)
        tensors |= {f"table.{name}": getattr(of.table, name).numpy() for name in names}
    if of.shard is not None and of.moments is not None:
        moments = of.moments.to_tensors()
        tensors |= {f"moments.{name}": tensor.numpy() for name, tensor in moments.items()}
    manifest = {
        **manifest_of(MAP, of, {"from": [dict(source) for source in of.made_from]}),
        "source": model_json(of.source),
        "rows": {"all": of.rows, "held_out": of.held_out_rows},
        "texts": {"all": of.texts, "held_out": of.held_out_texts},
        "skipped": of.skipped,
        "alignment": of.alignment,
        "layers": _layers(of),
        "pairs": None if of.moments is None else [list(pair) for pair in of.moments.sides.pairs],
        "table_rows": None if of.table is None else of.table.rows,
        "maps": [
            {
                "source": of_layer.source_layer,
                "target": layer,
                "effective_rank": of_layer.effective_rank,
            }
            for layer, of_layer in every
        ],
        "seed": of.seed,
        "shard": of.shard,
    }
    write_artifact(folder, manifest, tensors, force)


def _layers(of: AffineMap) -> dict[str, list[int]]:
    """Which layers were related to which."""
    if of.table is not None:
        return {"source": list(of.table.source_layers), "target": list(of.table.target_layers)}
    if of.moments is None:
        raise ArtifactError("a map has neither its table nor the moments of a part")
    sides = of.moments.sides
    return {"source": list(sides.source_layers), "target": list(sides.target_layers)}


def load_affine_map(source: str | Path, *, revision: str | None = None) -> AffineMap:
    """Read an affine map from a folder or the Hub.

    Raises `ArtifactError` for anything damaged, foreign or newer.
    """
    path, manifest, tensors = read_artifact(source, MAP, revision)
    with blaming(path):
        exact_keys(manifest["source"], {"model", "architecture"}, "source")
        version = manifest["format_version"]
        models = {
            side: MappedModel(**read_model(facts, MAP, version))
            for side, facts in (("source", manifest["source"]), ("target", manifest))
        }
        if version < 3:
            manifest |= {"pairs": None, "table_rows": None}
        sides = _sides(manifest["layers"], models["source"], models["target"])
        shard = None if manifest["shard"] is None else _shard(manifest["shard"])
        norms = {
            layer: NormHistogram.from_tensor(torch.from_numpy(take(tensors, f"norms.{layer}", np.int64, 1)))
            for layer in sides.target_layers
        }
        seed = whole(manifest["seed"], "seed", most=2**63 - 1)
        made_from = mapping(manifest["made_from"], "made_from")
        exact_keys(made_from, {"from"}, "made_from")
        if not isinstance(made_from["from"], list):
            raise ArtifactError("made_from.from is not a list")
        moments = table = None
        maps: dict[int, LayerMap] = {}
        others: dict[tuple[int, int], LayerMap] = {}
        sampled = None if manifest["table_rows"] is None else whole(manifest["table_rows"], "table_rows")
        if shard is None or sampled is not None:
            table = _table(tensors, sides, sampled)
        if shard is None:
            if manifest["pairs"] is not None:
                raise ArtifactError("pairs: a map that is whole has no moments")
            assert table is not None
            maps, others = _maps(manifest["maps"], tensors, sides, table, version)
        else:
            if version < 3:
                raise ArtifactError("a part made by an earlier version: read it again")
            moments = _moments(tensors, _pairs(manifest["pairs"], sides), seed)
            if manifest["maps"] != []:
                raise ArtifactError("a part that is to be merged has maps already")
        nothing_left(tensors)
        rows, texts = (_counts(manifest[name], name) for name in ("rows", "texts"))
        if sampled is not None and not 1 <= sampled <= rows[0] and shard is None:
            raise ArtifactError("table_rows: there are not so many rows")
        if moments is not None and rows != (sum(part.rows for part in moments.parts), moments.parts[1].rows):
            raise ArtifactError("rows: they are not those of the moments")
        return AffineMap(
            maps=maps,
            others=others,
            source=models["source"],
            target=models["target"],
            rows=rows[0],
            texts=texts[0],
            held_out_rows=rows[1],
            held_out_texts=texts[1],
            skipped=whole(manifest["skipped"], "skipped"),
            alignment=one_of(manifest["alignment"], "alignment", ("boundaries", "last")),
            table=table,
            norms=norms,
            made_from=tuple(_entry(entry) for entry in made_from["from"]),
            seed=seed,
            moments=moments,
            shard=shard,
        )


def _entry(entry: Any) -> dict[str, Any]:
    """What a map was made of; of a concept, whose groups the fit has seen is more than words."""
    found = mapping(entry, "made_from.from")
    fitted = found.get("fitted", [])
    if not isinstance(fitted, list) or any(type(group) is not int for group in fitted):
        raise ArtifactError("made_from.from.fitted does not list groups by their hashes")
    return found


def _shard(text: Any) -> str:
    try:
        return str(Shard.parse(text_in(text, "shard")))
    except PairsError as error:
        raise ArtifactError(f"shard: {error}") from None


def _sides(layers: Any, source: MappedModel, target: MappedModel) -> Sides:
    exact_keys(layers, {"source", "target"}, "layers")
    found: list[tuple[int, ...]] = []
    for name, model in (("source", source), ("target", target)):
        values, count = layers[name], len(model.architecture.layers)
        if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
            raise ArtifactError(f"layers.{name} does not name layers, each once")
        found.append(tuple(whole(value, f"layers.{name}", most=count - 1) for value in values))
    return Sides(found[0], source.architecture.hidden_size, found[1], target.architecture.hidden_size)


def _counts(value: Any, name: str) -> tuple[int, int]:
    exact_keys(value, {"all", "held_out"}, name)
    every = whole(value["all"], f"{name}.all")
    return every, whole(value["held_out"], f"{name}.held_out", most=every)


def _pairs(entries: Any, sides: Sides) -> Sides:
    """The layers of a part, by the pairs that it has moments of."""
    if not isinstance(entries, list) or not entries:
        raise ArtifactError("pairs does not name pairs of layers")
    found = [(whole(source, "pairs"), whole(target, "pairs")) for source, target in entries]
    if len(set(found)) < len(found) or not set(found) <= set(sides.pairs) or found != sorted(found):
        raise ArtifactError("pairs are not pairs of the layers, each once and in order")
    return sides.of(found)


def _table(tensors: Tensors, sides: Sides, rows: int | None) -> MapTable:
    pairs = len(sides.source_layers), len(sides.target_layers)
    found: dict[str, torch.Tensor] = {}
    for names, shape in ((PAIRED, pairs), (OF_SOURCES, pairs[:1])):
        for name in names:
            found[name] = _shaped(tensors, f"table.{name}", np.float64, shape)
    return MapTable(sides.source_layers, sides.target_layers, **found, rows=rows)


def _maps(
    entries: Any, tensors: Tensors, sides: Sides, table: MapTable, version: int
) -> tuple[dict[int, LayerMap], dict[tuple[int, int], LayerMap]]:
    """{target layer: its map}, and further maps by source and target layer."""
    if not isinstance(entries, list):
        raise ArtifactError("maps is not a list")
    maps: dict[int, LayerMap] = {}
    others: dict[tuple[int, int], LayerMap] = {}
    ds, dt = sides.source_width, sides.target_width
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "weight": (np.float64, (dt, ds)),
        "bias": (np.float64, (dt,)),
        "held_out.xx": (np.float32, (ds, ds)),
        "held_out.yx": (np.float32, (dt, ds)),
        "held_out.yy": (np.float32, (dt, dt)),
    }
    if version >= 3:
        wanted["quality"] = np.float64, (len(PAIRED),)
    seen: set[tuple[int, int]] = set()
    for number, entry in enumerate(entries):
        name = f"maps[{number}]"
        exact_keys(entry, {"source", "target", "effective_rank"}, name)
        source, target = (whole(entry[side], f"{name}.{side}") for side in ("source", "target"))
        if (source, target) not in sides.pairs or (source, target) in seen:
            raise ArtifactError(f"{name}: {source} → {target} is not a pair of the layers, each once")
        seen.add((source, target))
        start = f"maps.{source}-{target}."
        found = {part: _shaped(tensors, f"{start}{part}", *how) for part, how in wanted.items()}
        if version < 3:
            place = sides.source_layers.index(source), sides.target_layers.index(target)
            found["quality"] = torch.stack([getattr(table, each)[place] for each in PAIRED])
        rank = _rank(entry["effective_rank"], f"{name}.effective_rank", min(ds, dt))
        of_layer = LayerMap.from_tensors(source, rank, found)
        if target in maps:
            others[source, target] = of_layer
        else:
            maps[target] = of_layer
    return maps, others


def _rank(value: Any, name: str, most: int) -> float:
    if not isinstance(value, float) or not 0 <= value <= most + 1e-6:
        raise ArtifactError(f"{name} is not a number from 0 to {most}")
    return value


def _moments(tensors: Tensors, sides: Sides, seed: int) -> JointMoments:
    names = [name for name in tensors if name.startswith("moments.")]
    found: dict[str, torch.Tensor] = {}
    for name in names:
        array = tensors.pop(name)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ArtifactError(f"tensor {name!r} holds NaN or infinity")
        found[name.removeprefix("moments.")] = torch.from_numpy(array)
    return JointMoments.from_tensors(found, sides, seed)


def _shaped(tensors: Tensors, name: str, dtype: Any, shape: tuple[int, ...]) -> torch.Tensor:
    array = take(tensors, name, dtype, len(shape))
    if array.shape != shape:
        raise ArtifactError(f"tensor {name!r} has shape {list(array.shape)}, not {list(shape)}")
    return torch.from_numpy(array)
