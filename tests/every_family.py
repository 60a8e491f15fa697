"""Tiny random models of every Mixture-of-Experts model type of transformers with a language model, and what
they were seen to route.

Everything is seen through hooks of our own on routers and experts, never through the library under test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

EXPERTS, TOP_K, WIDTH, VOCABULARY = 8, 2, 32, 64

MODEL_TYPES = (
    "afmoe", "aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx",
    "deepseek_ocr2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "doge", "dots1",
    "dots3_note", "dots3_note_text", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "flex_olmo", "flint",
    "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "gpt_oss",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3",
    "hy_v4", "hy_v4_vl", "inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text",
    "inkling_mm_model", "inkling_text", "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lara_mini",
    "lfm2_moe", "llama4", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
    "minimax_m3_vl", "minimax_m3_vl_text", "mistral4",
    "mistral_large4", "mixtral", "muse_spark", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen4_exp",
    "qwen4_exp_text", "sarvam_mla", "sarvam_moe", "solar_open", "step3p7", "unlimited_ocr", "zaya",
)  # fmt: skip
"""Found by looking for classes with experts in transformers' modelling files, not by name."""

SINCE = {
    **dict.fromkeys(("bailing_hybrid", "kolibri1", "muse_spark", "unlimited_ocr"), "5.20"),
    **dict.fromkeys(("beam", "flint"), "5.21"),
    "mistral_large4": "5.22",
    **dict.fromkeys(("dots3_note", "dots3_note_text", "inkling2", "inkling2_text"), "5.23"),
    **dict.fromkeys(
        ("hy_v4_vl", "inkling2_loop", "inkling2_loop_text", "lara_mini", "sarvam_mla", "sarvam_moe"), "5.24"
    ),
}
"""The release of transformers that brought a type, where 5.19 lacks it."""

EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_NAMES = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
)  # fmt: skip
GROUPS_NAMES = ("n_group", "num_expert_group")

_TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY, "hidden_size": WIDTH, "d_model": WIDTH,
    "intermediate_size": 32,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "expert_ffn_hidden_size": 8,
    "ffn_hidden_size": 32, "shared_intermediate_size": 8, "shared_experts_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 8, "dense_intermediate_size": 32, "intermediate_size_mlp": 32,
    "num_hidden_layers": 3, "num_layers": 3, "n_layers": 3, "n_heads": 4, "max_seq_len": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16,
    "v_head_dim": 8, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64, "rel_extent": 16, "d_rel": 4,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "o_lora_rank": 8,
    "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "ssm_state_size": 8, "use_mamba_kernels": False, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_head_dim": 8,
    "linear_num_heads": 4, "kv_channels": 8,
    **dict.fromkeys(EXPERTS_NAMES, EXPERTS), **dict.fromkeys(TOP_K_NAMES, TOP_K),
    **dict.fromkeys(GROUPS_NAMES, 4), "topk_group": 2, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "depth": 2, "num_heads": 4, "out_hidden_size": WIDTH, "patch_size": 4, "image_size": 16,
    "embed_dim": WIDTH, "mlp_dim": WIDTH, "global_attn_indexes": [1], "output_channels": 16,
    "downsample_channels": [16, WIDTH],
    "projection_intermediate_size": WIDTH, "projector_hidden_size": WIDTH, "vision_output_dim": WIDTH,
    "text_hidden_size": WIDTH, "projection_hidden_dim": WIDTH, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH, "adapter_input_size": WIDTH, "indexer_head_dim": 8,
    "indexer_budget": 16, "indexer_compress_ratio": 4, "n_groups": 2,
}  # fmt: skip
"""What every configuration gets where it knows the name."""

