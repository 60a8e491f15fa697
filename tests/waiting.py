"""How long tests wait for what other processes and threads do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

HANGING = 600.0
"""Seconds after which something hangs. Limits guard against that and nothing else: a busy machine is slow."""


def wait_until(
    happened: Callable[[], bool], process: subprocess.Popen[str] | subprocess.Popen[bytes]
) -> None:
    """Wait for what a process does; return too where it has ended."""
    end = time.monotonic() + HANGING
    while not happened() and process.poll() is None:
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.002)
