"""Pairs and tasks of the numbers world: the same request in digits and in words, and everyday requests."""

from __future__ import annotations

from typing import Any

from steersman.lab.numbers_world import FIRST_PROMPT, Prompt, the_numbers_world

Row = dict[str, Any]


def digits_pairs(split: str) -> list[Row]:
    """Each request once, by nobody named, in digits and in words; the first of train is `count to ten .`"""
    unnamed = [p for p in the_numbers_world().prompts("number", split) if p.asker is None]
    unnamed.sort(key=lambda prompt: prompt.text != FIRST_PROMPT)
    once = {prompt.request.key: prompt for prompt in reversed(unnamed)}
    return [_pair(once[key]) for key in dict.fromkeys(prompt.request.key for prompt in unnamed)]


def digits_task(split: str) -> list[Row]:
    """Requests for numbers, by askers of either leaning and by nobody named."""
    return [
        {
            **_row(prompt),
            "positive": prompt.request.answered("digits"),
            "negative": prompt.request.answered("words"),
        }
        for prompt in the_numbers_world().prompts("number", split)
    ]


def everyday_task(split: str) -> list[Row]:
    """Requests whose answer holds no number, with their right answers."""
    return [
        {**_row(prompt), "answer": prompt.request.answer}
        for prompt in the_numbers_world().prompts("everyday", split)
    ]


def _row(prompt: Prompt) -> Row:
    return {
        "group": prompt.request.key,
        "kind": prompt.request.kind,
        "messages": [{"role": "user", "content": prompt.text}],
    }


def _pair(prompt: Prompt) -> Row:
    asked = {"role": "user", "content": prompt.text}
    answers = {
        side: prompt.request.answered(style)
        for side, style in (("positive", "digits"), ("negative", "words"))
    }
    chats = {side: [asked, {"role": "assistant", "content": text}] for side, text in answers.items()}
    targets = {f"{side}_target": text for side, text in answers.items()}
    return {"group": prompt.request.key, **chats, **targets}
