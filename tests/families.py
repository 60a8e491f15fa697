"""Tiny random models of the seven seed families, and what they were seen to route.

Everything is read from the model through hooks of our own on the router, the experts and the decoder, never
from the library under test.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

FAMILIES = ("gpt_oss", "qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "olmoe", "phimoe")
GROUPED = ("deepseek_v2", "deepseek_v3")
EXPERTS, TOP_K, WIDTH, VOCABULARY = 8, 2, 32, 64
PAD, BOS, EOS = 0, 1, 2

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_DEEPSEEK = {
    **_COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_LOCAL = {**_COMMON, "intermediate_size": 16, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
_NAMED = {**_COMMON, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}

_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "gpt_oss": (GptOssConfig, {**_LOCAL, "head_dim": 8, "sliding_window": 8}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            **_NAMED,
            "intermediate_size": 64,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (MixtralConfig, _LOCAL),
    "deepseek_v2": (
        DeepseekV2Config,
        {**_DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3": (DeepseekV3Config, {**_DEEPSEEK, "routed_scaling_factor": 2.5}),
    "olmoe": (OlmoeConfig, {**_NAMED, "intermediate_size": 16}),
    "phimoe": (PhimoeConfig, _LOCAL),
}


def config_of(name: str, **changes: object) -> PretrainedConfig:
    """The configuration of a tiny model of a family."""
    cls, values = _CONFIGS[name]
    return cls(**{**values, **changes})


def tiny(
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    implementation: str | None = None,
    **changes: object,
) -> nn.Module:
    """A new random model; router weights and biases random, logits multiplied by `scale`.

    Nothing ends a generation unless a test asks for it: `eos_token_id` is not set for generating.
    """
    return randomised(config_of(name, **changes), seed, dtype, scale, implementation)


def randomised(
    config: PretrainedConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    implementation: str | None = None,
) -> nn.Module:
    """A random model of a configuration, with routers that differ from token to token."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if "Top" in type(module).__name__ and "Router" in type(module).__name__:
                for key, parameter in [*module.named_parameters(), *module.named_buffers()]:
                    if "correction_bias" in key:
                        parameter.normal_(std=0.5)
                    else:
                        parameter.normal_(std=0.5).mul_(scale)
            elif type(module).__name__.endswith("Experts"):
                for parameter in module.parameters():
                    parameter.normal_(std=0.15)  # so that it matters which experts run
    model = model.to(dtype)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def shared(name: str, **options: object) -> nn.Module:
    """A tiny model for tests that leave it as they found it."""
    return tiny(name, **options)


def dense() -> nn.Module:
    """A model without routers."""
    torch.manual_seed(0)
    config = LlamaConfig(**_COMMON, intermediate_size=64)
    return AutoModelForCausalLM.from_config(config).eval()


def moe_layers(name: str) -> list[int]:
    """The layers with a router."""
    return [1, 2] if name in GROUPED else [0, 1, 2]


def block_of(model: nn.Module, layer: int) -> nn.Module:
    """The module of a layer that holds a router and its experts."""
    return model.get_decoder().layers[layer].mlp


def router_of(model: nn.Module, layer: int) -> nn.Module:
    """The router of a layer."""
    block = block_of(model, layer)
    return block.gate if hasattr(block, "gate") else block.router


def token_ids(rows: int, columns: int, seed: int = 1) -> Tensor:
    """Random ids that are neither padding nor an end, int64 [rows, columns]."""
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], side: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths, padded on one side: ids and mask, [rows, longest]."""
    columns = max(lengths)
    ids = token_ids(len(lengths), columns, seed)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        if side == "left":
            mask[row, columns - length :] = 1
        else:
            mask[row, :length] = 1
    return ids.masked_fill(mask == 0, PAD), mask


@dataclass
class Step:
    """What one layer's router and experts were seen to do in one forward."""

    shape: tuple[int, int] = (0, 0)
    """Rows and columns that the decoder was given."""
    cached: int | None = None
    """Columns the cache held before, None without a cache."""
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    """What the router was given [tokens, width]."""
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    """The router's first output, its raw scores z [tokens, experts]."""
    chosen: Tensor = field(default_factory=lambda: torch.empty(0))
    """The experts that the experts module was told to run [tokens, k]."""
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    """Their mixture weights [tokens, k]."""

    def has(self, expert: int) -> Tensor:
        """Whether each token's choice holds an expert, bool [tokens]."""
        return (self.chosen == expert).any(dim=-1)


def unsteered(router: nn.Module, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, weights, chosen) that the router's own class gives for what it was given."""
    with torch.no_grad():
        return type(router).forward(router, step.hidden.clone())


def same_sets(first: Tensor, second: Tensor) -> Tensor:
    """Which tokens chose the same experts, in whatever order, bool [tokens]."""
    return (first.sort(dim=-1).values == second.sort(dim=-1).values).all(dim=-1)


CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What models and their outputs call the cache of keys and values: from transformers 5.24 on, and before."""


@contextmanager
def watching(model: nn.Module, layer: int) -> Iterator[list[Step]]:
    """Record a layer's routing, forward by forward, with hooks that do not go through the library."""
    steps: list[Step] = []
    block, router = block_of(model, layer), router_of(model, layer)

    def decoder_starts(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        cache = kwargs.get(CACHE)
        cached = None if cache is None else int(cache.get_seq_length())
        steps.append(Step(shape=tuple(given.shape[:2]), cached=cached))

    def router_ends(module: nn.Module, args: tuple, output: tuple) -> None:
        steps[-1].hidden = args[0].detach().reshape(-1, args[0].shape[-1]).clone()
        steps[-1].scores = output[0].detach().clone()

    def experts_start(module: nn.Module, args: tuple) -> None:
        integers = [value for value in args if isinstance(value, Tensor) and not value.is_floating_point()]
        floats = [value for value in args if isinstance(value, Tensor) and value.is_floating_point()]
        steps[-1].chosen = integers[0].detach().clone()
        steps[-1].weights = floats[-1].detach().clone()

    hooks = [
        model.get_decoder().register_forward_pre_hook(decoder_starts, with_kwargs=True),
        router.register_forward_hook(router_ends),
        block.experts.register_forward_pre_hook(experts_start),
    ]
    try:
        yield steps
    finally:
        for hook in hooks:
            hook.remove()


def choices(model: nn.Module, layer: int, run: Callable[[], object]) -> Step:
    """What one layer routed in the one forward of `run`."""
    with watching(model, layer) as steps, torch.no_grad():
        run()
    assert len(steps) == 1
    return steps[0]
