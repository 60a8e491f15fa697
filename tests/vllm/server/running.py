"""The tests' server: a process of `steersman serve`, as a user starts it, asked over HTTP at 127.0.0.1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from steersman.vllm.server.process import ServerProcess, free_port
from waiting import HANGING

API_KEY, ADMIN_KEY = "a-client", "the-operator"
ENGINE = {
    "--dtype": "float32",
    "--max-model-len": "128",
    "--max-num-seqs": "16",
    "--max-num-batched-tokens": "128",
    "--distributed-executor-backend": "uni",
}


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    process: ServerProcess

    @property
    def root(self) -> str:
        return self.process.address.removesuffix("/v1")

    def http(self, key: str = API_KEY) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.root, headers=headers, timeout=HANGING)

    def openai(self) -> Any:
        import openai

        return openai.OpenAI(base_url=self.process.address, api_key=API_KEY, max_retries=0)


def start(
    *arguments: str, engine: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> ServerProcess:
    """Start `steersman serve` with arguments, and those of the engine."""
    options = [part for pair in ENGINE.items() for part in pair]
    variables = {
        "STEERSMAN_ADMIN_KEY": ADMIN_KEY,
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # what the parent has imported need not be imported again
        **(environment or {}),
    }
    return ServerProcess.start(
        *(*arguments, "--port", str(free_port())),
        *("--", "--enforce-eager", "--api-key", API_KEY, *options, *engine),
        environment=variables,
        within=300,
    )
