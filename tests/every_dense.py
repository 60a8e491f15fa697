"""Tiny random models of transformers' decoder families without experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import every_family as e

MODEL_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_5_text", "gemma", "gemma2", "gemma3_text", "gemma3", "phi",
    "phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "codegen", "gpt_bigcode",
    "cohere", "cohere2", "olmo2", "olmo_hybrid", "granite", "stablelm", "starcoder2", "glm4", "exaone4",
    "smollm3", "nemotron", "lfm2", "modernbert-decoder", "openai-gpt", "mamba", "mamba2", "falcon_mamba",
    "recurrent_gemma", "bamba", "falcon_h1", "zamba", "zamba2", "apertus", "arcee", "biogpt", "bitnet",
    "ctrl", "diffllama", "ernie4_5", "fuyu", "glm", "helium", "hunyuan_v1_dense", "internlm3", "jais2",
    "minicpm3", "ministral", "mllama", "nanochat", "olmo", "olmo3", "persimmon", "phi4_multimodal",
    "seed_oss", "vaultgemma", "xglm", "exaone", "apertus1p5_text", "dory",
)  # fmt: skip

QUICK = (
    "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neo", "gptj", "opt", "bloom", "falcon", "mpt", "codegen",
    "gpt_bigcode", "olmo2", "openai-gpt", "modernbert-decoder", "mamba", "falcon_mamba", "recurrent_gemma",
    "zamba", "dory",
)  # fmt: skip
"""Of each form of a layer's output, of a cache and of a decoder's place, one or two."""

_NAMES: dict[str, Any] = {
    "n_embd": e.WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_ctx": 128, "n_inner": 64,
    "rotary_dim": 4, "ffn_dim": 64, "word_embed_proj_dim": e.WIDTH, "decoder_layers": 3,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_layers": 3, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "lru_width": e.WIDTH, "state_size": 8, "time_step_rank": 4, "expand": 2,
    "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 2, "mamba_n_groups": 2, "mamba_d_ssm": 64,
    "dff": 64, "rescale_layers": False,
}  # fmt: skip
"""What configurations call their sizes, beside the names that `every_family` knows."""

_HEADS = {"num_key_value_heads": 4}
_CHANGES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "minicpm3": _HEADS,
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "dory": {"num_hidden_layers": 5, "n_input_layers": 3, "n_recurrent_layers": 1, "n_output_layers": 1},
    "bamba": {"attn_layer_indices": [1]},
    "zamba": {
        "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1, "n_mamba_heads": 2,
        "attention_head_dim": 16, "attention_hidden_size": 64, "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "adapter_rank": 4,
        "attention_head_dim": 16, "num_mem_blocks": 1,
    },
    "gemma3n_text": {
        "laurel_rank": 4, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": e.VOCABULARY,
        "hidden_size_per_layer_input": 8, "activation_sparsity_pattern": [0.0] * 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip


def tiny(model_type: str, cls: Any = None) -> nn.Module:
    """A random model of a type; of an Auto class, where not that of causal language models."""
    torch.manual_seed(0)
    config = e.config_of(model_type, **{**_NAMES, **_CHANGES.get(model_type, {})})
    return (e.from_config(config) if cls is None else cls.from_config(config)).eval()
