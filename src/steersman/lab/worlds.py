"""The worlds that the lab's models grow up in: what each says in training, and its words."""

from __future__ import annotations

import random
from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from steersman.lab.numbers_world import numbers_vocabulary, the_numbers_world
from steersman.lab.recipes import Recipe
from steersman.lab.tokenizer import build_tokenizer
from steersman.lab.world import Conversation, the_world, vocabulary

Speaker = Callable[[random.Random], Conversation]

_WORDS = {"town": vocabulary, "numbers": numbers_vocabulary}


def speaker_of(recipe: Recipe) -> Speaker:
    """What draws one training conversation after another."""
    if recipe.world == "numbers":
        return the_numbers_world().sample
    return lambda rng: the_world().sample(rng, recipe.upbringing)


def tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer over the words of a recipe's world."""
    return build_tokenizer(recipe.tokens, _WORDS[recipe.world]())
