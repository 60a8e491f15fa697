"""The receipt in a response: a top-level `steersman` object, in the last chunk of a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from steersman.vllm.calls import Call
from steersman.vllm.settings import KEY

DONE = b"data: [DONE]"


def with_receipt(text: bytes, receipt: Mapping[str, Any]) -> bytes:
    """JSON text of an object, or a stream's event that ends with one, with the receipt as its last member.

    Whatever is no object, or the object of an error, stays as it is.
    """
    kept = text.rstrip()
    first = kept.find(b"{")
    if first < 0 or not kept.endswith(b"}") or kept[first:].startswith(b'{"error":'):
        return text
    comma = b"" if kept[:-1].rstrip().endswith(b"{") else b","
    member = json.dumps({KEY: receipt}, separators=(",", ":"))[1:-1].encode()
    return kept[:-1] + comma + member + b"}" + text[len(kept) :]


class Receipted:
    """Sends a response on, with the receipt of a call put into it.

    A whole answer is held until it is complete. A stream runs through; only once all that was generated has
    ended is each chunk held until the next one shows that it was not the last.

    Args:
        send: Where the response goes.
        call: Whose it is.
    """

    def __init__(self, send: Send, call: Call) -> None:
        self._send, self._call = send, call
        self._start: Message | None = None
        self._held: list[bytes] = []
        self._streamed = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._started(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._start is not None:
            await self._whole(message)
        elif self._streamed:
            await self._chunk(message)
        else:
            await self._send(message)

    async def _started(self, message: Message) -> None:
        kind = MutableHeaders(raw=message["headers"]).get("content-type", "").partition(";")[0]
        if message["status"] == 200 and kind == "application/json":
            self._start = message
            return
        self._streamed = message["status"] == 200 and kind == "text/event-stream"
        await self._send(message)

    async def _whole(self, message: Message) -> None:
        self._held.append(message.get("body", b""))
        if message.get("more_body", False) or self._start is None:
            return
        body = b"".join(self._held)
        if self._call.started:
            body = with_receipt(body, self._call.receipt())
        headers = MutableHeaders(raw=list(self._start["headers"]))
        headers["content-length"] = str(len(body))
        await self._send({**self._start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})

    async def _chunk(self, message: Message) -> None:
        chunk, more = message.get("body", b""), message.get("more_body", False)
        if chunk and not chunk.startswith((DONE, b":")):  # an event: what was held was not the last one
            await self._release()
            if self._call.done:
                self._held.append(chunk)
                chunk = b""
        elif self._held:
            self._held.append(chunk)
            chunk = b""
        if not more:
            if self._held:
                self._held[0] = with_receipt(self._held[0], self._call.receipt())
            chunk = b"".join([*self._held, chunk])
            self._held.clear()
        if chunk or not more:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def _release(self) -> None:
        if self._held:
            chunk = b"".join(self._held)
            self._held.clear()
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
