"""Requests over HTTP to the tests' server, and what must come back."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from steersman import Steering

TOKENS = 8


def completion(
    prompt: object, asked: str | None = None, tokens: int = TOKENS, **fields: Any
) -> dict[str, Any]:
    """The body of a greedy completion that tells its tokens."""
    xargs = {} if asked is None else {"vllm_xargs": {"steering": asked}}
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **xargs,
        **fields,
    }


def answered(http: httpx.Client, body: Mapping[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    """A request that is answered."""
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def tokens_of(answer: Mapping[str, Any], choice: int = 0) -> list[int]:
    """The tokens of one choice of a completion."""
    tokens: list[int] = answer["choices"][choice]["token_ids"]
    return tokens


def receipt_for(
    plan: Steering | None, asked: str | None, answers: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """The receipt of a plan, slowly: token by token. `answers`: (prompt's tokens, answer's tokens)."""
    if plan is None:
        return {"steering": None, "fingerprint": None, "steerings": [], "tokens": {}, "dtype": "float32"}
    counts: dict[str, set[tuple[int, int]]] = {}
    for number, (prompt, made) in enumerate(answers):
        for position in range(prompt + made - 1):
            for edit in plan.edits:
                held = {
                    "all": True,
                    "prompt": position < prompt,
                    "generated": position >= prompt,
                    "answer": position >= prompt - 1,
                }[edit.scope]
                for layer in edit.layers if held else ():
                    counts.setdefault(f"{edit.point}:{layer}", set()).add((number, position))
    return {
        "steering": asked,
        "fingerprint": plan.fingerprint,
        "tokens": {site: len(held) for site, held in counts.items()},
        "dtype": "float32",
    }


def plan_body(folder: str, **fields: str) -> dict[str, str]:
    """What brings a plan to the server: the files of its folder in base64."""
    return {
        "manifest": base64.b64encode((Path(folder) / "manifest.json").read_bytes()).decode(),
        "tensors": base64.b64encode((Path(folder) / "tensors.safetensors").read_bytes()).decode(),
        **fields,
    }
