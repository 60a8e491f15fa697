"""A tiny random Llama in a GGUF file, as llama.cpp's converter would write one: with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

WIDTH, LAYERS, HEADS, INNER = 64, 3, 4, 96
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


def write_gguf(path: Path, seed: int = 0, architecture: str = "llama", **more: Any) -> Path:
    """Matrices in Q4_1, embeddings in Q8_0, norms in F32. `more`: metadata and, where arrays, tensors."""
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

    def add(name: str, rows: int, columns: int, kind: GGMLQuantizationType) -> None:
        matrix = (draws.standard_normal((rows, columns)) * 0.15).astype(np.float32)
        writer.add_tensor(f"{name}.weight", quantize(matrix, kind), raw_dtype=kind)

    add("token_embd", len(tokens()), WIDTH, GGMLQuantizationType.Q8_0)
    for layer in range(LAYERS):
        for name, rows, columns in (
            *((f"attn_{part}", WIDTH, WIDTH) for part in ("q", "k", "v", "output")),
            ("ffn_gate", INNER, WIDTH),
            ("ffn_up", INNER, WIDTH),
            ("ffn_down", WIDTH, INNER),
        ):
            add(f"blk.{layer}.{name}", rows, columns, GGMLQuantizationType.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
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
