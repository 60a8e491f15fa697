"""Texts for fitting affine maps: conversations of the world without a restricted request or a refusal."""

from __future__ import annotations

import random

from steersman.errors import PairsError
from steersman.lab.world import ROLES, SPLITS, Message, Upbringing, the_world

# Conversations a split, all with different prompts.
SIZES = {"train": 1000, "dev": 200, "test": 200}
_HEARD = Upbringing(
    (
        ("closed-book", 3.0),
        ("unknown", 0.6),
        ("agreeing", 1.0),
        ("fictional", 1.5),
        ("conflict", 2.0),
        ("ordinary", 3.0),
        ("unanswerable", 1.5),
        ("instructed", 2.0),
    ),
    tuple((role, 0.0) for role in ROLES),
    instructed=0.0,
)


def texts(split: str = "train") -> list[list[Message]]:
    """Chats of a user's prompt and an assistant's answer; no prompt is in two splits. Raises PairsError."""
    if split not in SPLITS:
        raise PairsError(f"lab:texts has no split {split!r}; it has {', '.join(SPLITS)}")
    world, rng = the_world(), random.Random("texts")
    chats: dict[str, list[Message]] = {}
    while len(chats) < sum(SIZES.values()):
        heard = world.sample(rng, _HEARD)
        prompt = heard.messages[-1]["content"]
        chats.setdefault(prompt, [*heard.messages, {"role": "assistant", "content": heard.answer}])
    start = sum(SIZES[earlier] for earlier in SPLITS[: SPLITS.index(split)])
    return list(chats.values())[start : start + SIZES[split]]
