"""Texts with scored tokens, and items for screens, for tests of models of any vocabulary."""

from __future__ import annotations

from torch import nn

from steersman.evaluation.screening.texts import Reading
from steersman.models.architecture import RouterSite, find_routers
from steersman.models.scored_text import Text

TEXTS = ((5, 9, 12, 7, 11, 6, 8), (10, 6, 13, 14, 9, 5, 7, 12, 8), (8, 8, 5, 13, 6, 10, 7, 9, 11, 14, 12, 5))
PROMPT = 4


def readings(vocabulary: int) -> dict[str, Reading]:
    """Two ways to score the texts: two tokens at the last place, and all after the prompt."""
    last, first = vocabulary - 1, vocabulary - 2
    fork = [
        Text(item, ids, PROMPT, ((len(ids) - 1, first, 1.0), (len(ids) - 1, last, -1.0)))
        for item, ids in enumerate(TEXTS)
    ]
    whole = [
        Text(item, ids[:-1], PROMPT, tuple((place - 1, ids[place], 1.0) for place in range(PROMPT, len(ids))))
        for item, ids in enumerate(TEXTS)
    ]
    groups = tuple("abc")
    return {"fork": Reading("fork", tuple(fork), groups), "whole": Reading("whole", tuple(whole), groups)}


def vocabulary(model: nn.Module) -> int:
    """How many tokens a model knows."""
    embedding: nn.Embedding = model.get_input_embeddings()
    return embedding.num_embeddings


def sites_of(model: nn.Module) -> list[RouterSite]:
    """Its routers that can be steered."""
    return [site for site in find_routers(model) if site.facts.reason is None]
