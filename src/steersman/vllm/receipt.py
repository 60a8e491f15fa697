"""What was applied to a request: its steerings, their fingerprints, and the tokens each site has edited."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from steersman.edits import ROLES
from steersman.vllm.registry import Resolved
from steersman.vllm.roles import role_runs


def receipt_of(
    resolved: Resolved | None, answers: Iterable[tuple[int, int]], dtype: str | None
) -> dict[str, Any]:
    """The receipt of a request that has ended; as of `Steering.apply`, each token counts once a site.

    Args:
        resolved: What it followed; None: nothing.
        answers: Of each answer, the tokens of its prompt, P, and its own, N; the last of them was not fed
            back, and not edited.
        dtype: That in which the engine computed them.
    """
    if resolved is None:
        return {"steering": None, "fingerprint": None, "steerings": [], "tokens": {}, "dtype": dtype}
    counts = [0] * len(ROLES)
    for prompt_tokens, answer_tokens in answers:
        end = prompt_tokens + max(answer_tokens - 1, 0)
        for first, stop, role in role_runs(0, end, prompt_tokens):
            counts[role] += stop - first
    tokens = {
        f"{point}:{layer}": sum(count for role, count in zip(ROLES, counts, strict=True) if role in held)
        for (point, layer), held in sorted(resolved.roles.items())
    }
    return {
        "steering": ",".join(map(str, resolved.wanted)),
        "fingerprint": resolved.fingerprint,
        "steerings": [
            {"name": one.name, "strength": one.strength, "fingerprint": resolved.fingerprints[one.name]}
            for one in resolved.wanted
        ],
        "tokens": tokens,
        "dtype": dtype,
    }
