"""What one HTTP request asked for, and what was done for it, where the engine's front end sees both.

A request to the server may become many requests to the engine: several prompts, several answers, rounds with
tools. All run in the context of the HTTP request, and all follow the plan that it was given once.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from steersman.errors import RequestError
from steersman.vllm.receipt import receipt_of
from steersman.vllm.registry import Resolved


@dataclass
class Call:
    """An HTTP request.

    Attributes:
        resolved: What everything that it generates follows; None: nothing.
        asked: Whether it named its steering itself.
        refused: Why nothing may be generated for it; None: it may.
        started: Answers that have come to the engine.
        dtype: That in which the engine computes them.
        ended: (prompt's tokens, answer's tokens) of each that has ended.
    """

    resolved: Resolved | None = None
    asked: bool = False
    refused: str | None = None
    started: int = 0
    dtype: str | None = None
    ended: list[tuple[int, int]] = field(default_factory=list)

    def check(self, asked: bool) -> None:
        """Raise `RequestError` where nothing may be generated, or an answer asks for what the call does not.

        Args:
            asked: Whether a steering came to the engine with the answer's parameters.
        """
        if self.refused is not None:
            raise RequestError(f"steering: {self.refused}")
        if asked and not self.asked:
            raise RequestError(
                'steering: it stands where this server does not look for it; right is "vllm_xargs": '
                '{"steering": "name"}'
            )

    @property
    def done(self) -> bool:
        """Whether all that has come to the engine has ended."""
        return self.started > 0 and len(self.ended) >= self.started

    def receipt(self) -> dict[str, Any]:
        """What was applied to all of its answers together."""
        return receipt_of(self.resolved, self.ended, self.dtype)


CALL: ContextVar[Call | None] = ContextVar("steersman_call", default=None)
"""The HTTP request that is being answered; None outside of a server."""
_expected = False


def expect_calls() -> None:
    """From now on, whatever comes to this process's engine comes with an HTTP request that has been read."""
    global _expected
    _expected = True


def current_call() -> Call | None:
    """The HTTP request that is being answered; None outside of a server.

    Raises:
        RequestError: this process is a server, and nobody has read what the request asks for.
    """
    call = CALL.get()
    if call is None and _expected:
        raise RequestError(
            "steering: what this request asks for has not been read; it is not answered unsteered"
        )
    return call
