"""Affine maps on disk: read again as they were, and refused in one line when anything was changed."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concepts.mapped import big, small, texts
from steersman import AffineMap, Architecture, ArtifactError, fit_affine_map
from steersman.concepts.affine_map import LayerMap
from test_artifacts import OTHERS, at, opened, paths_in, refused, seal

KINDS = ("whole", "part")
OF_PARTS = ("rows", "maps", "layers", "pairs", "seed", "shard")
"""What is read in another way where a map is a part; the rest is as in a whole."""


@functools.cache
def example(kind: str) -> AffineMap:
    return fit_affine_map(small(), big(), texts(70), shard="1/2" if kind == "part" else None)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, kind: str) -> Path:
    example(kind).save_pretrained(tmp_path / "map")
    return tmp_path / "map"


def assert_same_maps(one: LayerMap, other: LayerMap) -> None:
    for name in ("weight", "bias"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    for name in ("xx", "yx", "yy"):
        assert torch.equal(getattr(one.held_out, name), getattr(other.held_out, name))
    for name in ("source_layer", "r2", "r2_control", "control_sd", "ridge", "effective_rank"):
        assert getattr(one, name) == getattr(other, name)


def test_what_is_saved_is_read_again(kind: str, folder: Path, tmp_path: Path) -> None:
    saved, found = example(kind), AffineMap.from_pretrained(folder)
    for name in ("source", "target", "rows", "texts", "held_out_rows", "held_out_texts", "skipped"):
        assert getattr(found, name) == getattr(saved, name)
    assert (found.alignment, found.seed, found.shard) == (saved.alignment, saved.seed, saved.shard)
    assert [dict(source) for source in found.made_from] == [dict(source) for source in saved.made_from]
    assert found.norms == saved.norms
    assert found.layers == saved.layers
    for layer in found.layers:
        assert_same_maps(found.maps[layer], saved.maps[layer])
    if kind == "part":
        assert found.moments is not None
        assert saved.moments is not None
        mine, theirs = found.moments.to_tensors(), saved.moments.to_tensors()
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    else:
        assert found.table is not None
        share = saved.share_explained(0, torch.ones(16))
        assert found.share_explained(0, torch.ones(16)) == pytest.approx(share, rel=1e-9)
    found.save_pretrained(tmp_path / "again")
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def allowed(path: tuple[Any, ...], value: Any) -> bool:
    """Whether a place may hold this: what is for people to read, or a count that could have been so."""
    if value != value or value == "\ud800":
        return False
    if path[0] == "made_from":
        return (
            len(path) > 3 or (len(path) == 3 and isinstance(value, dict)) or (len(path) == 2 and value == [])
        )
    if path[0] == "evidence":
        return value == []
    if path[-1] == "all":
        return type(value) is int and value > 100
    if path[-1] in ("seed", "skipped", "shared_experts"):
        return type(value) is int and value >= 0
    if path[-1] == "effective_rank":
        return type(value) is float and 0 <= value <= 16
    if path[-1] == "held_out":
        return type(value) is int and 0 <= value <= 2
    if path[-1] == "table_rows":
        return value is None or (type(value) is int and 1 <= value <= 100)
    if path[-1] == "chat":
        return value is None
    if "chat" in path and path[-1] == "arguments":
        return isinstance(value, dict)
    if path[-1] in ("reason", "revision"):
        return value is None or isinstance(value, str)
    return path[-1] in ("name", "tool_version", "weights_id") and isinstance(value, str)


def test_every_value_of_the_manifest_is_checked(kind: str, folder: Path) -> None:
    manifest, _ = opened(folder)
    wrong = []
    for path in paths_in(manifest):
        if path[-1] == "manifest_sha256" or (kind == "part" and path[0] not in OF_PARTS):
            continue
        present = at(manifest, path)
        for value in OTHERS:
            if type(value) is type(present) and value == present:
                continue
            changed = copy.deepcopy(manifest)
            at(changed, path[:-1])[path[-1]] = value
            seal(folder, changed)
            try:
                AffineMap.from_pretrained(folder)
            except ArtifactError as error:
                if "\n" in str(error) or not str(error).startswith(str(folder)):
                    wrong.append((path, value, str(error)))
            else:
                if not allowed(path, value):
                    wrong.append((path, value, "accepted"))
    assert wrong == [], wrong[:5]


def test_every_key_is_needed_and_no_other_is_taken(kind: str, folder: Path) -> None:
    manifest, tensors = opened(folder)
    for path in paths_in(manifest):
        if path[0] in ("made_from", "evidence") and len(path) > 1:
            continue
        changed = copy.deepcopy(manifest)
        del at(changed, path[:-1])[path[-1]]
        seal(folder, changed)
        if path[-1] != "manifest_sha256":
            refused(AffineMap.from_pretrained, folder)
        if isinstance(at(manifest, path), dict) and path[-1] != "arguments":  # names of a template's own
            changed = copy.deepcopy(manifest)
            at(changed, path)["extra"] = 1
            seal(folder, changed)
            refused(AffineMap.from_pretrained, folder, "extra")
    seal(folder, manifest, {**tensors, "extra": np.zeros(1)})
    refused(AffineMap.from_pretrained, folder, "extra" if kind == "whole" else "unknown tensor")


def test_every_tensor_is_checked(kind: str, folder: Path) -> None:
    manifest, tensors = opened(folder)
    for name, array in tensors.items():
        changes = [array[..., :-1] if array.ndim else array, array.astype(np.int32), array[None]]
        if array.dtype.kind == "f" and array.size:
            changes += [np.full_like(array, np.nan), np.full_like(array, np.inf)]
        elif array.size:
            changes.append(np.full_like(array, -1))
        for changed in changes:
            seal(folder, dict(manifest), {**tensors, name: changed})
            refused(AffineMap.from_pretrained, folder)
        seal(folder, dict(manifest), {other: kept for other, kept in tensors.items() if other != name})
        refused(AffineMap.from_pretrained, folder)


def test_a_part_is_no_whole_and_the_other_way(tmp_path: Path) -> None:
    example("whole").save_pretrained(tmp_path / "whole")
    manifest, _ = opened(tmp_path / "whole")
    seal(tmp_path / "whole", {**manifest, "shard": "1/2"})
    refused(AffineMap.from_pretrained, tmp_path / "whole", "pairs does not name pairs of layers")
    seal(tmp_path / "whole", {**manifest, "shard": "1/2", "pairs": [[0, 0]]})
    refused(AffineMap.from_pretrained, tmp_path / "whole", "tensors of moments are missing")
    seal(tmp_path / "whole", {**manifest, "shard": "3/2"})
    refused(AffineMap.from_pretrained, tmp_path / "whole", "right is I/N")


@pytest.mark.parametrize("side", ["source", None])
def test_widths_that_no_tensor_has_are_refused_before_memory_is_asked_for(
    side: str | None, tmp_path: Path
) -> None:
    fit_affine_map(small(), big(), texts(60), shard="1/2", batch_size=4).save_pretrained(tmp_path / "p")
    manifest, _ = opened(tmp_path / "p")
    facts = manifest if side is None else manifest[side]
    facts["architecture"]["hidden_size"] = 10**8
    layers = tuple(None for _ in facts["architecture"]["layers"])
    facts["model"]["architecture_id"] = Architecture("llama", 10**8, layers).id
    seal(tmp_path / "p", manifest)
    refused(AffineMap.from_pretrained, tmp_path / "p", "is torch.float64")
