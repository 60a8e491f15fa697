"""Saying once that a server answers."""

from __future__ import annotations

import argparse
import json
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

EVERY = 0.2
"""Seconds between two tries."""


def address_of(arguments: argparse.Namespace) -> str:
    """Where a server with these arguments is asked, from this machine."""
    host = arguments.host if arguments.host not in (None, "", "0.0.0.0", "::") else "127.0.0.1"
    scheme = "https" if arguments.ssl_keyfile else "http"
    path = arguments.root_path or ""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{arguments.port}{path}"


def when_ready(arguments: argparse.Namespace, say: Callable[[str, dict[str, Any]], None]) -> threading.Event:
    """Call `say` with the address and what the server lists at `/v1/steerings`, once, when it answers there.

    Returns:
        What ends the waiting when it is set.
    """
    stop = threading.Event()
    address = address_of(arguments)
    keys = [*(arguments.api_key or ()), *filter(None, [os.environ.get("VLLM_API_KEY")])]

    def wait() -> None:
        while not stop.wait(EVERY):
            if _ask(f"{address}/health") is not None:
                listed = _ask(f"{address}/v1/steerings", keys)
                say(address, json.loads(listed) if listed else {})
                return

    threading.Thread(target=wait, daemon=True).start()
    return stop


def _ask(url: str, keys: Sequence[str] = ()) -> bytes | None:
    """The body of an answer with status 200; None without one."""
    anybody = ssl._create_unverified_context() if url.startswith("https") else None
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60, context=anybody) as response:
            body: bytes = response.read()
            return body if response.status == 200 else None
    except (urllib.error.URLError, OSError):
        return None
