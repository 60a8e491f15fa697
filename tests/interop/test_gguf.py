"""GGUF control vectors: both ways to the bit, with the gguf package as the other side; hostile files."""

from __future__ import annotations

import contextlib
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from families import WIDTH, dense, shared
from steersman import ResidualEdit, Steering, export_gguf, import_gguf
from steersman.errors import ArtifactError, PlanError
from steersman.interop.gguf import parse_gguf, written
from steersman.steering import ExpertEdit

HERE = Path("vector.gguf")


def vectors(*layers: int, seed: int = 0) -> dict[int, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(WIDTH, generator=draws) for layer in layers}


def plan(*edits: ResidualEdit | ExpertEdit) -> Steering:
    base = Steering.from_vectors(shared("olmoe"), vectors(1), scope="all")
    return Steering(edits, base.architecture, base.weights_id)


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    given, file = vectors(1, 2), tmp_path / "vector.gguf"
    export_gguf(plan(ResidualEdit(given, 1.75, "all")), file)
    reader = GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items() if "." in key[5:]}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "olmoe"
    assert fields["controlvector.layer_count"] == 2
    read = {tensor.name: tensor.data for tensor in reader.tensors}
    assert list(read) == ["direction.1", "direction.2"]
    for layer, vector in given.items():
        assert read[f"direction.{layer}"].dtype == np.float32
        assert torch.equal(torch.from_numpy(read[f"direction.{layer}"].copy()), vector * 1.75)


def test_there_and_back_is_the_same_plan(tmp_path: Path) -> None:
    model, file = dense(), tmp_path / "vector.gguf"
    steering = Steering.from_vectors(model, vectors(1, 2), scope="all")
    export_gguf(steering, file)
    back = import_gguf(file, model)
    assert back.fingerprint == steering.fingerprint
    assert back.provenance["from"][0]["kind"] == "gguf"
    export_gguf(back, again := tmp_path / "again.gguf")
    assert again.read_bytes() == file.read_bytes()
    assert import_gguf(file, model, scope="answer").edits[0].scope == "answer"


def test_a_strength_is_multiplied_in(tmp_path: Path) -> None:
    """The file at scale 1 does what the plan does: the same logits, to the bit."""
    model, file = dense(), tmp_path / "vector.gguf"
    steering = Steering.from_vectors(model, vectors(1), strength=-0.3, scope="all")
    export_gguf(steering, file)
    back = import_gguf(file, model)
    expected = vectors(1)[1] * -0.3
    assert torch.equal(back.edits[0].vectors[1], expected)
    assert back.edits[0].strength == 1


def test_direction_n_is_added_to_the_output_of_layer_n_from_0(tmp_path: Path) -> None:
    """As llama.cpp's build_cvec(cur, il) does: by a hook of our own on decoder layer 1."""
    model, vector = dense(), vectors(1)[1]
    (tmp_path / "v.gguf").write_bytes(written({1: vector.numpy()}, "llama"))
    ids = torch.arange(3, 11)[None]
    hook = model.model.layers[1].register_forward_hook(
        lambda module, args, output: (
            (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
        )
    )
    with torch.no_grad():
        by_hand = model(ids).logits
        hook.remove()
        with import_gguf(tmp_path / "v.gguf", model).apply(model):
            steered = model(ids).logits
        plain = model(ids).logits
    assert torch.equal(steered, by_hand)
    assert not torch.equal(steered, plain)


def test_edits_at_one_layer_are_summed(tmp_path: Path) -> None:
    first, second = vectors(1, 2), vectors(1, seed=1)
    file = tmp_path / "vector.gguf"
    export_gguf(
        plan(ResidualEdit(first, 2, "all"), ResidualEdit(second, 0.5, "all"), ResidualEdit(vectors(2), 0)),
        file,
    )
    found = parse_gguf(file.read_bytes(), file).directions
    assert torch.equal(torch.from_numpy(found[1]), first[1] * 2 + second[1] * 0.5)
    assert torch.equal(torch.from_numpy(found[2]), first[2] * 2)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([ResidualEdit(vectors(0), 1, "all")], "no vector for layer 0"),
        ([ResidualEdit(vectors(1), 1, "all", "project")], "projects one out of layer 1"),
        ([ResidualEdit(vectors(1), 1, "answer")], "the steering's is 'answer', not 'all'"),
        ([ResidualEdit(vectors(1), 1, "all"), ResidualEdit(vectors(2), 1, "prompt")], "'prompt'"),
        ([ResidualEdit(vectors(1), 1, "all"), ExpertEdit({1: {3: 1.0}})], "names expert 3 of layer 1"),
        ([ResidualEdit(vectors(1), 0, "all")], "changes nothing"),
        ([ResidualEdit(vectors(1), 1, "all"), ResidualEdit(vectors(1), -1, "all")], "add up to nothing"),
        (
            [ResidualEdit({1: torch.full((WIDTH,), 3e38)}, 1, "all") for _ in range(2)],
            "add up to more than float32",
        ),
    ],
    ids=["layer 0", "project", "scope", "one scope of two", "experts", "zero", "cancelled", "overflow"],
)
def test_what_cannot_be_said_is_refused(edits: list[Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "vector.gguf"
    with pytest.raises(ArtifactError, match=message):
        export_gguf(plan(*edits), file)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    (file := tmp_path / "vector.gguf").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="already there"):
        export_gguf(plan(ResidualEdit(vectors(1), 1, "all")), file)
    assert file.read_bytes() == b"mine"
    export_gguf(plan(ResidualEdit(vectors(1), 1, "all")), file, force=True)
    assert file.read_bytes()[:4] == b"GGUF"


# Files of others


def made(path: Path, fill: Callable[[GGUFWriter], object], architecture: str = "controlvector") -> Path:
    """A file by the gguf package, as other tools write theirs."""
    writer = GGUFWriter(path, architecture)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_llama_cpps_own_generator(tmp_path: Path) -> None:
    """Its layer count is signed; descriptions and another alignment are allowed."""

    def fill(writer: GGUFWriter) -> None:
        writer.add_string("controlvector.model_hint", "llama")
        writer.add_int32("controlvector.layer_count", 2)
        writer.add_custom_alignment(64)
        writer.add_name("mine")
        for layer, vector in vectors(1, 2).items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())

    steering = import_gguf(made(tmp_path / "v.gguf", fill), dense())
    assert steering.edits[0].layers == (1, 2)
    assert torch.equal(steering.edits[0].vectors[2], vectors(1, 2)[2])


