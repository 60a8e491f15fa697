"""A server as a user starts it: a process of `steersman serve`, asked over HTTP at 127.0.0.1."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

API_KEY, ADMIN_KEY = "a-client", "the-operator"
ENGINE = {
    "--dtype": "float32",
    "--max-model-len": "128",
    "--max-num-seqs": "16",
    "--max-num-batched-tokens": "128",
    "--distributed-executor-backend": "uni",
}
START_WITHIN = 240
"""Seconds; 20 on an idle machine."""


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    told: Mapping[str, Any]
    process: subprocess.Popen[str]
    log: Path

    @property
    def root(self) -> str:
        return str(self.told["address"]).removesuffix("/v1")

    def http(self, key: str = API_KEY) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.root, headers=headers, timeout=120)

    def openai(self) -> Any:
        import openai

        return openai.OpenAI(base_url=self.told["address"], api_key=API_KEY, max_retries=0)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def serving(*arguments: str, engine: tuple[str, ...] = ()) -> Iterator[Running]:
    """Start `steersman serve` with arguments, and those of the engine; stop it in the end."""
    options = [part for pair in ENGINE.items() for part in pair]
    command = [
        str(Path(sys.executable).parent / "steersman"),
        *("serve", *arguments, "--json", "--port", str(free_port())),
        *("--", "--enforce-eager", "--api-key", API_KEY, *options, *engine),
    ]
    environment = {
        **os.environ,
        "STEERSMAN_ADMIN_KEY": ADMIN_KEY,
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # what the parent has imported need not be imported again
    }
    with tempfile.NamedTemporaryFile("w", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
    try:
        yield Running(_told(process, Path(log.name)), process, Path(log.name))
    finally:
        stop(process)
        Path(log.name).unlink()


def _told(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """What the server says once it answers."""
    assert process.stdout is not None
    started = time.monotonic()
    os.set_blocking(process.stdout.fileno(), False)
    while time.monotonic() - started < START_WITHIN and process.poll() is None:
        line = process.stdout.readline()
        if line:
            told: dict[str, Any] = json.loads(line)
            return told
        time.sleep(0.2)
    raise AssertionError(f"the server does not answer:\n{log.read_text()[-4000:]}")


def stop(process: subprocess.Popen[str]) -> None:
    """Ask the server to end, as an operator does; its whole group is gone afterwards."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.stdout is not None
    process.stdout.close()
