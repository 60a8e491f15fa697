"""A GGUF file as MODEL: opened, identified by its bytes, steered; what cannot be read is refused."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import families as f
import gguf_files as g
from cli.command_line import run
from steersman import ModelError, Steering, WeightsMismatch, load_model, read_architecture, weights_id
from steersman.errors import ServingError
from steersman.models.identity import model_name
from steersman.models.loading import load_structure, load_tokenizer
from steersman.vllm.serveable import folder_of

pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return g.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf")


@pytest.fixture(scope="module")
def opened(file: Path) -> tuple[Any, Any]:
    with pytest.warns(UserWarning, match="its weights in Q4_1, Q8_0 are dequantised to float32"):
        return load_model(str(file))


def test_it_opens_with_its_tokenizer_and_template(opened: tuple[Any, Any], file: Path) -> None:
    model, tokenizer = opened
    assert torch.equal(model.model.embed_tokens.weight, g.dequantised(file, "token_embd.weight"))
    up = g.dequantised(file, "blk.1.ffn_up.weight")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, up)
    assert tokenizer.decode(tokenizer("hello wörld").input_ids) == "hello wörld"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|user|>hi<|end|>"
    assert load_tokenizer(str(file)).get_vocab() == tokenizer.get_vocab()


@pytest.mark.filterwarnings("ignore:.*dequantised")
def test_its_id_is_over_its_own_bytes(opened: tuple[Any, Any], file: Path, tmp_path: Path) -> None:
    model, _ = opened
    known = weights_id(model)
    assert known.startswith("gguf-sha256:")
    assert weights_id(load_model(str(file), dtype="bfloat16")[0]) == known
    copied = Path(shutil.copy(file, tmp_path / "renamed.gguf"))
    named = f"{tmp_path}#renamed.gguf"
    structure = load_structure(named)
    assert next(structure.parameters()).is_meta
    assert weights_id(structure) == known
    assert read_architecture(structure).id == read_architecture(model).id
    assert model_name(structure)[0] == named
    content = bytearray(copied.read_bytes())
    content[-5000] ^= 1
    copied.write_bytes(content)
    assert weights_id(load_structure(named)) != known


@pytest.mark.filterwarnings("ignore:.*dequantised")
@pytest.mark.parametrize(
    "key", ["llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.tokens"]
)
def test_its_metadata_is_part_of_its_id(
    key: str, opened: tuple[Any, Any], file: Path, tmp_path: Path
) -> None:
    content = bytearray(file.read_bytes())
    # After the key and its type a number's last byte but one, or the first letter in the array of tokens.
    place = content.index(key.encode()) + len(key) + (25 if key.endswith("tokens") else 6)
    content[place] ^= 1
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(content)
    other = load_structure(str(changed))
    assert read_architecture(other).id == read_architecture(opened[0]).id
    assert weights_id(other) == weights_id(load_model(str(changed))[0]) != weights_id(opened[0])


def test_a_change_in_memory_is_noticed(opened: tuple[Any, Any]) -> None:
    model, known = copy.deepcopy(opened[0]), weights_id(opened[0])
    assert weights_id(model) == weights_id(model.to(torch.float16)) == known
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    assert weights_id(model).startswith("bytes-sha256:")


@pytest.mark.filterwarnings("ignore:.*dequantised")
def test_a_plan_of_it_applies_to_it_opened_again(opened: tuple[Any, Any], file: Path, tmp_path: Path) -> None:
    model, tokenizer = opened
    vector = torch.randn(g.WIDTH, generator=torch.Generator().manual_seed(0))
    Steering.from_vectors(model, {1: vector}, scope="all").save_pretrained(tmp_path / "plan")
    plan = Steering.from_pretrained(tmp_path / "plan")
    assert plan.model == str(file)
    again, _ = load_model(plan.model)
    tokens = tokenizer("hello world", return_tensors="pt").input_ids
    plain = again(tokens).logits
    with plan.apply(again):
        assert not torch.equal(again(tokens).logits, plain)
    with pytest.raises(ValueError, match="not serializable"):  # transformers' word after such a load
        again.save_pretrained(tmp_path / "saved")
    checkpoint = tmp_path / "checkpoint"
    rebuilt = type(model)(model.config)
    rebuilt.load_state_dict(model.state_dict())
    rebuilt.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(checkpoint)
    with pytest.raises(WeightsMismatch, match="a GGUF file's are others than those that"):
        plan.apply(load_model(str(checkpoint))[0]).__enter__()


def test_experts_in_it_are_steered(tmp_path: Path) -> None:
    file = g.write_gguf(tmp_path / "moe.gguf", architecture="qwen3moe")
    with pytest.warns(
        UserWarning, match=r"does not read qwen3moe\.attention\.value_length, qwen3moe\.expert_feed"
    ):
        model, tokenizer = load_model(str(file))
    assert [(router.experts, router.top_k) for router in read_architecture(model).routers] == [(8, 2)] * 3
    stored = g.dequantised(file, "blk.1.ffn_down_exps.weight")
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj, stored)
    structure = load_structure(str(file))
    plan = Steering.from_experts(structure, activate={1: [3]}, deactivate={2: [0]})
    tokens = tokenizer("hello world", return_tensors="pt").input_ids
    with plan.apply(model):
        assert bool(f.choices(model, 1, lambda: model(tokens)).has(3).all())
        assert not bool(f.choices(model, 2, lambda: model(tokens)).has(0).any())


NOT_READ = {
    "another architecture": (
        {"architecture": "plamo"},
        r"has the architecture 'plamo', which transformers does not read from GGUF; it reads .*llama",
    ),
    "factors of the rotary embedding": (
        {"rope_freqs__weight": np.ones(g.WIDTH // g.HEADS // 2, np.float32)},
        r"scales its rotary embedding \(the tensor rope_freqs.weight\), which transformers does not read",
    ),
    "a scaled rotary embedding": (
        {"llama__rope__scaling__type": "yarn"},
        r"scales its rotary embedding \(rope.scaling.type 'yarn'\)",
    ),
}


@pytest.mark.parametrize("what", NOT_READ)
def test_what_transformers_cannot_read_is_named(what: str, tmp_path: Path) -> None:
    options, message = NOT_READ[what]
    file = g.write_gguf(tmp_path / "other.gguf", **options)
    for open_ in (load_model, load_structure):
        with pytest.raises(ModelError, match=message):
            open_(str(file))


def test_other_files_and_names(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for name, content, message in (
        ("cut.gguf", whole[:-100], "cut off: it has"),
        ("header.gguf", whole[:3000], "damaged, or not a GGUF file"),
        ("text.gguf", b"hello" * 20, "it does not begin with GGUF"),
        ("empty.gguf", b"", "the file is empty"),
        ("pointer.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
        ("big-00001-of-00002.gguf", whole, "is part 1 of 2, and transformers reads a GGUF file in one piece"),
    ):
        (tmp_path / name).write_bytes(content)
        for open_ in (load_model, load_structure, load_tokenizer):
            with pytest.raises(ModelError, match=message):
                open_(str(tmp_path / name))
    for name, message in (
        (str(tmp_path / "none.gguf"), "no such file"),
        (f"{tmp_path}#none.gguf", "no such file"),
        (f"{tmp_path}#model.safetensors", r"right behind # is a GGUF file"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(name)
    folder = tmp_path / "a#folder.gguf"
    folder.mkdir()
    with pytest.raises(ModelError, match="cannot be opened as a model"):  # a folder is a folder
        load_model(str(folder))


def test_the_engine_refuses_it(file: Path) -> None:
    for name in (str(file), f"{file.parent}#{file.name}"):
        with pytest.raises(ServingError, match="vLLM reads no GGUF files"):
            folder_of(name)


def test_numbers_that_are_not_quantised_are_not_dequantised(tmp_path: Path) -> None:
    file = g.write_gguf(tmp_path / "tiny.F16.gguf", plain=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(file))
    assert "not quantised: read to float32" in run("describe", file).words


def test_commands_take_it(file: Path, tmp_path: Path) -> None:
    told = run("describe", file, "--json")
    assert told.status == 0
    assert f"{file}: its weights in Q4_1, Q8_0 are dequantised to float32" in told.stderr
    assert '"dequantised": {"from": ["Q4_1", "Q8_0"], "to": "float32", "not_read": []}' in told.stdout
    # In a log the bar of the conversion is where it began and where it ended.
    assert told.stderr.count("\rConverting") <= 2, told.stderr
    pairs = tmp_path / "pairs.jsonl"
    rows = [f'{{"positive": "the {n} is well", "negative": "a {n} was ill"}}' for n in range(24)]
    pairs.write_text("\n".join(rows))
    detected = run("detect", file, pairs, "-o", tmp_path / "contrast")
    assert detected.status == 2
    refined = run("refine", f"{file.parent}#{file.name}", pairs, "-o", tmp_path / "concept", "--json")
    assert refined.status == 0, refined.stderr
    assert run("steer", tmp_path / "concept", "-o", tmp_path / "plan", "--strength", "dose:1").status == 0
    ask = ("generate", file, "--steering", tmp_path / "plan", "--prompt", "hello", "--max-new-tokens", 4)
    answered = run(*ask, "--json")
    assert answered.status == 0, answered.stderr
