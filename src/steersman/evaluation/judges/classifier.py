"""The judge by a classifier: a sequence-classification checkpoint of transformers that reads the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.errors import JudgeError
from steersman.evaluation.judges.verdict import Verdict
from steersman.evaluation.measures.measure import Metric

if TYPE_CHECKING:
    from steersman.evaluation.tasks.item import Item

THRESHOLD = 0.5
BATCH = 32


@dataclass(frozen=True)
class ClassifierJudge:
    """Positive: the label's probability is at least one half. Negative: it is less. Neither: an empty answer.

    Args:
        place: A folder or a name on the Hub. It is opened when it is first needed.
        label: The label whose probability counts (softmax over labels; sigmoid where they do not exclude each
            other).
    """

    place: str
    label: str

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("probability", f"probability of {self.label}", "mean"),)

    @property
    def sides(self) -> tuple[str, str]:
        return self.label, f"not {self.label}"

    def record(self) -> dict[str, Any]:
        """Raises JudgeError where the classifier cannot be opened, or has no such label."""
        from steersman.models.identity import weights_id

        model, _ = _opened(self.place)
        _label_place(self, model)
        return {
            "judge": "classifier",
            "model": self.place,
            "weights_id": weights_id(model),
            "label": self.label,
            "threshold": THRESHOLD,
        }

    def judge(self, items: Sequence[Item], texts: Sequence[str]) -> list[Verdict]:
        model, tokenizer = _opened(self.place)
        place = _label_place(self, model)
        places = [index for index, text in enumerate(texts) if text.strip()]
        found = [Verdict("neither", why="an empty answer") for _ in texts]
        size = BATCH if tokenizer.pad_token_id is not None else 1
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            chances = _probabilities(model, tokenizer, [texts[index] for index in chosen])
            for index, chance in zip(chosen, chances, strict=True):
                found[index] = _verdict(chance[place])
        return found


def _verdict(probability: float) -> Verdict:
    if math.isnan(probability):
        return Verdict(None, why="the classifier's probability is not a number")
    return Verdict("positive" if probability >= THRESHOLD else "negative", {"probability": probability})


def _label_place(judge: ClassifierJudge, model: Any) -> int:
    labels = {str(name): int(place) for place, name in model.config.id2label.items()}
    if judge.label not in labels:
        known = ", ".join(labels)
        raise JudgeError(
            f"classifier:{judge.place}: no label {judge.label!r}; right is classifier:MODEL#LABEL with "
            f"the label that means the positive side, one of {known}"
        )
    return labels[judge.label]


def _probabilities(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[float]]:
    """Of each text the probability of each label. Longer texts than the model reads are cut."""
    import torch

    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 30))
    encoded = tokenizer(
        list(texts), return_tensors="pt", padding=len(texts) > 1, truncation=True, max_length=longest
    ).to(model.device)
    with torch.inference_mode():
        logits = model(**encoded).logits.double()
    one_of_many = model.config.problem_type != "multi_label_classification" and logits.shape[-1] > 1
    chances: list[list[float]] = (logits.softmax(dim=-1) if one_of_many else logits.sigmoid()).tolist()
    return chances


@lru_cache(maxsize=2)
def _opened(place: str) -> tuple[Any, Any]:
    """The classifier and its tokenizer; no code of others is run and no pickle is read."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from steersman.models.stored_tensors import check_folder

    try:
        check_folder(Path(place))
        tokenizer = AutoTokenizer.from_pretrained(place)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            place, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise JudgeError(
            f"classifier:{place}: cannot be opened ({reason}); right is a folder or Hub name of a classifier"
        ) from None
    model, told = loaded
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])[0]
        raise JudgeError(f"classifier:{place}: is no classifier: its checkpoint has no {missing}")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
