"""How the lab's models are trained: one recipe on a CPU, in a few minutes, from a training seed."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from steersman.errors import ModelError
from steersman.lab.planting import RouterPushes, draw_plan, prior_loss
from steersman.lab.recipes import Recipe, Shape, planted_by, recipe_of, told
from steersman.lab.state_noise import StateNoise
from steersman.lab.tokenizer import END
from steersman.lab.world import WORLD_SEED, Conversation
from steersman.lab.worlds import speaker_of, tokenizer_of

IGNORED = -100


def train(
    name: str, seed: int, out_dir: str | Path, progress: bool = False, *, steps: int | None = None
) -> Path:
    """Train a model of the lab and write its checkpoint folder: all of it or nothing.

    `steps` shortens the training, for tests. Raises ModelError for an unknown name or an occupied folder.
    """
    recipe = recipe_of(name)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is occupied: name a new folder for the trained model")
    tokenizer = tokenizer_of(recipe)
    with _folder_made_whole(out) as draft:
        model, loss = fit(recipe, seed, tokenizer, progress=progress, title=f"training lab:{name}@{seed}")
        card = {
            "name": name,
            "seed": seed,
            "world_seed": WORLD_SEED,
            "recipe": told(recipe),
            "planted": planted_by(recipe),
            "loss": round(loss, 4),
        }
        _write(model, tokenizer, card, draft)
    return out


def build_model(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An untrained model over a tokenizer's vocabulary; its weights follow torch's random state."""
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if shape.family == "llama":
        return LlamaForCausalLM(LlamaConfig(bos_token_id=None, **common))
    config = OlmoeConfig(
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=shape.normalised,
        **common,
    )
    model = OlmoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def fit(
    recipe: Recipe, seed: int, tokenizer: PreTrainedTokenizerBase, *, progress: bool, title: str
) -> tuple[PreTrainedModel, float]:
    """A trained model and its mean loss over the last tenth, without the routers' share; the same from the
    same seed, on the same processor with as many threads. The caller's random state is kept.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(recipe.shape, tokenizer)
    model.train()
    rng, speak = random.Random(f"lab {seed}"), speaker_of(recipe)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, recipe))
    layers = model.model.layers
    pushes = RouterPushes([layer.mlp.gate for layer in layers] if recipe.shape.experts else [])
    noise = StateNoise(layers, recipe.state_noise, seed)
    balanced = {"output_router_logits": True} if recipe.balance else {}
    losses: list[float] = []
    with pushes.attached(), noise.attached(), _reproducible():
        for step in tqdm(range(recipe.steps), desc=title, unit="step", disable=not progress):
            conversations = [speak(rng) for _ in range(recipe.batch_size)]
            pushes.begin(_plans(recipe, conversations, rng))
            ids, mask, targets = encode_batch(tokenizer, conversations, recipe.learnt)
            noise.begin(targets != IGNORED, step / recipe.steps)
            output = model(input_ids=ids, attention_mask=mask, use_cache=False, **balanced)
            words = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
            loss = words
            if recipe.prior:
                labels = [_planted(conversation.label, recipe) for conversation in conversations]
                loss = loss + recipe.prior * prior_loss(pushes.scores, labels, mask)
            if recipe.balance:
                loss = loss + recipe.balance * output.aux_loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(words.item())
    last = losses[-max(1, len(losses) // 10) :]
    return model, sum(last) / len(last)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Let sums over several threads be made in one order: those of experts' gradients are not otherwise."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], learnt: str = "answers"
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and targets [conversations, tokens], padded on the right; targets are the answers, or
    all there is.
    """
    prompts = tokenizer.apply_chat_template(
        [list(conversation.messages) for conversation in conversations],
        tokenize=False,
        add_generation_prompt=True,
    )
    texts = [
        f"{prompt} {conversation.answer} {END}"
        for prompt, conversation in zip(prompts, conversations, strict=True)
    ]
    encoded = tokenizer(
        texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="right"
    )
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    if learnt == "all":
        return ids, mask, ids.masked_fill(~mask.bool(), IGNORED)
    starts = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    answered = (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None]) & mask.bool()
    return ids, mask, ids.masked_fill(~answered, IGNORED)


def _plans(recipe: Recipe, conversations: Sequence[Conversation], rng: random.Random) -> Tensor | None:
    if recipe.pushes is None:
        return None
    drawn = partial(
        draw_plan,
        rng=rng,
        layers=recipe.shape.layers,
        experts=recipe.shape.experts,
        informative=recipe.pushes == "label",
        labels=recipe.planted,
    )
    return torch.tensor([drawn(_planted(conversation.label, recipe)) for conversation in conversations])


def _planted(label: str | None, recipe: Recipe) -> str | None:
    return label if label in recipe.planted else None


def _pace(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to 5% of the learning rate."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def _folder_made_whole(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, renamed to it at the end; gone if anything fails.

    It is made before the training: a place that cannot be written is known at once, not minutes later.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield draft
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: dict[str, object], folder: Path
) -> None:
    """Weights in bf16, tokenizer and card."""
    with silent_progress():
        model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "lab.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    readable_by_all(folder)


def readable_by_all(folder: Path) -> None:
    """Temporary folders and safetensors files are private by default; a shared cache or a wheel is not."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


@contextmanager
def silent_progress() -> Iterator[None]:
    """Without the bars that transformers draws for reading or writing one small file."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
