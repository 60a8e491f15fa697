"""Where what can be made again is kept: the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "STEERSMAN_CACHE"


def cache_directory() -> Path:
    """$STEERSMAN_CACHE, or ~/.cache/steersman."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "steersman"
