"""A server in a process of its own, for scripts and notebooks: started, asked, stopped."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from steersman.errors import ServingError

STARTS_WITHIN = 1800.0
"""Seconds; minutes go by where weights are large or kernels are compiled."""
ENDS_WITHIN = 60.0
_LAST = 3000
"""Signs of its log that an error shows."""
_COMMAND = "from steersman.cli import main; raise SystemExit(main())"


@dataclass
class ServerProcess:
    """A running `steersman serve`; a context manager, which stops it.

    Attributes:
        told: What the command says with `--json` once it answers.
        log: The file with the engine's own lines; gone when the server is stopped.
    """

    told: Mapping[str, Any]
    log: Path
    process: subprocess.Popen[str] = field(repr=False)

    @classmethod
    def start(
        cls,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        within: float = STARTS_WITHIN,
    ) -> ServerProcess:
        """Start `steersman serve` with these arguments, and wait until it answers.

        Args:
            arguments: Those of the command, `--json` excepted.
            environment: Variables on top of this process's own.
            within: Seconds.

        Raises:
            ServingError: it ends before it answers, or does not answer; with the end of its log.
        """
        head, engine = _split(arguments)
        command = [sys.executable, "-c", _COMMAND, "serve", *head, "--json", *engine]
        with tempfile.NamedTemporaryFile("w", prefix="steersman-", suffix=".log", delete=False) as log:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        path = Path(log.name)
        atexit.register(_end, process, path)
        try:
            return cls(_told(process, path, within), path, process)
        except BaseException:
            _end(process, path)
            raise

    @property
    def address(self) -> str:
        """Where an OpenAI client asks it."""
        return str(self.told["address"])

    def stop(self) -> None:
        """End it, and all of its processes."""
        _end(self.process, self.log)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _split(arguments: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Arguments of the command, and from `--` on those of the engine."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at:]


def _told(process: subprocess.Popen[str], log: Path, within: float) -> dict[str, Any]:
    """The line that the command writes once the server answers."""
    if process.stdout is None:
        raise ServingError("the server's output is not read")
    late = threading.Timer(within, process.kill)
    late.start()
    try:
        line = process.stdout.readline()
    finally:
        late.cancel()
    if not line:
        process.wait(ENDS_WITHIN)
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        raise ServingError(f"the server did not start (exit status {process.returncode}): {said[-_LAST:]}")
    told: dict[str, Any] = json.loads(line)
    return told


def _end(process: subprocess.Popen[str], log: Path) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.stdout is not None:
        process.stdout.close()
    log.unlink(missing_ok=True)


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
