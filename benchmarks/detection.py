"""What detection costs: over plain forwards of the same batches, and against the way the reference does it.

The first rival is the decoder alone, on the very batches that detection makes, already tokenized and padded.
The second is the recipe of SteerMoE's published code (arXiv 2509.09660; github.com/adobe-research/SteerMoE):
one text at a time, the router logits of every token kept, top-k taken again from them, counts in Python loops
over layers and tokens. Both count the same pairs, and must find the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring import Ratio, interleaved, options, ratio, report
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedTokenizerFast

from steersman import ContrastPair, ContrastPairs, detect_experts
from steersman.rendering import encode

LAYERS, EXPERTS, TOP_K, WIDTH, VOCABULARY = 8, 16, 4, 256, 50304
"""OLMoE's, but for its width and layers."""
WORDS = [f"w{number}" for number in range(999)]
BATCH = 16


def model(width: int = WIDTH) -> nn.Module:
    """An OLMoE with random weights."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.1,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    ids = {token: number for number, token in enumerate(["<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=template)


def pairs(number: int, *, seed: int = 0, shortest: int = 10, longest: int = 60) -> ContrastPairs:
    """Chats of a question and an answer."""
    random = np.random.default_rng(seed)

    def words(least: int, most: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(least, most + 1)))

    def chat() -> list[dict[str, str]]:
        return [
            {"role": "user", "content": words(shortest // 2, longest // 2)},
            {"role": "assistant", "content": words(shortest // 2, longest // 2)},
        ]

    return ContrastPairs([ContrastPair(chat(), chat()) for _ in range(number)], name="made")


def batches_of(of: nn.Module, given: ContrastPairs) -> list[dict[str, Any]]:
    """What detection feeds to the decoder."""
    seen: list[dict[str, Any]] = []
    decoder = of.get_decoder()
    handle = decoder.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    detect_experts(of, tokenizer(), given, batch_size=BATCH)
    handle.remove()
    return seen


def plain(of: nn.Module, batches: list[dict[str, Any]]) -> Callable[[], None]:
    """Forwards of the decoder alone."""
    decoder = of.get_decoder()

    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                decoder(**batch)

    return run


def as_the_reference(of: nn.Module, given: ContrastPairs) -> np.ndarray[Any, Any]:
    """Counts [2, layers, experts], one text and one token at a time."""
    counts = np.zeros((2, LAYERS, EXPERTS), np.int64)
    for pair in given:
        for side, content in enumerate((pair.positive, pair.negative)):
            text = encode(tokenizer(), content, None, where=pair.where)
            with torch.no_grad():
                output = of(input_ids=torch.tensor([text.ids]), output_router_logits=True)
            kept = [logits.float().numpy() for logits in output.router_logits]
            for layer in range(LAYERS):
                for token in text.target:
                    chosen = np.argsort(-kept[layer][token], kind="stable")[:TOP_K]
                    for expert in chosen:
                        counts[side, layer, expert] += 1
    return counts


def against_the_reference(
    of: nn.Module, given: ContrastPairs, name: str, rounds: int | None, *, bound: float | None = None
) -> Ratio:
    """How much faster detection is, where both find the same."""
    found: dict[str, Any] = {}

    def reference() -> None:
        found["reference"] = as_the_reference(of, given)

    def detection() -> None:
        found["detection"] = detect_experts(of, tokenizer(), given, batch_size=BATCH).activations

    times = interleaved({"reference": reference, "detection": detection}, min(rounds or 2, 2), warm=0)
    if not np.array_equal(found["reference"], found["detection"]):
        raise SystemExit("the counts of detection and of the reference's recipe differ")
    name = f"the reference's recipe / detection, {len(given)} pairs, {name}"
    return ratio(name, times["reference"], times["detection"], bound=bound)


def main() -> None:
    """Print both ratios."""
    given = options(__doc__ or "")
    torch.set_num_threads(1)
    of, few = model(), pairs(64, seed=1)
    batches = batches_of(of, few)
    ratios = []
    times = interleaved(
        {
            "detection": lambda: detect_experts(of, tokenizer(), few, batch_size=BATCH),
            "plain": plain(of, batches),
            "plain again": plain(of, batches),
        },
        given.rounds or 15,
        warm=2,
    )
    ratios += [
        ratio("detection / a plain forward", times["detection"], times["plain"], bound=1.10),
        ratio("(noise: a plain forward / the same)", times["plain again"], times["plain"]),
    ]
    many = pairs(500, shortest=6, longest=14)
    ratios.append(against_the_reference(of, many, f"width {WIDTH}", given.rounds, bound=20))
    ratios.append(against_the_reference(model(32), many, "width 32", given.rounds))
    report(
        f"Detection, OLMoE of {LAYERS} layers × {EXPERTS} experts, top-{TOP_K}, width {WIDTH}",
        ratios,
        notes=f"CPU thread time; batches of {BATCH}; texts of 12 to 62 tokens, of 8 to 16 against the "
        "reference. Counts of both ways are equal. On a CPU both are bound by the forward, so that the wider "
        "the model, the less batches save.",
        name="detection",
        save=given.save,
    )


if __name__ == "__main__":
    main()
