"""Where a body's steering is looked for, and where it is refused: without a server."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.errors import RequestError
from steersman.vllm.server.asking import (
    PREPARING,
    STEERED,
    Asked,
    check_address,
    check_steerable,
    read_asked,
    read_json,
)
from steersman.vllm.settings import Settings

SETTINGS = Settings(steerings={"a": "a", "b": "b"}, default="b", aliases={"model-a": "a@0.5"})
PATH = "/v1/completions"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({}, Asked("b")),
        ({"model": "other"}, Asked("b")),
        ({"model": "model-a"}, Asked("a@0.5")),
        ({"model": "model-a", "vllm_xargs": {"steering": "b"}}, Asked("b", True)),
        ({"model": "model-a", "steering": "none"}, Asked("none", True)),
        ({"steering": "a", "vllm_xargs": {"steering": "a"}}, Asked("a", True)),
        ({"vllm_xargs": {"session_id": "x"}}, Asked("b")),
        ({"vllm_xargs": None}, Asked("b")),
        ({"metadata": {"steering": "notes"}}, Asked("b")),
        ({"steering": 7}, Asked(7, True)),
        ([], Asked()),
        ("steering", Asked()),
    ],
)
def test_the_request_wins_over_the_alias_and_that_over_the_default(body: Any, asked: Asked) -> None:
    assert read_asked(body, PATH, SETTINGS) == asked


def test_sampling_parameters_are_read_where_they_are_the_engines_own() -> None:
    body = {"sampling_params": {"extra_args": {"steering": "a"}}}
    assert read_asked(body, "/inference/v1/generate", SETTINGS) == Asked("a", True)
    with pytest.raises(RequestError, match="not looked for in sampling_params"):
        read_asked(body, PATH, SETTINGS)
    with pytest.raises(RequestError, match="two that differ"):
        read_asked({**body, "steering": "b"}, "/inference/v1/generate", SETTINGS)


@given(JSON, st.sampled_from(sorted(STEERED | PREPARING)))
def test_a_steering_is_never_overlooked_at_the_top_or_in_the_arguments(value: Any, path: str) -> None:
    """Whatever is asked for is what is read, or an error."""
    for body in ({"steering": value}, {"vllm_xargs": {"steering": value}}):
        if value is None:
            with pytest.raises(RequestError):
                read_asked(body, path, SETTINGS)
        else:
            asked = read_asked(body, path, SETTINGS)
            assert asked.given is value
            assert asked.explicit


@pytest.mark.parametrize(
    "field", ["VLLM_XARGS", "vllm-xargs", "xargs", "chat_template_kwargs", "extra_query", "stream_options"]
)
def test_a_steering_in_any_other_field_is_refused(field: str) -> None:
    for held in ({"steering": "a"}, {"vllm_xargs": {"steering": "a"}}, {"extra_args": {"Steering": "a"}}):
        with pytest.raises(RequestError, match="not looked for in"):
            read_asked({field: held}, PATH, SETTINGS)
    assert read_asked({field: {"seed": 1}, "tools": [{"steering": {}}]}, PATH, SETTINGS) == Asked("b")


@pytest.mark.parametrize(
    "key", ["\ufeffsteering", "ｓｔｅｅｒｉｎｇ", "ste\u200bering", "x-steering", "activation_steering"]
)
def test_letters_that_look_like_it_are_refused(key: str) -> None:
    for body in ({key: "a"}, {"vllm_xargs": {key: "a"}}, {"vllm_args": {key: "a"}}):
        with pytest.raises(RequestError):
            read_asked(body, PATH, SETTINGS)


@pytest.mark.parametrize(
    "body",
    [
        b'{"vllm_xargs": {"steering": "a"}, "vllm_xargs": {}}',
        b'{"vllm_xargs": {"steering": "a"}, "vllm_xargs": null}',
        b'{"vllm_xargs": {"steering": "a", "steering": "none"}}',
        b'{"steering": "a", "ste\\u0065ring": "none"}',
        b'{"model": "model-a", "model": "model"}',
    ],
)
def test_what_is_named_twice_in_one_object_is_refused(body: bytes) -> None:
    """Readers of JSON keep the last one, and say nothing."""
    with pytest.raises(RequestError, match="twice"):
        read_json(body)


def test_bodies_are_read_as_the_server_reads_them() -> None:
    body = {"messages": [{"model": 1}, {"model": 2}], "vllm_xargs": {"steering": "a"}}
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert read_json(json.dumps(body).encode(encoding)) == body
    assert read_json(b'{"stop": 1, "stop": 2}') == {"stop": 2}


def test_headers_and_queries_are_not_where_one_asks() -> None:
    check_address(["accept", "x-request-id", "steering-committee"])
    for key in ("steering", "X-Steering", "vllm_xargs"):
        with pytest.raises(RequestError, match="headers or after the path"):
            check_address([key])


@given(st.text(min_size=1, max_size=6).filter(lambda end: end.strip()), st.booleans())
def test_keys_that_nearly_ask_are_refused(end: str, upper: bool) -> None:
    key = ("STEER" if upper else "steer") + end
    if key == "steering":
        return
    for body in ({key: "a"}, {"vllm_xargs": {key: "a"}}):
        with pytest.raises(RequestError, match="nothing that can be asked for"):
            read_asked(body, PATH, SETTINGS)


@given(JSON)
def test_any_body_is_read_or_refused(body: Any) -> None:
    with contextlib.suppress(RequestError):  # anything else that is raised would be an error 500
        read_asked(body, PATH, SETTINGS)
        check_steerable(body)


@pytest.mark.parametrize("field", ["use_beam_search", "background", "prompt_embeds"])
def test_what_cannot_be_steered(field: str) -> None:
    for value in (False, None):
        check_steerable({field: value})
    for value in (True, "true", 1, [1]):
        with pytest.raises(RequestError, match=field):
            check_steerable({field: value})
