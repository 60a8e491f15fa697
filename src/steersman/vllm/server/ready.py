"""Saying once that a server answers."""

from __future__ import annotations

import argparse
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable

EVERY = 0.2
"""Seconds between two tries."""


def address_of(arguments: argparse.Namespace) -> str:
    """Where a server with these arguments is asked, from this machine."""
    host = arguments.host if arguments.host not in (None, "", "0.0.0.0", "::") else "127.0.0.1"
    scheme = "https" if arguments.ssl_keyfile else "http"
    path = arguments.root_path or ""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{arguments.port}{path}"


def when_ready(arguments: argparse.Namespace, say: Callable[[str], None]) -> threading.Event:
    """Call `say` with the address, once, when the server there answers.

    Returns:
        What ends the waiting when it is set.
    """
    stop = threading.Event()
    address = address_of(arguments)

    def wait() -> None:
        while not stop.wait(EVERY):
            if _answers(f"{address}/health"):
                say(address)
                return

    threading.Thread(target=wait, daemon=True).start()
    return stop


def _answers(url: str) -> bool:
    anybody = ssl._create_unverified_context() if url.startswith("https") else None
    try:
        with urllib.request.urlopen(url, timeout=2, context=anybody) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
