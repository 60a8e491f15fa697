"""Which Mixture-of-Experts class can hold a dense model, its configuration, and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from steersman.errors import ModelError
from steersman.lab.carved_layer import CarvedLayer
from steersman.models.architecture import decoder_layers

ACCEPTED = ("llama", "mistral", "qwen2", "qwen3", "gemma")
MULTIPLE = 8
"""Experts have a multiple of so many neurons: kernels read 16 bytes at a time, eight numbers of bfloat16."""
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "rope_parameters", "attention_dropout", "tie_word_embeddings", "pad_token_id",
    "bos_token_id", "eos_token_id",
)  # fmt: skip
_REFUSED = {
    "gemma2": "normalises what attention and FFN add, and caps its logits",
    "gemma3_text": "normalises queries and keys, and what attention and FFN add",
    "gemma3": "normalises queries and keys, and what attention and FFN add",
}


@dataclass(frozen=True)
class Cut:
    """How the neurons of every FFN are cut: `shared` run always, the others are `experts` of `size`."""

    experts: int
    top_k: int
    shared: int
    size: int

    @classmethod
    def of(cls, config: PretrainedConfig, experts: int, top_k: int, shared: int | None) -> Cut:
        """The cut of a dense model; without `shared` about a third of its neurons, or none where its class
        has no shared expert.

        Raises:
            ModelError: the neurons do not make so many experts of equal size, or top_k is none of them.
        """
        neurons: int = config.intermediate_size
        if not 1 <= top_k <= experts:
            raise ModelError(f"top-{top_k} of {experts} experts: right is from 1 to {experts}")
        if config.model_type == "qwen3":
            if shared:
                raise ModelError(
                    "qwen3_moe, the class for a Qwen3, has no shared expert: shared can only be 0"
                )
            shared = 0
        elif shared is None:
            size = max(MULTIPLE, neurons * 2 // 3 // experts // MULTIPLE * MULTIPLE)
            shared = neurons - experts * size
        size = (neurons - shared) // experts
        needed = 0 if config.model_type == "qwen3" else 1
        if shared < needed or size < MULTIPLE or size % MULTIPLE or shared + experts * size != neurons:
            raise ModelError(
                f"{neurons} neurons are not {shared} shared and {experts} experts of equal size: right is a "
                f"size that {MULTIPLE} divides (kernels want that), such as "
                f"{_such_as(neurons, experts, needed)}"
            )
        return cls(experts, top_k, shared, size)


def _such_as(neurons: int, experts: int, needed: int) -> str:
    """A cut that is right, with as many experts as were asked for or the most there can be."""
    least = neurons - MULTIPLE * needed
    if not needed:
        experts = max((of for of in range(1, experts + 1) if neurons % (MULTIPLE * of) == 0), default=1)
        return f"{experts} experts of {neurons // experts}"
    experts = min(experts, least // MULTIPLE)
    size = max(MULTIPLE, neurons * 2 // 3 // experts // MULTIPLE * MULTIPLE)
    return f"{neurons - experts * size} shared and {experts} experts of {size}"


def moe_of(dense: PreTrainedModel, cut: Cut) -> PreTrainedModel:
    """A Mixture-of-Experts model with everything of a dense one but its FFNs, which `put_layer` fills.

    qwen2_moe for Llama, Mistral, Qwen2 and Gemma; qwen3_moe for Qwen3. Biases that the dense model lacks are
    zero; Gemma's scaled embedding and its norms about 1 are written out.

    Args:
        dense: The dense model, which `why_not` has nothing against.
        cut: How its FFNs are cut.
    """
    config, auto = dense.config, cast("Any", AutoModelForCausalLM)
    with torch.random.fork_rng(devices=[]):
        moe: PreTrainedModel = auto.from_config(_config(config, cut), dtype=dense.dtype)
    moe.to(dense.device).train(False)  # type: ignore[arg-type]
    weights = dense.state_dict()
    with torch.no_grad():
        for key, tensor in moe.state_dict().items():
            if key in weights:
                tensor.copy_(_written_out(key, weights[key], config))
            elif key.endswith("_proj.bias") or "shared_expert_gate" in key:
                tensor.zero_()
    moe.generation_config = dense.generation_config
    return moe


def why_not(config: PretrainedConfig) -> str | None:
    """Why a dense model cannot be carved; None where it can."""
    kind = config.model_type
    if kind not in ACCEPTED:
        why = f" ({_REFUSED[kind]})" if kind in _REFUSED else ""
        return (
            f"no class of transformers with experts computes what {kind} does{why}; carve takes "
            f"{', '.join(ACCEPTED)}"
        )
    if getattr(config, "mlp_bias", False):
        return "its FFN has biases, and experts have none"
    if kind != "qwen3" and getattr(config, "attention_bias", False):
        return "its attention has a bias after the heads (attention_bias), and that of qwen2_moe has none"
    if kind == "qwen3" and "sliding_attention" in (config.layer_types or []):
        return "some of its layers look through a window, and those of qwen3_moe are all alike"
    return None


def _config(dense: PretrainedConfig, cut: Cut) -> PretrainedConfig:
    values: dict[str, Any] = {key: getattr(dense, key) for key in _KEPT if hasattr(dense, key)}
    values |= {
        "moe_intermediate_size": cut.size,
        "num_experts": cut.experts,
        "num_experts_per_tok": cut.top_k,
        "norm_topk_prob": True,
    }
    if dense.model_type == "qwen3":
        return Qwen3MoeConfig(**values, attention_bias=dense.attention_bias)
    windowed = _windowed(dense)
    if dense.model_type == "gemma":
        values["tie_word_embeddings"] = False  # the scale is in the embedding alone
    return Qwen2MoeConfig(
        **values,
        shared_expert_intermediate_size=cut.shared,
        qkv_bias=True,  # zeros where there is none: vLLM's qwen2_moe always has them
        use_sliding_window=any(windowed),
        sliding_window=dense.sliding_window if any(windowed) else None,
        layer_types=["sliding_attention" if at else "full_attention" for at in windowed],
    )


def _windowed(dense: PretrainedConfig) -> list[bool]:
    """Which layers see a window alone."""
    window, layers = getattr(dense, "sliding_window", None), dense.num_hidden_layers
    if window is None or window >= dense.max_position_embeddings:
        return [False] * layers
    if dense.model_type == "mistral":
        return [True] * layers
    return [kind == "sliding_attention" for kind in dense.layer_types]


def _written_out(key: str, weight: Tensor, config: PretrainedConfig) -> Tensor:
    """Gemma multiplies embeddings by √width and norms by 1 + weight."""
    if config.model_type != "gemma":
        return weight
    if key.endswith("embed_tokens.weight"):
        scale: float = config.hidden_size**0.5
        return weight * scale
    return weight + 1 if key.endswith("norm.weight") else weight


def dense_ffn(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up [neurons, width] and down [width, neurons] of a dense layer, in float32."""
    ffn: Any = layer.mlp
    gate, up, down = (getattr(ffn, f"{name}_proj").weight.detach().float() for name in ("gate", "up", "down"))
    return gate, up, down


def put_layer(moe: PreTrainedModel, number: int, layer: CarvedLayer) -> None:
    """Write a carved layer's weights into a model of `moe_of`.

    Chosen experts' weights sum to 1, and the gate of the shared expert is a sigmoid of zeros: projections are
    multiplied by top_k, and by 2.
    """
    block: Any = decoder_layers(moe)[number].mlp
    block.gate.weight.copy_(layer.router)
    for expert in range(len(layer.router)):
        start = layer.shared + expert * layer.size
        of = slice(start, start + layer.size)
        block.experts.gate_up_proj[expert].copy_(torch.cat([layer.gate[of], layer.up[of]]))
        block.experts.down_proj[expert].copy_(layer.top_k * layer.down[:, of])
    if layer.shared:
        always = slice(layer.shared)
        block.shared_expert.gate_proj.weight.copy_(layer.gate[always])
        block.shared_expert.up_proj.weight.copy_(layer.up[always])
        block.shared_expert.down_proj.weight.copy_(2 * layer.down[:, always])
