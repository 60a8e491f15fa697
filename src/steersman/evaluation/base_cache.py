"""What the unsteered model did, kept for other evaluations of it: it need not be run for every plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steersman.chat_record import CHATS
from steersman.errors import ArtifactError, valid_name
from steersman.evaluation.arms import Subject
from steersman.evaluation.tasks import Task
from steersman.steering import sha256_of

UNHELD = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Of a model's config, what changes nothing that it says (or is told elsewhere)."""


def files(
    folder: str | Path | None, subject: Subject, tasks: Sequence[Task], told: Mapping[str, Any], seed: int
) -> dict[str, Path]:
    """Task → the file for its unsteered batches; empty without a folder.

    A file is for one model (weights and how they are held), tokenizer, task, measure, judge and way of
    batching, and for the versions that computed it: whatever could change an answer gives another file.
    Raises ArtifactError where the folder cannot be made.
    """
    if folder is None:
        return {}
    place = Path(valid_name(folder, ArtifactError))
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{place}: cannot be written ({error.strerror})") from None
    common = {
        **held(subject, told.get(CHATS)),
        "versions": {name: version(name) for name in ("steersman", "torch", "transformers", "tokenizers")},
        "batch_size": subject.batch_size,
        "max_new_tokens": subject.max_new_tokens,
        "weights": told["model"]["weights_id"],
        "architecture": told["model"]["architecture_id"],
        "seed": seed,
    }
    return {
        task.name: place
        / f"{sha256_of({**common, 'task': task.sha256, 'measure': task.measure.record()})}.jsonl"
        for task in tasks
    }


def held(subject: Subject, chats: Any) -> dict[str, Any]:
    """How a model's weights are held and asked: what else than they decides its answers; `chats`: how they
    are rendered.
    """
    model, tokenizer = subject.model, subject.tokenizer
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    for name in ("padding", "truncation"):  # those are of whoever used it last
        rules.pop(name, None)
    return {
        **subject.held(),
        "config": _digest({key: v for key, v in model.config.to_dict().items() if key not in UNHELD}),
        "attention": getattr(model.config, "_attn_implementation", None),
        "quantised": repr(getattr(model.config, "quantization_config", None)),
        "generation": None if model.generation_config is None else _digest(model.generation_config.to_dict()),
        "tokenizer": _digest([vocabulary, str(tokenizer.chat_template), rules, chats]),
    }


def _digest(settings: Any) -> str:
    # Not canonical JSON: a config may hold infinity.
    return hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode()).hexdigest()
