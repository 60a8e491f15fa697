"""repeng's control vectors: from GGUF as it writes them, and from pickles, none of which is run."""

from __future__ import annotations

import os
import pickle
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from families import WIDTH, dense
from steersman import import_gguf, import_repeng
from steersman.errors import ArtifactError, PlanError


@dataclass
class ControlVector:
    """repeng's class, by the fields that it has, and its way of writing GGUF."""

    model_type: str
    directions: dict[int, np.ndarray[Any, Any]]

    def export_gguf(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, "controlvector")
        writer.add_string("controlvector.model_hint", self.model_type)
        writer.add_uint32("controlvector.layer_count", len(self.directions))
        for layer, direction in self.directions.items():
            writer.add_tensor(f"direction.{layer}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("repeng.extract")
    module.ControlVector = ControlVector  # type: ignore[attr-defined]
    monkeypatch.setattr(ControlVector, "__module__", "repeng.extract")
    monkeypatch.setitem(sys.modules, "repeng", types.ModuleType("repeng"))
    monkeypatch.setitem(sys.modules, "repeng.extract", module)


def directions(*layers: int) -> dict[int, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return {layer: random.standard_normal(WIDTH).astype(np.float32) for layer in layers}


def pickled(vector: object, path: Path, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(vector, protocol=protocol))
    return path


def test_gguf_as_repeng_writes_it(tmp_path: Path) -> None:
    """Layers in the order of its training, the last first; an index is the layer's own, also 0."""
    given = directions(2, 1)
    file = ControlVector("llama", given).export_gguf(tmp_path / "v.gguf")
    steering = import_repeng(file, dense())
    (edit,) = steering.edits
    assert (edit.layers, edit.scope, edit.strength) == ((1, 2), "all", 1.0)
    assert all(np.array_equal(edit.vectors[layer].numpy(), given[layer]) for layer in given)
    assert steering.fingerprint == import_gguf(file, dense()).fingerprint
    with_0 = ControlVector("llama", directions(0, 1)).export_gguf(tmp_path / "with_0.gguf")
    assert import_repeng(with_0, dense()).edits[0].layers == (0, 1)
    with pytest.raises(ArtifactError, match="--format repeng"):
        import_gguf(with_0, dense())


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles(protocol: int, tmp_path: Path) -> None:
    given = directions(0, 2)
    file = pickled(ControlVector("llama", given), tmp_path / "v.pkl", protocol)
    edit = import_repeng(file, dense(), scope="answer").edits[0]
    assert edit.scope == "answer"
    assert all(np.array_equal(edit.vectors[layer].numpy(), given[layer]) for layer in given)


def test_direction_n_is_the_output_of_decoder_layer_n_from_0(tmp_path: Path) -> None:
    """As its ControlModule does: it wraps layers[n] and adds to what that gives."""
    model, given = dense(), directions(1)
    vector = torch.from_numpy(given[1])
    ids = torch.arange(3, 11)[None]
    hook = model.model.layers[1].register_forward_hook(
        lambda module, args, output: (
            (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
        )
    )
    with torch.no_grad():
        by_hand = model(ids).logits
        hook.remove()
        file = ControlVector("llama", given).export_gguf(tmp_path / "v.gguf")
        with import_repeng(file, model).apply(model):
            assert torch.equal(model(ids).logits, by_hand)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (ControlVector("mistral", directions(1)), "a model of type 'mistral', and this is 'llama'"),
        (ControlVector("llama", {}), "no directions"),
        (ControlVector("llama", {"1": directions(1)[1]}), "layer '1' is no layer's number"),  # type: ignore[dict-item]
        (ControlVector("llama", {1: np.full(WIDTH, 0.1)}), "float32 cannot say exactly"),
        (ControlVector("llama", {1: np.arange(WIDTH)}), "holds int64"),
        (ControlVector("llama", {1: np.ones((2, WIDTH), np.float32)}), r"the shape \[2, 32\]"),
        (ControlVector("llama", {1: np.full(WIDTH, np.nan, np.float32)}), "NaN or infinity"),
        (ControlVector("llama", {1: [1.0]}), "where an array should be"),  # type: ignore[dict-item]
        (ControlVector(3, directions(1)), "its fields are not"),  # type: ignore[arg-type]
        ({"directions": directions(1)}, "where repeng's vector should be"),
        (directions(1), "where repeng's vector should be"),
    ],
)
def test_other_pickles_are_refused(vector: object, message: str, tmp_path: Path) -> None:
    file = pickled(vector, tmp_path / "v.pkl")
    with pytest.raises(ArtifactError, match=message) as caught:
        import_repeng(file, dense())
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_model(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="layer 3 does not exist"):
        import_repeng(pickled(ControlVector("llama", directions(3)), tmp_path / "v.pkl"), dense())


def test_nothing_of_it_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    for value in (Evil(), ControlVector("llama", {1: Evil()})):  # type: ignore[dict-item]
        with pytest.raises(ArtifactError, match=r"nothing of it was run: it names posix\.system"):
            import_repeng(pickled(value, tmp_path / "v.pkl"), dense())
    for content in (b"", b"words", b"\x80\x04", pickle.dumps(ControlVector("llama", directions(1)))[:-9]):
        (tmp_path / "v.pkl").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"v\.pkl: "):
            import_repeng(tmp_path / "v.pkl", dense())
    assert not canary.exists()


def test_gguf_without_a_model_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_tensor("direction.1", directions(1)[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArtifactError, match="says no model type"):
        import_repeng(tmp_path / "v.gguf", dense())
    assert import_gguf(tmp_path / "v.gguf", dense()).edits[0].layers == (1,)
