"""Tiny models and tokenizers that maps are fitted between, and texts for them."""

from __future__ import annotations

import functools

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from steersman.pairs import Content

STEMS, ENDS = ["ba", "de", "ki", "lo", "mu", "ra", "si", "to"], ["n", "r", "s", "t"]
WORDS = [stem + end for stem in STEMS for end in ENDS]
SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Model = tuple[nn.Module, PreTrainedTokenizerFast]


@functools.cache
def tokenizer(split: bool = False) -> PreTrainedTokenizerFast:
    """Word by word; with `split` a word is two tokens, its stem and its end."""
    known = [*SPECIAL, *(STEMS + ENDS if split else WORDS)]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(known)}, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()
    if split:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import Sequence

        backend.pre_tokenizer = Sequence([Whitespace(), Split(Regex("(?<=^..)"), "isolated")])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    fast.chat_template = TEMPLATE
    return fast


def llama(width: int = 16, layers: int = 3, *, seed: int = 0, context: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def gpt2(width: int = 12, *, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return AutoModelForCausalLM.from_config(GPT2Config(**sizes, initializer_range=0.2)).eval()


@functools.cache
def small() -> Model:
    return llama(), tokenizer()


@functools.cache
def big() -> Model:
    return llama(24, 2, seed=3), tokenizer(split=True)


def texts(number: int = 60, *, seed: int = 0, longest: int = 12, chats: bool = True) -> list[Content]:
    """Texts and chats, some of which the assistant ends."""
    drawn = np.random.default_rng(seed)

    def words() -> str:
        return " ".join(drawn.choice(WORDS, drawn.integers(3, longest)))

    made: list[Content] = []
    for place in range(number):
        chat = [{"role": "user", "content": words()}, {"role": "assistant", "content": words()}]
        made.append(words() if not chats or place % 3 == 0 else chat[: 1 + place % 2])
    return made


def rotated(model: nn.Module, turn: Tensor) -> nn.Module:
    """A copy of a Llama whose residual stream is turned by an orthogonal matrix: h becomes Q h. Its norms
    have weights of 1, so that they commute with it.
    """
    import copy

    turned = copy.deepcopy(model)
    with torch.no_grad():
        turned.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ turn.T)
        for layer in turned.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(layer.self_attn, name).weight
                weight.copy_(weight @ turn.T)
            for name in ("gate_proj", "up_proj"):
                weight = getattr(layer.mlp, name).weight
                weight.copy_(weight @ turn.T)
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.copy_(turn @ weight)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                assert bool((norm.weight == 1).all())
        turned.lm_head.weight.copy_(model.lm_head.weight @ turn.T)
    return turned
