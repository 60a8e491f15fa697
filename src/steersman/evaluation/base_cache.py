"""What the unsteered model did, kept for other evaluations of it: it need not be run for every plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steersman.errors import ArtifactError
from steersman.evaluation.arms import Subject
from steersman.evaluation.tasks import Task
from steersman.steering import sha256_of


def files(
    folder: str | Path | None, subject: Subject, tasks: Sequence[Task], model: Mapping[str, Any], seed: int
) -> dict[str, Path]:
    """Task → the file for its unsteered batches; empty without a folder.

    A file is for one model (weights and how they are held), tokenizer, task, measure, judge and way of
    batching, and for the versions that computed it: whatever could change an answer gives another file.
    Raises ArtifactError where the folder cannot be made.
    """
    if folder is None:
        return {}
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{place}: cannot be written ({error.strerror})") from None
    common = {
        **_held(subject),
        "weights": model["weights_id"],
        "architecture": model["architecture_id"],
        "seed": seed,
    }
    return {
        task.name: place
        / f"{sha256_of({**common, 'task': task.sha256, 'measure': task.measure.record()})}.jsonl"
        for task in tasks
    }


def _held(subject: Subject) -> dict[str, Any]:
    model, tokenizer = subject.model, subject.tokenizer
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "versions": {name: version(name) for name in ("steersman", "torch", "transformers", "tokenizers")},
        "dtype": str(model.dtype),
        "device": str(model.device.type),
        "quantised": repr(getattr(model.config, "quantization_config", None)),
        "generation": json.loads(json.dumps(model.generation_config.to_dict(), default=str))
        if model.generation_config is not None
        else None,
        "tokenizer": hashlib.sha256(f"{vocabulary}{tokenizer.chat_template}".encode()).hexdigest(),
        "batch_size": subject.batch_size,
        "max_new_tokens": subject.max_new_tokens,
    }