_ALL_HEADS = {"num_key_value_heads": 4}
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_GEMMA = {
    "enable_moe_block": True, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "per_layer_config": {}, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v4",
            "sarvam_mla",
        ),
        _ALL_HEADS,
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text"), _LINEAR),
    "granitemoehybrid": _LINEAR,
    "bailing_hybrid": {**_ALL_HEADS, **_LINEAR},
    "kimi_linear": {**_ALL_HEADS, **_LINEAR, "q_lora_rank": None},
    "deepseek_v2": {**_ALL_HEADS, "topk_method": "group_limited_greedy"},
    "deepseek_v4": {"num_key_value_heads": 1, "mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"topk_method": "group_limited_greedy"},
    "unlimited_ocr_text": {"topk_method": "group_limited_greedy"},
    "dots3_note_text": {**_ALL_HEADS, "layer_types": ["indexed_attention"] * 3, "per_layer_config": {}},
    "doge": {"is_moe": True, "num_experts": 16},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [8, 8], "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
    },
    "gemma4_text": _GEMMA,
    "glm4v_moe_text": {
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
    },
    "glm5_next_text": {**_ALL_HEADS, **_LINEAR, "qk_rope_head_dim": 0, "head_dim": 0},
    "hy_v4_vl_text": {**_ALL_HEADS, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "inkling2_loop_text": {
        "num_hidden_layers": 5, "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 3,
        "loop_layer_index_end": 4,
    },
    "jamba": {
        "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mistral4": {**_ALL_HEADS, "head_dim": 16},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [8] * 4, "depths": [1] * 4},
    "mistral_large4_text": _ALL_HEADS,
    "longcat_flash": {**_ALL_HEADS, "zero_expert_num": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 3},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": EXPERTS + 1},
}  # fmt: skip


_BIASES = ("correction_bias", "expert_bias", "balancing_biases", "router.bias")


