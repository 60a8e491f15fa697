"""Opening models by name: folders, the Hub while offline, the lab; what cannot be opened is one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import families as f
from steersman import ModelError, Steering, load_model, read_architecture, weights_id
from steersman.models.identity import model_name
from steersman.models.loading import load_structure


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, with its tokenizer."""
    folder = tmp_path_factory.mktemp("loading") / "checkpoint"
    f.tiny("olmoe", dtype=torch.bfloat16).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1, "no": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def refused(words: str, name: str | Path, **options: Any) -> None:
    with pytest.raises(ModelError, match=words) as raised:
        load_model(str(name), **options)
    line = str(raised.value)
    assert "\n" not in line
    assert len(line) < len(str(name)) + 500


# Folders ----------------------------------------------------------------------------------------------------


def test_a_folder_is_opened_in_evaluation_mode(checkpoint: Path) -> None:
    model, tokenizer = load_model(str(checkpoint))
    assert not any(module.training for module in model.modules())
    assert model.config.model_type == "olmoe"
    assert tokenizer("yes no")["input_ids"] == [1, 2]
    expected = f.tiny("olmoe", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in model.state_dict().items())


def test_a_relative_folder_is_opened(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    for name in ("checkpoint", "./checkpoint", "checkpoint/"):
        assert load_model(name)[0].config.model_type == "olmoe"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.bfloat16),
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        (torch.float32, torch.float32),
    ],
)
def test_dtypes(checkpoint: Path, dtype: Any, expected: torch.dtype) -> None:
    model, _ = load_model(str(checkpoint), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert weights_id(model) == weights_id(load_model(str(checkpoint))[0])


def test_devices(checkpoint: Path) -> None:
    model, _ = load_model(str(checkpoint), device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_auto_places_the_model(checkpoint: Path) -> None:
    pytest.importorskip("accelerate")
    model, _ = load_model(str(checkpoint), device="auto")
    model(input_ids=torch.tensor([[1, 2]], device=model.device))


@pytest.mark.parametrize("dtype", ["float8", "int8", "fp32", "", "torch.float32"])
def test_unknown_dtypes_list_the_known(checkpoint: Path, dtype: str) -> None:
    refused(
        f"dtype '{dtype}' is unknown: use one of auto, float32, float16, bfloat16", checkpoint, dtype=dtype
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.complex64])
def test_dtypes_that_are_no_floats_are_refused(checkpoint: Path, dtype: torch.dtype) -> None:
    refused("dtype", checkpoint, dtype=dtype)
    refused("dtype", "lab:moe", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu:x", "warp", "meta"])
@pytest.mark.parametrize("name", ["folder", "lab:moe"])
def test_devices_that_are_not_there(checkpoint: Path, name: str, device: str) -> None:
    refused("device", checkpoint if name == "folder" else name, device=device)


# What cannot be opened --------------------------------------------------------------------------------------


def test_a_folder_with_a_gguf_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    refused(f"^{tmp_path}: a folder with a GGUF file; name that too: {tmp_path}#small.gguf$", str(tmp_path))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    refused(f"^{name}: no such folder$", name)


@pytest.mark.parametrize(
    "name", ["nobody/nothing", "nothing-of-that-name", "two words", "a\\b", "", " ", "x" * 300]
)
def test_a_hub_name_while_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(".", name)
    refused(".", name, revision="main")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(str(tmp_path), tmp_path)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(str(tmp_path), tmp_path / "model.safetensors")


class Bomb:
    """Unpickling it would leave a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["BOMB_MARK"],))


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_is_never_read(copy: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setenv("BOMB_MARK", str(copy / "exploded"))
    (copy / "model.safetensors").unlink()
    if form == "pickle":
        (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save(f.tiny("olmoe").state_dict(), copy / "pytorch_model.bin")
    refused(str(copy), copy)
    assert not (copy / "exploded").exists()


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def config(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return change


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


DAMAGE = {
    "no weights": without("model.safetensors"),
    "no configuration": without("config.json"),
    "no tokenizer": without("tokenizer.json"),
    "configuration not JSON": written("config.json", b"{"),
    "configuration a list": written("config.json", b"[]"),
    "configuration not UTF-8": written("config.json", b"\xff\xfe"),
    "tokenizer not JSON": written("tokenizer.json", b"{"),
    "tokenizer of another form": written("tokenizer.json", b'{"model": 1}'),
    "weights empty": written("model.safetensors", b""),
    "weights no safetensors": written("model.safetensors", struct.pack("<Q", 4) + b"junk"),
    "weights cut off": cut,
    "unknown model type": config(model_type="no-such-model"),
    "an encoder": config(model_type="vit", architectures=["ViTModel"]),
    "another width": config(hidden_size=64),
    "a width that is no number": config(hidden_size="wide"),
    "code of its own": config(
        model_type="custom", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_one_line(copy: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB_MARK", str(copy / "exploded"))
    (copy / "code.py").write_text("import os\nos.mkdir(os.environ['BOMB_MARK'])\n")
    DAMAGE[damage](copy)
    refused(str(copy), copy)
    assert not (copy / "exploded").exists()


@pytest.mark.parametrize(
    "lacking", ["model.layers.1.mlp.gate.weight", "lm_head.weight", "model.layers.0.mlp.experts.3"]
)
def test_missing_weights_are_never_made_up(copy: Path, lacking: str) -> None:
    """transformers fills what a checkpoint lacks with random numbers: such a model is not the one named."""
    tensors = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(lacking)}
    assert len(kept) < len(tensors)
    save_file(kept, copy / "model.safetensors", {"format": "pt"})
    refused("its weights do not fit its configuration", copy)


DAMAGED_JSON = {
    "cut off": (b'{"suppress_tokens": [5, 6', "not JSON"),
    "junk": (b"junk", "not JSON"),
    "zeros": (b"\0" * 40, "not JSON"),
    "a list": (b"[]", "not a JSON object"),
    "not UTF-8": (b"\xff\xfe", "not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGED_JSON)
@pytest.mark.parametrize(
    "file",
    [
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "config.json",
    ],
)
def test_damaged_json_is_named_by_file(copy: Path, file: str, damage: str) -> None:
    content, why = DAMAGED_JSON[damage]
    (copy / file).write_bytes(content)
    refused(f"^{copy / file}: {why}", copy)


# The lab ----------------------------------------------------------------------------------------------------


def test_the_lab_by_name() -> None:
    model, tokenizer = load_model("lab:moe")
    same, _ = load_model("lab:moe@0", dtype="float32", device="cpu")
    assert weights_id(model) == weights_id(same)
    assert not any(module.training for module in model.modules())
    assert tokenizer.chat_template
    half, _ = load_model("lab:moe", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert weights_id(half) == weights_id(model)


@pytest.mark.parametrize("name", ["lab:", "lab:moo", "lab:moe/train", "lab:Moe", "lab:moo@1", "lab:@0"])
def test_unknown_lab_names_list_the_known(name: str) -> None:
    refused("moe, moe-plain, moe-prior", name)


@pytest.mark.parametrize("seed", ["", "x", "-1", "1.5", "1e3", "²", "0x1", "1@2", " 1", "+1"])
def test_bad_seeds(seed: str) -> None:
    refused("seed after @ is a whole number below 2\\^32, as in lab:moe@1", f"lab:moe@{seed}")


def test_artifacts_of_the_lab_name_the_lab_not_the_place_it_is_installed_in() -> None:
    model, _ = load_model("lab:moe")
    assert model_name(model) == ("lab:moe", None)
    assert Steering.from_experts(model, activate={0: [4]}).model == "lab:moe"


def test_structure_without_weights(checkpoint: Path) -> None:
    """What a model is, and which, at the price of its configuration."""
    model, _ = load_model(str(checkpoint))
    structure = load_structure(str(checkpoint))
    assert {parameter.device.type for parameter in structure.parameters()} == {"meta"}
    assert weights_id(structure) == weights_id(model)
    assert read_architecture(structure) == read_architecture(model)
    assert model_name(structure) == model_name(model)


def test_structure_of_what_cannot_be_opened(copy: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_structure("./none")
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: not JSON"):
        load_structure(str(copy))
    whole = load_structure("lab:moe")
    assert {parameter.device.type for parameter in whole.parameters()} == {"cpu"}
