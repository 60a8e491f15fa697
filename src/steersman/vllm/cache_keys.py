"""What a block of the prefix cache is known by: the steering of each of its tokens.

The keys and values of a token depend on the edits made at that token, and through attention on those of
the tokens before it. The engine hashes a block together with its predecessor, so a block may be reused just
where its own tokens were edited alike: same plans, same strengths, same roles. A block none of whose tokens
is edited has no key of its own, and is shared with unsteered requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from steersman.vllm.roles import role_runs

TAG = "steering"


def block_key(first: int, end: int, prompt_length: int, keys: Sequence[str]) -> tuple[str, str] | None:
    """The key of a block with the positions first … end − 1; None where none of its tokens is edited.

    Args:
        first: The block's first position.
        end: One past its last.
        prompt_length: Tokens of the request's prompt.
        keys: Of each role, what identifies the edits that hold for its tokens; empty where there are none.
    """
    runs: list[tuple[int, str]] = []
    for start, stop, role in role_runs(first, end, prompt_length):
        if runs and runs[-1][1] == keys[role]:
            runs[-1] = (runs[-1][0] + stop - start, keys[role])
        else:
            runs.append((stop - start, keys[role]))
    if all(not key for _, key in runs):
        return None
    return TAG, ";".join(f"{length}:{key}" for length, key in runs)
