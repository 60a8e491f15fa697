"""Two models that know the same in different bases, and concepts that arrive in the second or do not."""

from __future__ import annotations

import copy
import functools
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import families as f
from experts.test_counting import WORDS, tokenizer
from steersman import AffineMap, ConceptVector, ContrastPair, ContrastPairs, refine_concept
from steersman.concepts.fitting import fit_affine_map

WIDTH = 32


@functools.cache
def source() -> nn.Module:
    """A small Llama whose states follow the words."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=f.VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_decoder().embed_tokens.weight.normal_()
    return model


@functools.cache
def basis() -> Tensor:
    """The orthogonal change of basis between the twins, [width, width]."""
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)))[0]


@functools.cache
def target(forgets: bool = False) -> nn.Module:
    """The source in another basis: h_target = Q h_source, exactly. One that `forgets` takes the two words of
    the concept for one and the same.
    """
    model = copy.deepcopy(source())
    turn = basis()
    decoder = model.get_decoder()
    with torch.no_grad():
        embedding = decoder.embed_tokens.weight
        if forgets:
            embedding[word_id(1)] = embedding[word_id(0)]
        embedding.copy_(embedding @ turn.T)
        for layer in decoder.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(layer.self_attn, name).weight
                weight.copy_(weight @ turn.T)
            for name in ("gate_proj", "up_proj"):
                weight = getattr(layer.mlp, name).weight
                weight.copy_(weight @ turn.T)
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight.copy_(turn @ module.weight)
        model.lm_head.weight.copy_(model.lm_head.weight @ turn.T)
    return model


def word_id(number: int) -> int:
    found: int = tokenizer().convert_tokens_to_ids(WORDS[number])
    return found


@functools.cache
def concept_pairs(number: int = 60, seed: int = 0) -> ContrastPairs:
    """Texts that end with one word on the positive side, with another on the negative one."""
    return _pairs("words.jsonl", number, seed, WORDS[:1], WORDS[1:2])


@functools.cache
def noise_pairs(number: int = 60) -> ContrastPairs:
    """Texts whose sides differ by chance alone."""
    return _pairs("noise.jsonl", number, 1, WORDS[2:], WORDS[2:])


def _pairs(name: str, number: int, seed: int, above: list[str], below: list[str]) -> ContrastPairs:
    draw = random.Random(seed)

    def text(ends: list[str]) -> str:
        return " ".join([*draw.choices(WORDS[2:], k=3), draw.choice(ends)])

    return ContrastPairs(
        (ContrastPair(text(above), text(below), group=f"g{n // 2}", id=str(n)) for n in range(number)), name
    )


@functools.cache
def texts() -> list[str]:
    """Texts to fit maps on, without the words of the concept."""
    draw = random.Random(5)
    return [" ".join(draw.choices(WORDS[2:], k=draw.randint(3, 9))) for _ in range(150)]


@functools.cache
def bridge(forgets: bool = False) -> AffineMap:
    """The map between the twins."""
    return fit_affine_map((source(), tokenizer()), (target(forgets), tokenizer()), texts())


@functools.cache
def concept(noise: bool = False) -> ConceptVector:
    """What tells the two words apart; or what tells nothing."""
    return refine_concept(source(), tokenizer(), noise_pairs() if noise else concept_pairs())


def save(model: nn.Module, folder: Path) -> Path:
    """A checkpoint with its tokenizer."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer().save_pretrained(folder)
    return folder