def test_zeros_add_nothing_and_are_left_out(tmp_path: Path) -> None:
    zero, one = np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32)
    (tmp_path / "v").write_bytes(written({1: zero, 2: one}, "llama"))
    assert import_gguf(tmp_path / "v", dense()).edits[0].layers == (2,)
    (tmp_path / "v").write_bytes(written({1: zero}, "llama"))
    with pytest.raises(ArtifactError, match="no vector other than zero"):
        import_gguf(tmp_path / "v", dense())


@pytest.mark.parametrize(
    ("fill", "architecture", "message"),
    [
        (lambda w: w.add_tensor("direction.1", np.ones(WIDTH, np.float32)), "llama", "GGUF file of 'llama'"),
        (lambda w: w.add_tensor("direction.0", np.ones(WIDTH, np.float32)), None, "no vector for layer 0"),
        (
            lambda w: w.add_tensor("direction.01", np.ones(WIDTH, np.float32)),
            None,
            "'direction.01' is unknown",
        ),
        (
            lambda w: w.add_tensor("direction.-1", np.ones(WIDTH, np.float32)),
            None,
            "'direction.-1' is unknown",
        ),
        (lambda w: w.add_tensor("bias.1", np.ones(WIDTH, np.float32)), None, "'bias.1' is unknown"),
        (lambda w: w.add_tensor("direction.1", np.ones(WIDTH, np.float16)), None, "type F16: right is F32"),
        (lambda w: w.add_tensor("direction.1", np.ones((2, 16), np.float32)), None, r"shape \[16, 2\]"),
        (lambda w: w.add_tensor("direction.1", np.full(WIDTH, np.nan, np.float32)), None, "NaN or infinity"),
        (lambda w: w.add_tensor("direction.1", np.full(WIDTH, np.inf, np.float32)), None, "NaN or infinity"),
        (lambda w: None, None, "claims 0 tensors"),
    ],
)
def test_other_files_are_refused(
    fill: Callable[[GGUFWriter], object], architecture: str | None, message: str, tmp_path: Path
) -> None:
    file = made(tmp_path / "v.gguf", fill, architecture or "controlvector")
    with pytest.raises(ArtifactError, match=message) as caught:
        import_gguf(file, dense())
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("say", "message"),
    [
        (lambda w: w.add_string("glp.mode", "project"), "'glp.mode' is unknown"),
        (lambda w: w.add_bool("controlvector.normalize", True), "'controlvector.normalize' is unknown"),
        (lambda w: w.add_array("general.tags", ["a", "b"]), "'general.tags' is an array"),
        (lambda w: w.add_uint32("controlvector.model_hint", 3), "model_hint is not text"),
        (lambda w: w.add_string("controlvector.layer_count", "3"), "layer_count is not a whole number"),
    ],
)
def test_metadata_that_may_mean_something_else(
    say: Callable[[GGUFWriter], object], message: str, tmp_path: Path
) -> None:
    def fill(writer: GGUFWriter) -> None:
        say(writer)
        writer.add_tensor("direction.1", np.ones(WIDTH, np.float32))

    with pytest.raises(ArtifactError, match=message):
        import_gguf(made(tmp_path / "v.gguf", fill), dense())


