"""What requests may ask for, and what they get where the operator has defaults."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import (
    answer_of,
    ask,
    closing,
    open_engine,
    params,
    plans_for,
    prompts,
    reference,
    save_plans,
    save_tiny,
)
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import SpeculativeConfig

from steersman import Steering
from steersman.errors import RequestError, ServingError
from steersman.vllm.request import NAME, Wanted, parse_request
from steersman.vllm.settings import read_settings
from steersman.vllm.supported import check_supported


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("faithful", [("faithful", 1.0)]),
        ("faithful,honest@0.5", [("faithful", 1.0), ("honest", 0.5)]),
        (" a@-1e-1 , b.c_d-e@+2. ", [("a", -0.1), ("b.c_d-e", 2.0)]),
        ("none", []),
        ("a@-0", [("a", 0.0)]),
    ],
)
def test_read(given: str, wanted: list[tuple[str, float]]) -> None:
    assert [(one.name, one.strength) for one in parse_request(given, 4)] == wanted


@given(st.lists(st.tuples(st.from_regex(NAME, fullmatch=True), st.floats(-1e6, 1e6)), min_size=1, max_size=3))
def test_written_is_read_again(pairs: list[tuple[str, float]]) -> None:
    wanted = tuple(Wanted(name, strength + 0.0) for name, strength in dict(pairs).items() if name != "none")
    text = ",".join(map(str, wanted))
    if wanted and len(text) <= 512:
        assert parse_request(text, 4) == wanted


@given(
    st.one_of(
        st.text(),
        st.none(),
        st.integers(),
        st.floats(),
        st.lists(st.text()),
        st.dictionaries(st.text(), st.text()),
    )
)
def test_anything_else_is_one_line(given: object) -> None:
    error = None
    try:
        wanted = parse_request(given, 4)
    except RequestError as refused:
        error = str(refused)
    if error is None:
        assert all(NAME.fullmatch(one.name) and math.isfinite(one.strength) for one in wanted)
    else:
        assert len(error.splitlines()) == 1
        assert len(error) < 300


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steering": {}}, "'steering' is not a setting"),
        ({"steerings": ["a"]}, "right is {name: folder}"),
        ({"steerings": {"a b": "x"}}, "cannot be the name"),
        ({"steerings": {"none": "x"}}, "cannot be the name"),
        ({"steerings": {"a": 1}}, "right is {name: folder}"),
        ({"steerings": {"a": "x"}, "default": "b"}, "default: there is no steering 'b' (there are: a)"),
        ({"steerings": {"a": "x"}, "aliases": {"m": "b"}}, "m: there is no steering 'b'"),
        ({"strengths": [1, -1]}, "two finite numbers in order"),
        ({"strengths": [0, float("nan")]}, "two finite numbers in order"),
        ({"max_steerings": 0}, "a whole number, 1 or more"),
        ({"count": True}, "a whole number, 0 or more"),
        ({"sites": "some"}, "'plans' or 'all'"),
        ({"match": "name"}, "'weights' or 'architecture'"),
        ({"steerings": {"a": "x", "b": "y"}, "max_steerings": 1}, "2 steerings do not fit"),
        ("faithful", "right is an object"),
    ],
)
def test_settings_that_are_wrong(settings: object, says: str) -> None:
    with pytest.raises((ServingError, RequestError)) as error:
        read_settings({"steersman": settings})
    assert says in str(error.value)


class Served:
    """An engine with a default steering."""

    def __init__(self, folder: Path) -> None:
        self.model = save_tiny("olmoe", folder / "model")
        self.plans = plans_for(self.model, "olmoe")
        self.plans["against"] = Steering.from_experts(self.model, activate={1: [2]})
        settings = {
            "steerings": save_plans(self.plans, folder / "plans"),
            "default": "experts",
            "strengths": [-1, 1],
        }
        self.engine = open_engine(folder / "model", "olmoe", settings)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("requests"))
    with closing(made.engine):
        yield made


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("unknown", 'there is no "unknown" (there are: experts, vectors, both, project, against)'),
        ("experts@2", 'strength 2 for "experts" is out of bounds: this server takes -1 to 1'),
        ("project@-0.5", "it must lie between 0 and 1"),
        ("experts,against", "cannot be had together: layer 1, expert 2: one edit activates it"),
        (7, "7 is not a text"),
    ],
)
def test_refused(served: Served, given: object, says: str) -> None:
    with pytest.raises(RequestError) as error:
        ask(served.engine, prompts(1), [params(given)])  # type: ignore[arg-type]
    assert says in str(error.value)
    assert served.engine.llm_engine.input_processor.steersman.followers == 0


def test_the_reserved_key(served: Served) -> None:
    asked = params()
    asked.extra_args = {"steersman": {"slots": [[0, 1.0]]}}
    with pytest.raises(RequestError, match='"steersman" is no argument of a request'):
        ask(served.engine, prompts(1), [asked])


def test_the_default_and_none(served: Served) -> None:
    (prompt,) = prompts(1)
    silent, none, named = ask(served.engine, [prompt] * 3, [params(), params("none"), params("vectors")])
    assert answer_of(silent).tokens == reference(served.model, served.plans["experts"], prompt).tokens
    assert answer_of(none).tokens == reference(served.model, None, prompt).tokens
    assert answer_of(named).tokens == reference(served.model, served.plans["vectors"], prompt).tokens
    assert [one.steersman["steering"] for one in (silent, none, named)] == ["experts", None, "vectors"]


def test_several_answers(served: Served) -> None:
    """Each of n answers is steered, and the receipt counts them all."""
    (prompt,) = prompts(1)
    asked = params("vectors", tokens=5, n=3, seed=1, temperature=1.0)
    (output,) = ask(served.engine, [prompt], [asked])
    assert len(output.outputs) == 3
    assert output.steersman["tokens"]["block_output:0"] == 3 * 5
    assert served.engine.llm_engine.input_processor.steersman.followers == 0


def test_drafts_of_a_model_are_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    config = served.engine.llm_engine.vllm_config
    drafts = SpeculativeConfig.__new__(SpeculativeConfig)
    for method, refused in (("ngram", False), ("eagle", True), ("mtp", True)):
        object.__setattr__(drafts, "method", method)
        monkeypatch.setattr(config, "speculative_config", drafts)
        if refused:
            with pytest.raises(ServingError, match=f"speculative decoding by '{method}' drafts with a model"):
                check_supported(config)
        else:
            check_supported(config)


@pytest.mark.parametrize(
    ("where", "setting", "value", "says"),
    [
        ("parallel_config", "enable_dbo", True, "micro-batches"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        ("cache_config", "kv_sharing_fast_prefill", True, "skips prompt tokens"),
        ("model_config", "runner_type", "pooling", "it runs pooling"),
        ("model_config", "enable_sleep_mode", True, "sleep mode discards"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    served: Served, where: str, setting: str, value: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = served.engine.llm_engine.vllm_config
    check_supported(config)
    monkeypatch.setattr(operator.attrgetter(where)(config), setting, value)
    with pytest.raises(ServingError, match=says):
        check_supported(config)
