"""Tiny random models that the engine runs on a CPU, the engine itself, and what transformers says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from families import config_of, randomised
from steersman import Steering

FAMILIES = (
    "olmoe",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "phimoe",
    "deepseek_v2",
    "deepseek_v3",
    "llama",
)
WIDTH, LAYERS = 128, 3
_SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 512,
}
# The engine's attention on a CPU wants heads of 32 at least; its MLA the sizes of the real models.
_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
_CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 32},
    "gpt_oss": {"head_dim": 32, "intermediate_size": 64, "sliding_window": 32},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "deepseek_v2": {**_MLA, "q_lora_rank": None},
    "deepseek_v3": {**_MLA, "q_lora_rank": 32},
}
# What transformers does not write, and the engine asks for.
_WRITTEN: dict[str, dict[str, Any]] = {
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
_ENGINE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"compilation_config": {"custom_ops": ["none"]}},
    "deepseek_v3": {"compilation_config": {"custom_ops": ["none"]}},
}


def save_tiny(name: str, folder: Path, seed: int = 0, **changes: Any) -> nn.Module:
    """Write a tiny random checkpoint of a family, and open it with transformers."""
    if name == "llama":
        common = config_of("olmoe").to_dict()
        kept = ("vocab_size", "num_attention_heads", "num_key_value_heads")
        config: Any = LlamaConfig(**{**_SHAPE, **{key: common[key] for key in kept}, **changes})
    else:
        config = config_of(name, **{**_SHAPE, **_CHANGES.get(name, {}), **changes})
    randomised(config, seed).save_pretrained(folder)
    if name in _WRITTEN:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **_WRITTEN[name]}))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    return model


def plans_for(model: nn.Module, name: str) -> dict[str, Steering]:
    """Plans of experts, of vectors, of both with scopes of their own, and one that takes a direction out."""
    torch.manual_seed(7)
    first, second = torch.randn(2, WIDTH)
    vectors = Steering.from_vectors(model, {0: 0.4 * first, LAYERS - 1: 0.4 * second})
    project = Steering.from_vectors(model, {1: first}, operation="project", strength=0.7, scope="all")
    if name == "llama":
        return {"vectors": vectors, "project": project, "both": vectors + project}
    experts = Steering.from_experts(model, activate={1: [1]}, deactivate={1: [2, 5], 2: [0]})
    late = Steering.from_experts(model, activate={2: {3: 0.5}}, deactivate={1: [7]}, scope="generated")
    early = Steering.from_vectors(model, {1: 0.3 * second}, scope="prompt")
    return {"experts": experts, "vectors": vectors, "both": late + early, "project": project}


def save_plans(plans: Mapping[str, Steering], folder: Path) -> dict[str, str]:
    """Write plans; {name: folder}."""
    for name, plan in plans.items():
        plan.save_pretrained(folder / name)
    return {name: str(folder / name) for name in plans}


def open_engine(folder: Path, family: str, steering: Mapping[str, Any] | None, **options: Any) -> Any:
    """The engine in this process; `steering` is its configuration, None: the plugin is idle."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "gpu_memory_utilization": 0.3,  # of the host's: other processes are here, too
        **_ENGINE.get(family, {}),
        **options,
    }
    if steering is not None:
        settings["additional_config"] = {"steersman": dict(steering)}
    return LLM(str(folder), **settings)


class Answer(NamedTuple):
    """Tokens, and the log-probability of each."""

    tokens: list[int]
    log_probabilities: Tensor


def params(steering: str | None = None, tokens: int = 8, **options: Any) -> Any:
    """Greedy, never ending by itself."""
    from vllm import SamplingParams

    extra = {} if steering is None else {"extra_args": {"steering": steering}}
    settings = {"temperature": 0, "ignore_eos": True, "logprobs": 1, "detokenize": False, **extra, **options}
    return SamplingParams(max_tokens=tokens, **settings)


def ask(engine: Any, prompts: Sequence[Sequence[int]], asked: Sequence[Any]) -> list[Any]:
    """The engine's outputs for prompts of token ids, in one go."""
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return engine.generate(given, list(asked), use_tqdm=False)  # type: ignore[no-any-return]


def answer_of(output: Any) -> Answer:
    """An engine's output."""
    (only,) = output.outputs
    tokens = list(only.token_ids)
    chosen = [step[token].logprob for step, token in zip(only.logprobs, tokens, strict=True)]
    return Answer(tokens, torch.tensor(chosen))


def reference(model: nn.Module, plan: Steering | None, prompt: Sequence[int], tokens: int = 8) -> Answer:
    """What transformers answers under a plan."""
    with plan.apply(model) if plan is not None else contextlib.nullcontext():
        made = model.generate(
            torch.tensor([list(prompt)]),
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    answer = made.sequences[0, len(prompt) :].tolist()
    logits = torch.cat(made.logits).log_softmax(dim=-1)
    return Answer(answer, logits[range(len(answer)), answer])


def prompts(number: int, length: int = 20, seed: int = 0) -> list[list[int]]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (number, length), generator=generator).tolist()


@contextlib.contextmanager
def closing(engine: Any) -> Iterator[Any]:
    """An engine that gives its memory back."""
    try:
        yield engine
    finally:
        import gc

        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