def test_another_model(tmp_path: Path) -> None:
    (file := tmp_path / "v").write_bytes(written({1: np.ones(8, np.float32)}, "llama"))
    with pytest.raises(PlanError, match="has 8 numbers, but the model's width is 32"):
        import_gguf(file, dense())
    file.write_bytes(written({7: np.ones(WIDTH, np.float32)}, "llama"))
    with pytest.raises(PlanError, match="layer 7 does not exist"):
        import_gguf(file, dense())


# Hostile files


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = entry("general.architecture", 8, text("controlvector"))
NUMBERS = np.ones(WIDTH, "<f4").tobytes()


def tensor(
    name: str = "direction.1", dims: tuple[int, ...] = (WIDTH,), kind: int = 0, offset: int = 0
) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = NUMBERS,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    entries = [ARCHITECTURE] if entries is None else entries
    tensors = [tensor()] if tensors is None else tensors
    counts = counts or (len(tensors), len(entries))
    head = struct.pack("<4sIQQ", b"GGUF", version, *counts) + b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def test_the_hand_made_file_is_right() -> None:
    """What is changed below is what the refusals are about."""
    assert parse_gguf(file_of(), HERE).directions[1].tolist() == [1.0] * WIDTH


HUGE = 1 << 62
HOSTILE = {
    "no magic": b"GGML" + file_of()[4:],
    "only magic": b"GGUF",
    "version 1": file_of(version=1),
    "version of the future": file_of(version=4),
    "big-endian": file_of(version=3 << 24),
    "huge count of entries": file_of(counts=(1, HUGE)),
    "huge count of tensors": file_of(counts=(HUGE, 1)),
    "more tensors than there are": file_of(counts=(9, 1)),
    "more entries than there are": file_of(counts=(1, 9)),
    "huge text": file_of([struct.pack("<Q", HUGE)]),
    "huge array of nothing": file_of([ARCHITECTURE, entry("a", 9, struct.pack("<IQ", 0, HUGE))]),
    "array in an array": file_of([ARCHITECTURE, entry("a", 9, struct.pack("<IQIQ", 9, HUGE, 9, HUGE))]),
    "unknown type of entry": file_of([ARCHITECTURE, entry("a", 77, b"")]),
    "key twice": file_of([ARCHITECTURE, ARCHITECTURE]),
    "key that is no text": file_of([ARCHITECTURE, text(b"\xff\xfe") + struct.pack("<II", 4, 1)]),
    "no architecture": file_of([]),
    "architecture that is no text": file_of([entry("general.architecture", 4, struct.pack("<I", 3))]),
    "alignment 0": file_of([ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 0))]),
    "alignment 3": file_of([ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 3))]),
    "alignment that is text": file_of([ARCHITECTURE, entry("general.alignment", 8, text("x"))]),
    "alignment beyond the end": file_of(
        [ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 1 << 31))]
    ),
    "tensor without dimensions": file_of(tensors=[tensor(dims=())]),
    "tensor of no numbers": file_of(tensors=[tensor(dims=(0,))]),
    "tensor of five dimensions": file_of(tensors=[tensor(dims=(WIDTH, 1, 1, 1, 1))]),
    "huge dimension": file_of(tensors=[tensor(dims=(HUGE,))]),
    "dimensions that overflow": file_of(tensors=[tensor(dims=(1 << 33, 1 << 33))]),
    "overflow to the right size": file_of(tensors=[tensor(dims=(WIDTH, (1 << 63) + 1, 2))]),
    "huge count of dimensions": file_of(tensors=[text("direction.1") + struct.pack("<I", 0xFFFFFFFF)]),
    "unknown type of tensor": file_of(tensors=[tensor(kind=99)]),
    "quantised": file_of(tensors=[tensor(kind=8)]),
    "offset beyond the end": file_of(tensors=[tensor(offset=1 << 20)]),
    "offset past the last numbers": file_of(tensors=[tensor(offset=32)]),
    "offset that overflows": file_of(tensors=[tensor(offset=(1 << 64) - 64)]),
    "same tensor twice": file_of(tensors=[tensor(), tensor()]),
    "no data": file_of(data=b""),
    "cut off in the data": file_of()[:-1],
    "cut off in a tensor": file_of(data=b"")[:-40],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name: str) -> None:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError) as caught:
        parse_gguf(HOSTILE[name], HERE)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert str(caught.value).startswith("vector.gguf: ")
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(file_of()) - 1), st.integers(0, 255), st.booleans())
def test_any_changed_byte_is_refused_or_harmless(place: int, byte: int, cut: bool) -> None:
    content = bytearray(file_of())
    content[place] = byte
    with contextlib.suppress(ArtifactError):
        found = parse_gguf(bytes(content[:place] if cut else content), HERE)
        assert all(vector.ndim == 1 and vector.nbytes <= len(NUMBERS) for vector in found.directions.values())
