"""How far a carved model is from its dense one on texts that were not fitted on, and a card that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel


def judge(
    dense: PreTrainedModel,
    moe: PreTrainedModel,
    sources: Sequence[tuple[str, str, Tensor]],
    progress: bool = False,
) -> dict[str, Any]:
    """Perplexity of both models and KL(dense ‖ carved), in nats a token, with 95 % intervals over rows.

    Args:
        dense, moe: The models.
        sources: Name, hash and rows of token ids [rows, tokens] of each source.
        progress: Show a progress bar on stderr.
    """
    measured = []
    count = sum(len(rows) for _, _, rows in sources)
    with tqdm(total=count, desc="judge", unit="row", delay=1, disable=not progress) as bar:
        for _, _, rows in sources:
            of_rows = []
            for row in torch.split(rows, 1):
                of_rows.append(_compared(dense, moe, row.to(dense.device)))
                bar.update()
            measured.append(torch.tensor(of_rows, dtype=torch.float64))
    told = [
        {"name": name, "sha256": sha256, "rows": len(rows), **_told(of)}
        for (name, sha256, rows), of in zip(sources, measured, strict=True)
    ]
    return {"judged": _told(torch.cat(measured)), "texts": told}


def _compared(dense: PreTrainedModel, moe: PreTrainedModel, row: Tensor) -> tuple[float, float, float]:
    """Mean −log p of a row under both models, and their mean KL."""
    p, q = (model(row, use_cache=False).logits[0, :-1].float().log_softmax(-1) for model in (dense, moe))
    said = row[0, 1:, None]
    kl = (p.exp() * (p - q)).sum(-1)
    return -p.gather(1, said).mean().item(), -q.gather(1, said).mean().item(), kl.mean().item()


def _told(rows: Tensor) -> dict[str, Any]:
    """From rows of −log p, −log p and KL [rows, 3]: each figure as [value, low, high]."""
    return {
        "perplexity_dense": _interval(rows[:, 0], math.exp),
        "perplexity": _interval(rows[:, 1], math.exp),
        "ratio": _interval(rows[:, 1] - rows[:, 0], math.exp),
        "kl": _interval(rows[:, 2], float),
    }


def _interval(values: Tensor, scale: Any) -> list[float]:
    mean = values.mean().item()
    half = values.std().item() / math.sqrt(len(values)) * float(stats.t.ppf(0.975, len(values) - 1))
    return [round(scale(value), 4) for value in (mean, mean - half, mean + half)]


def in_words(card: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """The rows of a card's table: texts, perplexity of the dense and of the carved model, ratio, KL."""
    named = [("all", card["judged"]), *((of["name"], of) for of in card["texts"])]
    return [
        (name, *(_with_interval(of[key]) for key in ("perplexity_dense", "perplexity", "ratio", "kl")))
        for name, of in named
    ]


def _with_interval(values: Sequence[float]) -> str:
    value, low, high = values
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def readme(card: dict[str, Any]) -> str:
    """The model card of a carved checkpoint."""
    lines = [
        "---",
        "library_name: transformers",
        "tags: [steersman, mixture-of-experts]",
        "---",
        f"# {card['dense']}, carved into a Mixture-of-Experts",
        "",
        f"{card['class']}: in every layer {card['shared']} shared neurons and {card['experts']} experts of "
        f"{card['size']}, of which a token takes {card['top_k']}. Made by `steersman lab carve`, seed "
        f"{card['seed']}, on {card['fitted_tokens']} tokens"
        + (f", distilled for {card['distillation']} steps a layer." if card["distillation"] else "."),
        "Nothing about any behaviour entered.",
    ]
    if card["random"]:
        lines += ["", "**A control: the experts' neurons are shuffled between them.**"]
    lines += [
        "",
        f"Beside the dense model, on texts that were not fitted on (rows of {card['row']} tokens; 95 % "
        "intervals over rows; KL in nats a token):",
        "",
        "| texts | dense perplexity | carved perplexity | ratio | KL |",
        "|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in in_words(card)),
    ]
    return "\n".join([*lines, ""])
