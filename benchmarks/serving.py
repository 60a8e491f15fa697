"""What serving with steerings costs: tokens a second of an engine whose requests are steered, over those of
one without steerings, for the same prompts.

Two engines of vLLM in this process answer in turn: one that is not configured to be steered, and one that
holds a plan for every request of a batch, each of experts and vectors in all layers. On a GPU, or with
`--model`, a real model's shape with random weights (`load_format="dummy"`), with CUDA graphs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import struct
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Before vLLM is imported: one process, whose thread does all the work, and whose time is measured.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
import transformers
from measuring import Ratio, interleaved, ratio, report
from torch import nn
from transformers import AutoModelForCausalLM

from steersman import Steering
from steersman.models.loading import load_structure

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "OlmoeConfig",
        {
            "vocab_size": 1000,
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 512,
        },
    ),
    "olmoe-1b-7b": (
        "OlmoeConfig",
        {"intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8},
    ),
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "vocab_size": 151936,
        },
    ),
    "gpt-oss-20b": ("GptOssConfig", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "llama-3.1-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
}
BOUNDS = {
    "cpu": {"each a plan of its own": 0.90},
    "cuda": {"idle": 0.995, "one plan for all": 0.97, "each a plan of its own": 0.95},
}


def checkpoint(shape: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A model of a shape: written with random weights if it is tiny, else as a file full of holes, which has
    the names and shapes of all tensors and takes no room. Gives its structure, for which plans are made.
    """
    kind, values = SHAPES[shape]
    config = getattr(transformers, kind)(**values, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    if shape == "tiny":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        model.save_pretrained(folder)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.config.save_pretrained(folder)
        _write_holes(model.state_dict(), folder / "model.safetensors")
    path = folder / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "architectures": [type(model).__name__]}))
    return load_structure(str(folder))


def _write_holes(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        first, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def plan(model: Any, number: int) -> Steering:
    """A plan that no other number has: in every layer experts forced, kept out and moved, and a vector."""
    config = model.config
    layers = range(config.num_hidden_layers)
    generator = torch.Generator().manual_seed(number)
    directions = {layer: torch.randn(config.hidden_size, generator=generator) for layer in layers}
    vectors = Steering.from_vectors(model, directions, strength=0.02, scope="all")
    experts = getattr(config, "num_experts", getattr(config, "num_local_experts", 0))
    if not experts:
        return vectors
    drawn = {layer: torch.randperm(experts, generator=generator).tolist() for layer in layers}
    return vectors + Steering.from_experts(
        model,
        activate={layer: drawn[layer][:2] for layer in layers},
        deactivate={layer: drawn[layer][2:5] for layer in layers},
    )


def engine(folder: Path, given: argparse.Namespace, plans: Mapping[str, str] | None) -> Any:
    """An engine in this process; with plans, or, without, not configured to be steered."""
    from vllm import LLM

    options: dict[str, Any] = {} if given.eager is None else {"enforce_eager": given.eager}
    if given.model != "tiny":
        options |= {"load_format": "dummy", "gpu_memory_utilization": given.memory}
    if plans is not None:
        most = max(1, len(plans))
        options["additional_config"] = {"steersman": {"steerings": dict(plans), "max_steerings": most}}
    return LLM(
        str(folder),
        dtype="float32" if given.device == "cpu" else "bfloat16",
        max_model_len=max(256, 2 * (given.prompt + given.tokens)),
        max_num_seqs=max(given.batch),
        max_num_batched_tokens=max(2048, 2 * (given.prompt + given.tokens)),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        **options,
    )


def answering(
    llm: Any, batch: int, given: argparse.Namespace, asked: Sequence[str | None]
) -> Callable[[], None]:
    """Answers a batch of requests, each with the steering that it asks for, greedily."""
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, vocabulary, (batch, given.prompt), generator=generator).tolist()

    def params(steering: str | None) -> Any:
        return SamplingParams(
            temperature=0,
            max_tokens=given.tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if steering is None else {"steering": steering},
        )

    def answer() -> None:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        llm.generate(requests, [params(one) for one in asked], use_tqdm=False)

    return answer


def asked_for(batch: int) -> dict[str, list[str | None]]:
    """What the requests of a batch ask for, by arm."""
    names = [f"p{number}" for number in range(batch)]
    mixed: list[str | None] = [None, "p0", *(f"{name}@0.5" for name in names)][:batch]
    return {
        "idle": [None] * batch,
        "one plan for all": ["p0"] * batch,
        "each a plan of its own": [*names],
        "mixed": mixed,
    }


def main() -> None:
    given = arguments()
    if importlib.util.find_spec("vllm") is None:
        print("not run: vLLM is not installed here (`make test-engine` makes an environment with it)")
        return
    if given.device == "cpu":
        torch.set_num_threads(1)
    ratios: list[Ratio] = []
    noise: list[str] = []
    rates: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
        structure = checkpoint(given.model, folder / "model", dtype)
        plans = {}
        for number in range(max(given.batch)):
            plan(structure, number).save_pretrained(folder / f"p{number}")
            plans[f"p{number}"] = str(folder / f"p{number}")
        plain = engine(folder / "model", given, None)
        steered = engine(folder / "model", given, plans)
        for batch in given.batch:
            none: list[str | None] = [None] * batch
            arms = {
                "unsteered": answering(plain, batch, given, none),
                "unsteered again": answering(plain, batch, given, none),
                **{arm: answering(steered, batch, given, asks) for arm, asks in asked_for(batch).items()},
            }
            clock = time.thread_time if given.device == "cpu" else time.perf_counter
            times = interleaved(arms, given.rounds, warm=2, clock=clock)
            base = times.pop("unsteered")
            for arm, taken in times.items():
                limit = BOUNDS[given.device].get(arm)
                line = ratio(f"batch {batch}: {arm} / unsteered", base, taken, bound=limit)
                (noise if arm == "unsteered again" else ratios).append(line)  # type: ignore[arg-type]
            rates.append(f"batch {batch}: {batch * given.tokens / sorted(base)[len(base) // 2]:.0f} tokens/s")
    report(
        f"{given.model} on {given.device}, {given.prompt} tokens in, {given.tokens} out, "
        f"{'eager' if given.eager else 'compiled'}; plans of 5 experts and a vector in every layer; tokens/s",
        ratios,
        notes=f"vLLM {_engine_version()}; noise: {'; '.join(' '.join(str(one).split()) for one in noise)}; "
        f"unsteered: {', '.join(rates)}",
        name=f"serving_{given.model.replace('.', '_').replace('-', '_')}_{given.device}",
        save=given.save,
    )


def _engine_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--rounds", type=int, default=9, help="how often each arm runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(SHAPES), default="tiny")
    parser.add_argument(
        "--batch", type=int, nargs="+", help="requests at a time (cpu: 16 32, cuda: 1 32 256)"
    )
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--eager", action="store_true", default=None, help="neither compiled nor captured")
    parser.add_argument(
        "--memory", type=float, default=0.42, help="of the GPU's, for each of the two engines"
    )
    given = parser.parse_args()
    given.batch = given.batch or ([16, 32] if given.device == "cpu" else [1, 32, 256])
    return given


if __name__ == "__main__":
    main()
