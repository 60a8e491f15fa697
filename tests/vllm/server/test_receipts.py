"""Receipts in bodies and in streams, without a server: nothing else of an answer is changed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from steersman.vllm.calls import Call
from steersman.vllm.server.receipts import Receipted, with_receipt

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=6).filter(lambda key: key not in ("steersman", "error")), VALUES)
RECEIPT = {"steering": "a", "tokens": {"router:1": 3}}


@given(OBJECTS, st.booleans(), st.sampled_from([None, 2]), st.sampled_from(["", "\n", "\n\n"]))
def test_a_receipt_is_one_member_more(
    body: dict[str, Any], ascii_only: bool, indent: int | None, end: str
) -> None:
    text = (json.dumps(body, ensure_ascii=ascii_only, indent=indent) + end).encode("utf-8", "surrogatepass")
    assert json.loads(with_receipt(text, RECEIPT)) == {**body, "steersman": RECEIPT}
    event = b"event: last\ndata: " + json.dumps(body).encode() + b"\n\n"
    changed = with_receipt(event, RECEIPT)
    assert changed.startswith(b"event: last\ndata: {")
    assert changed.endswith(b"}\n\n")
    assert json.loads(changed.split(b"data: ", 1)[1]) == {**body, "steersman": RECEIPT}


@given(st.sampled_from([b"", b"[1]", b'"text"', b'{"error":{"code":400}}', b"{"]))
def test_what_is_no_answer_stays(text: bytes) -> None:
    assert with_receipt(text, RECEIPT) == text


def sent_through(chunks: Sequence[bytes], ended_after: int, kind: str = "text/event-stream") -> list[bytes]:
    """What comes out of a stream whose one answer has ended before chunk `ended_after` is sent."""
    call = Call(started=1)
    out: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        out.append(dict(message))

    async def run() -> None:
        receipted = Receipted(send, call)
        headers = [(b"content-type", kind.encode())]
        await receipted({"type": "http.response.start", "status": 200, "headers": headers})
        for number, chunk in enumerate(chunks):
            if number == ended_after:
                call.ended.append((5, 2))
            await receipted({"type": "http.response.body", "body": chunk, "more_body": True})
        await receipted({"type": "http.response.body", "body": b"", "more_body": False})

    asyncio.run(run())
    assert [message.get("more_body", False) for message in out[1:]] == [True] * (len(out) - 2) + [False]
    return [message["body"] for message in out[1:]]


def event(number: int) -> bytes:
    return b'data: {"n":%d}\n\n' % number


@given(
    st.integers(1, 6),
    st.integers(0, 6),
    st.booleans(),
    st.lists(st.integers(0, 6), max_size=3),
)
def test_the_last_event_of_a_stream_has_the_receipt(
    events: int, ended_after: int, done: bool, pauses: list[int]
) -> None:
    chunks = [event(number) for number in range(events)]
    if done:
        chunks.append(b"data: [DONE]\n\n")
    for place in pauses:
        chunks.insert(min(place, len(chunks)), b": still there\n\n")
    last = max(n for n, chunk in enumerate(chunks) if chunk.startswith(b"data: {"))
    out = b"".join(sent_through(chunks, min(ended_after, last)))
    given_lines = [line for line in b"".join(chunks).split(b"\n") if line]
    got_lines = [line for line in out.split(b"\n") if line]
    receipt = json.dumps({"steersman": Call().receipt()}, separators=(",", ":")).encode()[1:]
    expected = list(given_lines)
    place = max(n for n, line in enumerate(expected) if line.startswith(b"data: {"))
    expected[place] = expected[place][:-1] + b"," + receipt
    assert got_lines == expected


def test_chunks_are_not_held_while_answers_run() -> None:
    """Only what comes after the end of all answers waits for what follows it."""
    out = sent_through([event(0), event(1), event(2), b"data: [DONE]\n\n"], ended_after=2)
    assert out[:2] == [event(0), event(1)]
    assert len(out) == 3


def test_an_answer_without_an_end_has_no_receipt() -> None:
    chunks = [event(0), b'data: {"error":{"code":500}}\n\n', b"data: [DONE]\n\n"]
    assert b"".join(sent_through(chunks, ended_after=9)) == b"".join(chunks)
