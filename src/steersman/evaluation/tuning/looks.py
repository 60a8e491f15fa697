"""How often a test was looked at: each further look makes what it shows weaker."""

from __future__ import annotations

import json
import os
import warnings

from steersman.cache import cache_directory
from steersman.steering import sha256_of


def count_look(test: str, weights: str) -> int | None:
    """Take note of one more look at a test (sha256 of what its items were taken from) with a model (its
    weights' id), and say the how many-th it is on this machine; None where no note can be taken.
    """
    path = cache_directory() / "test_looks.json"
    key = sha256_of([test, weights])
    try:
        known = json.loads(path.read_bytes()) if path.is_file() else {}
        looks = {str(name): int(count) for name, count in dict(known).items()}
    except (OSError, ValueError, TypeError):
        looks = {}
    looks[key] = looks.get(key, 0) + 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.new")
        draft.write_text(json.dumps(looks, sort_keys=True), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        warnings.warn(
            f"{path}: cannot be written ({error.strerror}), so looks at this test are not counted",
            stacklevel=2,
        )
        return None
    return looks[key]
