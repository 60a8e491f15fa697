"""What cannot be had is refused with 400 and the reason, and the server goes on serving."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asking_http import answered, completion, tokens_of
from engine import prompts, reference

LONG = "x" * 20_000
X = "vllm_xargs"


def asked(steering: object) -> dict[str, Any]:
    return {X: {"steering": steering}}


BAD: dict[str, dict[str, Any]] = {
    # what is no text
    "number": asked(1),
    "fraction": asked(0.5),
    "not a number": asked(float("nan")),
    "infinity": asked(float("inf")),
    "true": asked(True),
    "null": asked(None),
    "list": asked(["experts"]),
    "list of numbers": asked([1, 2]),
    "empty list": asked([]),
    "object": asked({"name": "experts", "strength": 1}),
    "empty object": asked({}),
    "deep": asked([[[[[[[[[[["experts"]]]]]]]]]]]),
    "huge number": asked(10**400),
    # names
    "empty": asked(""),
    "blank": asked("   "),
    "unknown": asked("no-such-steering"),
    "known and unknown": asked("experts,no-such-steering"),
    "upper case": asked("EXPERTS"),
    "cyrillic letter": asked("еxperts"),
    "accent": asked("éxperts"),
    "emoji": asked("🦜"),
    "right to left": asked("\u202eexperts"),
    "half a character": asked("\ud800"),
    "null character": asked("experts\x00"),
    "line end": asked("experts\n"),
    "tab": asked("experts\tvectors"),
    "path": asked("../../etc/passwd"),
    "absolute path": asked("/etc/passwd"),
    "address": asked("https://example.com/plan"),
    "hub name": asked("someone/plan"),
    "too long a name": asked("x" * 65),
    "far too long": asked(LONG),
    "markup": asked("<script>"),
    "format string": asked("%s{0}"),
    # separators
    "comma first": asked(",experts"),
    "comma last": asked("experts,"),
    "two commas": asked("experts,,vectors"),
    "semicolon": asked("experts;vectors"),
    "plus": asked("experts+vectors"),
    "twice": asked("experts,experts"),
    "twice with strengths": asked("experts@0.5,experts@0.25"),
    "none and another": asked("none,experts"),
    "too many": asked("experts,vectors,both,experts@1,vectors@1"),
    # strengths
    "no strength": asked("experts@"),
    "two strengths": asked("experts@1@2"),
    "strength in words": asked("experts@one"),
    "strength nan": asked("experts@nan"),
    "strength infinity": asked("experts@inf"),
    "strength too big": asked("experts@2.01"),
    "strength too small": asked("experts@-2.01"),
    "strength huge": asked("experts@1e308"),
    "strength beyond numbers": asked("experts@1e999"),
    "strength of other digits": asked("experts@\u0661"),
    "strength with a comma": asked("experts@0,5"),
    "strength in hex": asked("experts@0x1"),
    "strength that breaks the plan": asked("experts@1.5"),
    "sum that breaks the plan": asked("project,project@0.5"),
    # conflicts
    "opposite": asked("experts,against"),
    # other places, other keys
    "reserved": {X: {"steersman": {"slots": [[0, 1.0]], "keys": ["", "", ""], "lease": 1}}},
    "reserved text": {X: {"steersman": "experts"}},
    "reserved at the top": {"steersman": "experts"},
    "capital": {X: {"Steering": "experts"}},
    "plural": {X: {"steerings": "experts"}},
    "other key": {X: {"steering_vector": "experts"}},
    "with a space": {X: {"steering ": "experts"}},
    "plural at the top": {"steerings": ["experts"]},
    "object at the top": {"steering": {"experts": 1}},
    "two that differ": {"steering": "experts", **asked("vectors")},
    "xargs as text": {X: '{"steering": "experts"}'},
    "xargs as a list": {X: [["steering", "experts"]]},
    "extra body": {"extra_body": asked("experts")},
    "extra body, plain": {"extra_body": {"steering": "experts"}},
    "extra args": {"extra_args": {"steering": "experts"}},
    "sampling parameters": {"sampling_params": {"extra_args": {"steering": "experts"}}},
    # what cannot be steered
    "beams": {"use_beam_search": True, "n": 2, **asked("experts")},
    "beams in words": {"use_beam_search": "yes", "n": 2, **asked("experts")},
    "beams of an alias": {"use_beam_search": True, "n": 2, "model": "tiny-experts"},
    "embeddings": {"prompt_embeds": "AAAA", **asked("experts")},
    "in the background": {"background": True, **asked("experts")},
}


def test_the_table_is_long() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_each_is_refused_with_the_reason(server: Any, material: Any, stream: bool) -> None:
    (prompt,) = prompts(1)
    wrong: dict[str, str] = {}
    with server.http() as http:
        for name, fields in BAD.items():
            body = completion(prompt, **{"stream": stream, **fields})
            # As a client of any language might send it: NaN, halves of characters and all.
            response = http.post(
                "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
            )
            error = response.json().get("error", {}) if response.status_code == 400 else {}
            if not (error.get("code") == 400 and error.get("message") and error.get("type")):
                wrong[name] = f"{response.status_code} {response.text[:200]}"
        assert not wrong
        assert_serves(http, material)


def assert_serves(http: Any, material: Any) -> None:
    (prompt,) = prompts(1)
    plan = material.plans["experts"]
    assert (
        tokens_of(answered(http, completion(prompt, "experts")))
        == reference(material.model, plan, prompt).tokens
    )
    assert tokens_of(answered(http, completion(prompt))) == reference(material.model, None, prompt).tokens


def test_the_reason_says_what_would_be_right(server: Any) -> None:
    import openai

    client = server.openai()

    def reason(**fields: Any) -> str:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="the tower", extra_body=fields)
        assert caught.value.body["param"] == "steering"
        return str(caught.value.body["message"])

    assert reason(**asked("fatihful")) == (
        'steering: there is no "fatihful" (there are: experts, vectors, both, against)'
    )
    assert "this server takes -2 to 2" in reason(**asked("vectors@3"))
    assert 'right is "vllm_xargs": {"steering": "name"}' in reason(extra_body=asked("experts"))
    assert "beam search" in reason(use_beam_search=True, n=2, **asked("experts"))


@pytest.mark.parametrize(
    "path", ["/tokenize", "/v1/messages/count_tokens", "/v1/systemone", "/v1/embeddings"]
)
def test_endpoints_that_cannot_be_steered_say_so(server: Any, path: str) -> None:
    body = {"model": "tiny", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    with server.http() as http:
        response = http.post(path, json={**body, **asked("experts")})
    assert response.status_code == 400
    assert f"{path} cannot be steered" in response.json()["error"]["message"]


BODIES = {
    "no JSON": b"{",
    "nothing": b"",
    "a list": b"[]",
    "a text": b'"steering"',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "no UTF-8": b'{"model": "tiny", "prompt": "\xff", "vllm_xargs": {"steering": "experts"}}',
    "long number": b'{"model": "tiny", "prompt": "a", "vllm_xargs": {"steering": ' + b"9" * 5000 + b"}}",
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_requests(server: Any, material: Any, name: str) -> None:
    with server.http() as http:
        response = http.post(
            "/v1/completions", content=BODIES[name], headers={"content-type": "application/json"}
        )
        assert response.status_code == 400, response.text
        assert_serves(http, material)


def test_bodies_that_are_not_read_generate_nothing(server: Any) -> None:
    """The tests' server has an alias, which a body of another type could name."""
    body = json.dumps(completion("a", "experts"))
    with server.http() as http:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            response = http.post("/v1/completions", content=body, headers={"content-type": kind})
            assert 400 <= response.status_code < 500


def test_clients_without_the_key_are_told_only_that(server: Any) -> None:
    with server.http("somebody") as http:
        response = http.post("/v1/completions", json=completion("a", "no-such-steering"))
        assert response.status_code == 401
        assert http.get("/v1/steerings").status_code == 401
