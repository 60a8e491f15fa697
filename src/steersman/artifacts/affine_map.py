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
from steersman.concepts.affine_map import AffineMap, LayerMap, MappedModel, MapTable
from steersman.concepts.joint_moments import JointMoments, Sides
from steersman.concepts.norms import NormHistogram
from steersman.concepts.regression import HeldOut
from steersman.errors import ArtifactError, PairsError
from steersman.shards import Shard

_KEYS = {"source", "rows", "texts", "skipped", "alignment", "layers", "maps", "seed", "shard"}
MAP = register("affine_map", "an affine map", {1: _KEYS, 2: _KEYS}, chats=2)
_TABLES = ("r2", "r2_control", "control_sd", "ridge")
_OF_SOURCES = ("source_rank", "condition")
_OF_MAP = ("weight", "bias")
_HELD_OUT = ("xx", "yx", "yy")


def save_affine_map(of: AffineMap, folder: str | Path, *, force: bool = False) -> None:
    """Write an affine map. Raises `ArtifactError` as `save_steering` does."""
    tensors: Tensors = {f"norms.{layer}": norms.to_tensor().numpy() for layer, norms in of.norms.items()}
    for layer, of_layer in of.maps.items():
        start = f"maps.{of_layer.source_layer}-{layer}."
        tensors |= {f"{start}{name}": getattr(of_layer, name).numpy() for name in _OF_MAP}
        tensors |= {f"{start}held_out.{name}": getattr(of_layer.held_out, name).numpy() for name in _HELD_OUT}
    if of.table is not None:
        names = (*_TABLES, *_OF_SOURCES)
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
        "maps": [
            {
                "source": of_layer.source_layer,
                "target": layer,
                "effective_rank": of_layer.effective_rank,
            }
            for layer, of_layer in of.maps.items()
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
        if shard is None:
            table = _table(tensors, sides)
            maps = _maps(manifest["maps"], tensors, sides, table)
        else:
            moments = _moments(tensors, sides, seed)
            if manifest["maps"] != []:
                raise ArtifactError("a part that is to be merged has maps already")
        nothing_left(tensors)
        rows, texts = (_counts(manifest[name], name) for name in ("rows", "texts"))
        if moments is not None and rows != (sum(part.rows for part in moments.parts), moments.parts[1].rows):
            raise ArtifactError("rows: they are not those of the moments")
        return AffineMap(
            maps=maps,
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
            made_from=tuple(mapping(entry, "made_from.from") for entry in made_from["from"]),
            seed=seed,
            moments=moments,
            shard=shard,
        )


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


def _table(tensors: Tensors, sides: Sides) -> MapTable:
    pairs = len(sides.source_layers), len(sides.target_layers)
    found: dict[str, torch.Tensor] = {}
    for names, shape in ((_TABLES, pairs), (_OF_SOURCES, pairs[:1])):
        for name in names:
            found[name] = _shaped(tensors, f"table.{name}", np.float64, shape)
    return MapTable(sides.source_layers, sides.target_layers, **found)


def _maps(entries: Any, tensors: Tensors, sides: Sides, table: MapTable) -> dict[int, LayerMap]:
    if not isinstance(entries, list):
        raise ArtifactError("maps is not a list")
    maps: dict[int, LayerMap] = {}
    ds, dt = sides.source_width, sides.target_width
    shapes = {"xx": (ds, ds), "yx": (dt, ds), "yy": (dt, dt)}
    for number, entry in enumerate(entries):
        name = f"maps[{number}]"
        exact_keys(entry, {"source", "target", "effective_rank"}, name)
        source, target = (whole(entry[side], f"{name}.{side}") for side in ("source", "target"))
        if source not in sides.source_layers or target not in sides.target_layers or target in maps:
            raise ArtifactError(f"{name}: {source} → {target} is not a pair of the layers, each target once")
        row, column = sides.source_layers.index(source), sides.target_layers.index(target)
        start = f"maps.{source}-{target}."
        held_out = {
            part: _shaped(tensors, f"{start}held_out.{part}", np.float32, shape)
            for part, shape in shapes.items()
        }
        maps[target] = LayerMap(
            source_layer=source,
            weight=_shaped(tensors, f"{start}weight", np.float64, (dt, ds)),
            bias=_shaped(tensors, f"{start}bias", np.float64, (dt,)),
            held_out=HeldOut(**held_out),
            effective_rank=_rank(entry["effective_rank"], f"{name}.effective_rank", min(ds, dt)),
            **{name: float(getattr(table, name)[row, column]) for name in _TABLES},
        )
    return maps


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