def sizes(config: PretrainedConfig, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The values that make a configuration tiny, with those of the configurations inside it; `changes` go to
    each that has such a name.
    """
    names = set(config.to_dict()) | set(config.attribute_map)
    values = {name: value for name, value in {**_TINY, **(changes or {})}.items() if name in names}
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PretrainedConfig):
            values[name] = sizes(inner, changes) | (
                {"model_type": inner.model_type} if inner.model_type else {}
            )
    own = _CHANGES.get(config.model_type, {})
    return {**values, **own, **{name: value for name, value in (changes or {}).items() if name in own}}


def known(model_type: str) -> bool:
    """Whether the installed transformers has a model type."""
    return model_type in CONFIG_MAPPING


@functools.cache
def why_unrunnable(model_type: str) -> str | None:
    """Why a type does not run in the installed transformers, steered or not; None where it does."""
    if not known(model_type):
        return f"transformers {transformers.__version__} has no {model_type}"
    try:
        with torch.no_grad():
            shared(model_type)(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    except AttributeError as error:
        if model_type != "llama4":  # 5.24.0 asks its language model for what that does not give
            raise
        return f"transformers {transformers.__version__} does not run {model_type} itself: {error}"
    return None


def config_of(model_type: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny model."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**sizes(cls(), changes))


def from_config(config: PretrainedConfig) -> nn.Module:
    """A model as users open it: with its vision tower, where it is a vision-language model."""
    vision = type(config) in AutoModelForImageTextToText._model_mapping
    return (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_config(config).eval()


def tiny(model_type: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model: router weights and correction biases random, and experts that differ."""
    torch.manual_seed(seed)
    model = from_config(config_of(model_type, **changes))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            parts = {*name.split(".")}
            if name.endswith(_BIASES) or (parts & {"gate", "router"} and tensor.dim() == 2):
                tensor.normal_(std=0.5)
            elif "experts" in parts:
                tensor.normal_(std=0.15)
    return model


shared = functools.cache(tiny)
"""A tiny model for tests that leave it as they found it: built once."""


def routers(model: nn.Module) -> dict[int, tuple[nn.Module, nn.Module]]:
    """By layer, the block and the router of its (text) experts."""
    found = {}
    for index, layer in enumerate(_layers(model)):
        for name, block in layer.named_modules():
            if not (hasattr(block, "experts") or hasattr(block, "input_linear")):
                continue
            router = getattr(block, "gate", getattr(block, "router", None))
            beside = {"vision_moe", "self_attention"} & {*name.split(".")}
            if isinstance(router, nn.Module) and not beside:
                found[index] = (block, router)
    return found


def _layers(model: nn.Module) -> nn.ModuleList:
    decoder = model.get_decoder()
    decoder = decoder.model if hasattr(decoder, "model") else decoder
    return decoder.blocks if hasattr(decoder, "blocks") else decoder.layers


def scaled(model: nn.Module, factor: float) -> None:
    """Multiply every router's scores by multiplying the weight that gives them."""
    with torch.no_grad():
        for _, router in routers(model).values():
            weights = [p for p in router.parameters() if p.dim() == 2 and p.shape[0] >= EXPERTS]
            weights[-1].mul_(factor)


@contextmanager
def watching(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Record by layer which experts the last forward really chose, [tokens, k]."""
    seen: dict[int, Tensor] = {}
    handles = []
    for layer, (block, router) in routers(model).items():
        watch = _WATCHERS.get(type(router).__name__)
        if watch is not None:
            handles += watch(seen, layer, block, router)
        else:
            handles.append(block.experts.register_forward_pre_hook(_given(seen, layer), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def chosen(model: nn.Module, run: Callable[[], object]) -> dict[int, Tensor]:
    """By layer, the experts that each token chose while `run` ran, [tokens, k]."""
    with watching(model) as seen, torch.no_grad():
        run()
    assert seen.keys() == routers(model).keys()
    return dict(seen)


def _given(seen: dict[int, Tensor], layer: int, skipped: int | None = None) -> Callable[..., None]:
    def hook(experts: nn.Module, args: tuple, kwargs: dict) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        (ids,) = [value for value in given if value.dtype in (torch.int64, torch.int32)]
        seen[layer] = ids.clone().reshape(-1, ids.shape[-1])
        if skipped is not None:  # expert 0 with weight 0: the token skipped the experts
            seen[layer][given[-1].reshape(seen[layer].shape) == 0] = skipped

    return hook


def _watch_skipping(seen: dict[int, Tensor], layer: int, block: nn.Module, router: nn.Module) -> list:
    """Zaya: the class after the last expert runs nothing."""
    return [block.experts.register_forward_pre_hook(_given(seen, layer, EXPERTS), with_kwargs=True)]


def _watch_dense(seen: dict[int, Tensor], layer: int, block: nn.Module, router: nn.Module) -> list:
    """Llama 4: every expert gets every token, multiplied by a score that is 0 where it was not chosen."""

    def hook(module: nn.Module, args: tuple, output: tuple) -> None:
        choice = []
        for scores, logits in zip(*map(Tensor.tolist, output), strict=True):
            order = sorted(range(len(scores)), key=lambda i: (scores[i] != 0, logits[i]))
            choice.append(order[-TOP_K:])  # a chosen expert's score may vanish: then it is the next best
        seen[layer] = torch.tensor(choice)

    return [router.register_forward_hook(hook)]


def _watch_sorted(seen: dict[int, Tensor], layer: int, block: nn.Module, router: nn.Module) -> list:
    """JetMoe: tokens' slots in the order of the experts that get them."""

    def hook(module: nn.Module, args: tuple, output: tuple) -> None:
        slots, tokens, _, sizes, _ = output
        choice: list[list[int]] = [[] for _ in range(len(slots) // TOP_K)]
        start = 0
        for expert, size in enumerate(sizes):
            for token in tokens[start : start + size].tolist():
                choice[token].append(expert)
            start += size
        seen[layer] = torch.tensor(choice)

    return [router.register_forward_hook(hook)]


_WATCHERS: dict[str, Callable[..., list]] = {
    "ZayaRouter": _watch_skipping,
    "Llama4Router": _watch_dense,
    "JetMoeTopKGating": _watch_sorted,
}
