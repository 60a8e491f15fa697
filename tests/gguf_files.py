"""Tiny random models in GGUF files, as llama.cpp's converter would write them: with their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

WIDTH, LAYERS, HEADS, INNER = 64, 3, 4, 96
EXPERTS, TOP_K = 8, 2
EXPERT_INNER = 768
"""transformers' default, which it takes for every file of this architecture."""
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte, by which byte-level tokenizers write it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letter = {byte: chr(byte) for byte in plain} | {b: chr(256 + n) for n, b in enumerate(others)}
    return [letter[byte] for byte in range(256)]


def tokens() -> list[str]:
    return [*SPECIAL, *byte_letters(), "he", "ll", "Ġw"]


def write_gguf(
    path: Path, seed: int = 0, architecture: str = "llama", plain: bool = False, **more: Any
) -> Path:
    """Matrices in Q4_1, embeddings in Q8_0 (`plain`: all in F16), norms in F32. `more`: metadata
    and, where arrays, tensors.
    """
    writer = GGUFWriter(path, architecture)
    for key, value in {
        "context_length": 128,
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "rope.dimension_count": WIDTH // HEADS,
        "vocab_size": len(tokens()),
        **(
            {
                "expert_count": EXPERTS,
                "expert_used_count": TOP_K,
                "expert_feed_forward_length": EXPERT_INNER,
                "attention.key_length": WIDTH // HEADS,
                "attention.value_length": WIDTH // HEADS,
            }
            if architecture == "qwen3moe"
            else {}
        ),
    }.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)))
    writer.add_token_merges(["h e", "l l", "Ġ w"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in more.items():
        if isinstance(value, str):
            writer.add_string(key.replace("__", "."), value)
    draws = np.random.default_rng(seed)

    def add(name: str, *shape: int, kind: GGMLQuantizationType = GGMLQuantizationType.Q4_1) -> None:
        kind = GGMLQuantizationType.F16 if plain else kind
        matrix = (draws.standard_normal(shape) * 0.15).astype(np.float32)
        writer.add_tensor(f"{name}.weight", quantize(matrix, kind), raw_dtype=kind)

    add("token_embd", len(tokens()), WIDTH, kind=GGMLQuantizationType.Q8_0)
    for layer in range(LAYERS):
        for part in ("q", "k", "v", "output"):
            add(f"blk.{layer}.attn_{part}", WIDTH, WIDTH)
        norms = {"attn_norm": WIDTH, "ffn_norm": WIDTH}
        if architecture == "qwen3moe":
            norms |= {"attn_q_norm": WIDTH // HEADS, "attn_k_norm": WIDTH // HEADS}
            add(f"blk.{layer}.ffn_gate_inp", EXPERTS, WIDTH, kind=GGMLQuantizationType.F32)
            for part in ("gate", "up"):
                add(f"blk.{layer}.ffn_{part}_exps", EXPERTS, EXPERT_INNER, WIDTH)
            add(f"blk.{layer}.ffn_down_exps", EXPERTS, WIDTH, EXPERT_INNER)
        else:
            for part in ("gate", "up"):
                add(f"blk.{layer}.ffn_{part}", INNER, WIDTH)
            add(f"blk.{layer}.ffn_down", WIDTH, INNER)
        for name, width in norms.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for key, value in more.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantised(path: Path, name: str) -> torch.Tensor:
    """A tensor of a file, by the gguf package."""
    from gguf import GGUFReader, dequantize

    (found,) = [tensor for tensor in GGUFReader(path).tensors if tensor.name == name]
    return torch.from_numpy(np.copy(dequantize(found.data, found.tensor_type)))
