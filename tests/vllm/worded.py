"""Tiny random models that read and write the lab's words, for what needs a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine import save_tiny

import steersman
from steersman.models.loading import load_tokenizer

CONTEXT = 256


def save_worded(name: str, folder: Path) -> tuple[Any, Any]:
    """Write a tiny checkpoint of a family with the lab's tokenizer, and open both with transformers."""
    tokenizer = load_tokenizer("lab:moe")
    save_tiny(name, folder, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT)
    tokenizer.save_pretrained(folder)
    return steersman.load_model(str(folder))
