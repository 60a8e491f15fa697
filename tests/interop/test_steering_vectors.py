"""Saved vectors of the library steering-vectors: every way of saving, hostile files, other layers."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from families import WIDTH, dense
from steersman import import_steering_vectors
from steersman.errors import ArtifactError, PlanError
from steersman.interop.steering_vectors import read_steering_vectors


@dataclass
class SteeringVector:
    """The library's class, by the fields that it has."""

    layer_activations: dict[int, Tensor]
    layer_type: str = "decoder_block"


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's names, for as long as a test writes its files; nothing here reads by them."""
    module = types.ModuleType("steering_vectors.steering_vector")
    module.SteeringVector = SteeringVector  # type: ignore[attr-defined]
    monkeypatch.setattr(SteeringVector, "__module__", "steering_vectors.steering_vector")
    monkeypatch.setitem(sys.modules, "steering_vectors", types.ModuleType("steering_vectors"))
    monkeypatch.setitem(sys.modules, "steering_vectors.steering_vector", module)


def vectors(*layers: int, dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {layer: torch.randn(WIDTH, generator=draws).to(dtype) for layer in layers}


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


WAYS: dict[str, Callable[[dict[int, Tensor]], Any]] = {
    "the object": SteeringVector,
    "its fields": lambda found: {"layer_activations": found, "layer_type": "decoder_block"},
    "its layers": lambda found: found,
    "as an ordinary dict of one field": lambda found: {"layer_activations": found},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_saving_it(way: str, tmp_path: Path) -> None:
    given, model = vectors(0, 2), dense()
    steering = import_steering_vectors(saved(WAYS[way](given), tmp_path / "v.pt"), model)
    (edit,) = steering.edits
    assert (edit.scope, edit.operation, edit.strength, edit.layers) == ("all", "add", 1.0, (0, 2))
    assert all(torch.equal(edit.vectors[layer], given[layer]) for layer in given)
    assert steering.provenance["from"][0]["kind"] == "steering-vectors"


def test_number_n_is_the_output_of_decoder_layer_n_from_0(tmp_path: Path) -> None:
    """As the library adds it: to the output of the n-th of `model.layers.{num}`, at every position."""
    model, vector = dense(), vectors(1)[1]
    steering = import_steering_vectors(saved(SteeringVector({1: vector}), tmp_path / "v.pt"), model)
    ids = torch.arange(3, 11)[None]
    hook = model.model.layers[1].register_forward_hook(
        lambda module, args, output: (
            (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
        )
    )
    with torch.no_grad():
        by_hand = model(ids).logits
        hook.remove()
        with steering.apply(model):
            assert torch.equal(model(ids).logits, by_hand)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_numbers_that_float32_can_say(dtype: torch.dtype, tmp_path: Path) -> None:
    given = {1: vectors(1)[1].to(torch.float16).to(dtype)}
    read = read_steering_vectors(saved(given, tmp_path / "v.pt"))
    assert torch.equal(torch.from_numpy(read[1]), given[1].float())


def test_views_of_one_matrix(tmp_path: Path) -> None:
    matrix = torch.randn(3, WIDTH, 2)
    given = {
        0: matrix[0, :, 0],
        1: matrix[1, :, 1],
        2: matrix[2].T.contiguous()[:1],
        3: torch.ones(1, 1, WIDTH),
    }
    read = read_steering_vectors(saved(given, tmp_path / "v.pt"))
    assert all(read[layer].tolist() == given[layer].flatten().tolist() for layer in given)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (SteeringVector(vectors(1), "mlp"), "layers of type 'mlp'"),
        ({"layer_activations": vectors(1), "alpha": 3}, "field 'alpha' is unknown"),
        ({"01": vectors(1)[1]}, "layer '01' is no layer's number"),
        ({"layers.1": vectors(1)[1]}, "layer 'layers.1' is no layer's number"),
        ({"1": vectors(1)[1], 1: vectors(1)[1]}, "a layer twice"),
        ({-1: vectors(1)[1]}, "layer '-1' is no layer's number"),
        ({}, "no vectors"),
        ({"layer_activations": []}, "no vectors"),
        ([vectors(1)[1], "and a text"], "a list of other things than tensors"),
        ([], "neither a SteeringVector nor"),
        ([1.0] * WIDTH, "a list of other things than tensors"),
        ({1: [1.0] * WIDTH}, "where a tensor should be"),
        ({1: torch.ones(2, WIDTH)}, r"shape \[2, 32\] where a vector should be"),
        ({1: torch.tensor(1.0)}, r"shape \[\] where a vector should be"),
        ({1: torch.ones(0)}, "beyond its 0 numbers"),
        ({1: torch.ones(1).expand(WIDTH)}, "unfolds into far more"),
        ({1: torch.ones(WIDTH, dtype=torch.int64)}, "LongStorage, which no steering vector needs"),
        ({1: torch.full((WIDTH,), 0.1, dtype=torch.float64)}, "float32 cannot say exactly"),
        ({1: torch.full((WIDTH,), torch.nan)}, "NaN or infinity"),
        ({1: torch.full((WIDTH,), 1e300, dtype=torch.float64)}, "float32 cannot say exactly"),
        ({1: torch.zeros(WIDTH)}, "no vector other than zero"),
        ({1: torch.ones(WIDTH).to_sparse()}, "which no steering vector needs"),
        (torch.nn.Linear(2, 2), "which no steering vector needs"),
    ],
)
def test_other_contents_are_refused(value: Any, message: str, tmp_path: Path) -> None:
    file = saved(value, tmp_path / "v.pt")
    with pytest.raises(ArtifactError, match=message) as caught:
        import_steering_vectors(file, dense())
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_model(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="layer 9 does not exist"):
        import_steering_vectors(saved(vectors(9), tmp_path / "v.pt"), dense())
    with pytest.raises(PlanError, match="has 8 numbers, but the model's width is 32"):
        import_steering_vectors(saved({1: torch.ones(8)}, tmp_path / "v.pt"), dense())


# Hostile files


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def test_nothing_of_it_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for value in (Evil(canary), {1: Evil(canary)}, {1: torch.ones(WIDTH), "x": Evil(canary)}):
        with pytest.raises(ArtifactError, match=r"nothing of it was run: it names posix\.system"):
            read_steering_vectors(saved(value, tmp_path / "v.pt"))
    with pytest.raises(ArtifactError):  # a tensor pickled alone brings bytes that torch.load would open
        read_steering_vectors(_written(tmp_path / "v.pt", pickle.dumps(SteeringVector(vectors(1)))))
    assert not canary.exists()


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def repacked(change: Callable[[dict[str, bytes]], Any], path: Path, compression: int = 0) -> Path:
    """A right file, with other members."""
    buffer = io.BytesIO()
    torch.save(vectors(1), buffer)
    with zipfile.ZipFile(buffer) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members = change(members) or members
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def swap(**changes: bytes | None) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Members by the end of their names, replaced or taken away."""

    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        new = {
            name: next((changes[key] for key in changes if name.endswith(key.replace("_", "."))), content)
            for name, content in members.items()
        }
        return {name: content for name, content in new.items() if content is not None}

    return change


def tampered(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        (name,) = (name for name in members if name.endswith("data.pkl"))
        assert members[name].count(old) == 1
        return {**members, name: members[name].replace(old, new)}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap(data_pkl=None), "without the one data.pkl"),
        (lambda members: {**members, "other/data.pkl": b""}, "without the one data.pkl"),
        (swap(byteorder=b"big"), "not little-endian"),
        (swap(data_pkl=b""), "damaged"),
        (swap(data_pkl=b"\x80\x02N."), "neither a SteeringVector"),
        (lambda members: {n: c for n, c in members.items() if "/data/" not in n}, "not in the archive"),
        (
            lambda members: {n: c[:-4] if "/data/" in n else c for n, c in members.items()},
            "tensor of 32 numbers that has 124 bytes",
        ),
        # 32, the count and the shape, as BININT1: K and the number.
        (tampered(b"K\x20\x85", b"K\x21\x85"), r"shape \[33\] that ends beyond its 32 numbers"),
        (tampered(b"QK\x00K\x20\x85", b"QK\x01K\x20\x85"), "ends beyond its 32 numbers"),
        (tampered(b"cpu", b"cpu"), None),
    ],
    ids=[
        *("no pickle", "two pickles", "big-endian", "empty pickle", "nothing", "no numbers", "few numbers"),
        *("longer than its numbers", "offset", "unchanged"),
    ],
)
def test_tampered_archives(
    change: Callable[[dict[str, bytes]], Any], message: str | None, tmp_path: Path
) -> None:
    file = repacked(change, tmp_path / "v.pt")
    if message is None:
        assert list(read_steering_vectors(file)) == [1]
    else:
        with pytest.raises(ArtifactError, match=message):
            read_steering_vectors(file)


def test_compressed_archives_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="compressed archive"):
        read_steering_vectors(repacked(lambda members: members, tmp_path / "v.pt", zipfile.ZIP_DEFLATED))
    content = repacked(lambda members: members, tmp_path / "v.pt").read_bytes()
    for end in (4, 100, len(content) // 2, len(content) - 1):
        with pytest.raises(ArtifactError, match=r"v\.pt: "):
            read_steering_vectors(_written(tmp_path / "v.pt", content[:end]))
    with pytest.raises(ArtifactError, match="no zip archive"):
        read_steering_vectors(_written(tmp_path / "v.pt", b"words"))
    torch.save(vectors(1), tmp_path / "v.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ArtifactError, match="no zip archive"):
        read_steering_vectors(tmp_path / "v.pt")


def test_many_views_of_one_storage_do_not_unfold(tmp_path: Path) -> None:
    """4 MB that would become 1 GB."""
    whole = torch.ones(1 << 20)
    file = saved({layer: whole[layer:] for layer in range(256)}, tmp_path / "v.pt")
    assert file.stat().st_size < 5 << 20
    with pytest.raises(ArtifactError, match="unfolds into far more than it holds"):
        read_steering_vectors(file)


def test_an_ordered_dict_is_no_dict_of_vectors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a plain dictionary"):
        read_steering_vectors(saved(collections.OrderedDict(vectors(1)), tmp_path / "v.pt"))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_changed_byte_is_refused_or_harmless(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    torch.save(vectors(1), buffer)
    content = bytearray(buffer.getvalue())
    # Most of the file is padding and numbers: half of the changes are in the pickle or the directory.
    place = data.draw(st.one_of(st.integers(0, 500), st.integers(len(content) - 700, len(content) - 1)))
    content[place] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ArtifactError):
        read = read_steering_vectors(_written(Path(folder) / "v.pt", bytes(content)))
        assert all(vector.nbytes <= len(content) for vector in read.values())


# ------------------------------------------------------------ bare tensors, which say no layers

BARE: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda rows: rows[0],
    "a row": lambda rows: rows[:1],
    "a parameter": lambda rows: torch.nn.Parameter(rows[0]),
    "an array": lambda rows: rows[0].numpy(),
    "an array with a row": lambda rows: rows[:1].numpy(),
    "a list of one": lambda rows: [rows[0]],
}
MATRICES: dict[str, Callable[[Tensor], Any]] = {
    "a matrix": lambda rows: rows,
    "a transposed matrix": lambda rows: rows.T.contiguous().T,
    "a list": lambda rows: list(rows),
    "a tuple of arrays": lambda rows: tuple(rows.numpy()),
    "a matrix of arrays": lambda rows: rows.numpy(),
}


def rows(count: int) -> Tensor:
    return torch.stack(list(vectors(*range(count)).values()))


@pytest.mark.parametrize("way", BARE)
def test_one_bare_vector_goes_where_the_importer_says(way: str, tmp_path: Path) -> None:
    file = saved(BARE[way](rows(2)), tmp_path / "v.pt")
    with pytest.raises(
        ArtifactError, match=r"v\.pt: holds a vector and does not say of which layers.*--layers"
    ):
        import_steering_vectors(file, dense())
    for layers in ([1], [0, 2]):
        (edit,) = import_steering_vectors(file, dense(), layers=layers).edits
        assert edit.layers == tuple(layers)
        assert all(torch.equal(edit.vectors[layer], rows(2)[0]) for layer in layers)


@pytest.mark.parametrize("way", MATRICES)
def test_several_bare_vectors_go_in_order(way: str, tmp_path: Path) -> None:
    file = saved(MATRICES[way](rows(2)), tmp_path / "v.pt")
    (edit,) = import_steering_vectors(file, dense(), layers=[2, 0]).edits
    assert torch.equal(edit.vectors[2], rows(2)[0])
    assert torch.equal(edit.vectors[0], rows(2)[1])
    for layers in ([0], [0, 1, 2]):
        with pytest.raises(ArtifactError, match=f"2 vectors, and --layers names {len(layers)} layers?$"):
            import_steering_vectors(file, dense(), layers=layers)
    with pytest.raises(ArtifactError, match="names a layer twice"):
        import_steering_vectors(file, dense(), layers=[1, 1])
    for wrong in (True, np.True_, 1.0, "1"):
        with pytest.raises(ArtifactError, match="is no layer's number"):
            import_steering_vectors(file, dense(), layers=[wrong, 2])
    assert import_steering_vectors(file, dense(), layers=np.array([0, 2])).edits[0].layers == (0, 2)


def test_a_file_that_says_its_layers_is_not_told_others(tmp_path: Path) -> None:
    file = saved({"1": torch.nn.Parameter(vectors(1)[1])}, tmp_path / "v.pt")  # as text of digits, too
    assert import_steering_vectors(file, dense()).edits[0].layers == (1,)
    with pytest.raises(ArtifactError, match="says itself which layers it is for"):
        import_steering_vectors(file, dense(), layers=[2])
