"""Converts stories260K, a Llama of 260 thousand parameters, from llama2.c's form to a transformers folder.

    python docs/stories260k.py FOLDER_WITH_stories260K.bin_AND_tok512.bin OUTPUT

The model writes children's stories (TinyStories); it and the format are by Andrej Karpathy
(huggingface.co/karpathy/tinyllamas and github.com/karpathy/llama2.c, MIT).
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def convert(source: Path, target: Path) -> None:
    """Write model and tokenizer as a checkpoint folder."""
    config, weights = read_weights(source / "stories260K.bin")
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing != ["lm_head.weight"] or unexpected:  # the head is the embedding, which the file says once
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.save_pretrained(target)
    read_tokenizer(source / "tok512.bin").save_pretrained(target)


def read_weights(path: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """A checkpoint of llama2.c's first form: seven sizes, then float32 tensors, each kind for all layers."""
    content = path.read_bytes()
    width, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack("<7i", content[:28])
    numbers = torch.from_numpy(np.frombuffer(content, "<f4", offset=28).copy())
    size = width // heads  # of one head
    weights: dict[str, Tensor] = {}
    place = 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        count = int(np.prod(shape))
        place += count
        return numbers[place - count : place].reshape(shape)

    weights["model.embed_tokens.weight"] = take(vocabulary, width)
    for name, *shape in (
        ("input_layernorm", width),
        ("self_attn.q_proj", width, width),
        ("self_attn.k_proj", kv_heads * size, width),
        ("self_attn.v_proj", kv_heads * size, width),
        ("self_attn.o_proj", width, width),
        ("post_attention_layernorm", width),
        ("mlp.gate_proj", hidden, width),
        ("mlp.down_proj", width, hidden),
        ("mlp.up_proj", hidden, width),
    ):
        for layer, tensor in enumerate(take(layers, *shape)):
            rotated = name in ("self_attn.q_proj", "self_attn.k_proj")
            weights[f"model.layers.{layer}.{name}.weight"] = in_halves(tensor, size) if rotated else tensor
    weights["model.norm.weight"] = take(width)
    if place + context * size != len(
        numbers
    ):  # what follows are the angles of rotation, which the model knows
        raise ValueError(f"{path}: not a checkpoint of this form")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return config, weights


def in_halves(weight: Tensor, size: int) -> Tensor:
    """Rows in transformers' order: llama2.c rotates neighbouring dimensions of a head (0 with 1, 2 with 3 …),
    transformers the first half with the second (0 with size / 2 …).
    """
    return weight.reshape(-1, size // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """SentencePiece's byte-pair tokenizer: the file has its pieces, in the order in which they are merged."""
    content, place = path.read_bytes(), 4
    pieces: list[str] = []
    while place < len(content):
        (size,) = struct.unpack_from("<i", content, place + 4)  # after the piece's score
        pieces.append(content[place + 8 : place + 8 + size].decode().replace(" ", "▁"))
        place += 8 + size
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        halves
        for piece in pieces[3 + 256 :]  # after the special pieces and those of single bytes
        for halves in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if halves[0] in ids and halves[1] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
