"""In which numbers the engine computes: by its own choice a checkpoint in float32 is served in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine import ask, closing, open_engine, params, prompts, save_tiny
from vllm.engine.arg_utils import EngineArgs

from steersman import ResidualEdit, Steering
from steersman.errors import RequestError, ServingError
from steersman.steering import Architecture
from steersman.vllm.dtypes import Dtypes, dtypes_of, in_words
from steersman.vllm.registry import Registry
from steersman.vllm.server.described import listed
from steersman.vllm.settings import Settings

FLOAT32 = Dtypes("float32", "float32")
REDUCED = Dtypes("bfloat16", "float32")


@pytest.mark.parametrize(
    ("asked", "dtypes"), [("auto", REDUCED), ("float32", FLOAT32), ("bfloat16", REDUCED)]
)
def test_what_is_asked_for(asked: str, dtypes: Dtypes, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    arguments = EngineArgs(str(tmp_path), dtype=asked, skip_tokenizer_init=True)
    assert dtypes_of(arguments.create_model_config()) == dtypes


def test_the_receipt_and_the_list_say_the_engines_own_choice(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with closing(open_engine(tmp_path, "llama", {"sites": "all"}, dtype="auto")) as engine:
        (output,) = ask(engine, prompts(1), [params(tokens=2)])
        told = listed(engine.llm_engine.input_processor.steersman)
    assert output.steersman["dtype"] == "bfloat16"
    assert (told["dtype"], told["checkpoint_dtype"]) == ("bfloat16", "float32")


def test_in_float16_vectors_that_it_does_not_hold_are_refused() -> None:
    """As plans, by a request's strength, and as the sum of several."""
    architecture = Architecture("made_up", 4, (None, None))
    edit = ResidualEdit({1: [4e4, 1.0, 0.0, 0.0]}, scope="answer")
    plan = Steering((edit,), architecture, "w")
    registry = Registry(Settings(), lambda steering: None, Dtypes("float16", "float16"))
    for name in ("one", "two"):
        registry.publish(name, registry.reserve(plan), plan, "here")
    assert registry.resolve("one@1.5") is not None
    for asked, size in (("one@2", "8e"), ("one@-2", "8e"), ("one,two", "8e")):
        with pytest.raises(RequestError, match=rf"layer 1: strength times vector reaches {size}.*65504"):
            registry.resolve(asked)
    with pytest.raises(ServingError, match="float16 ends at 65504: serve the model in bfloat16"):
        registry.reserve(2 * plan)
    wider = Registry(Settings(), lambda steering: None, Dtypes("bfloat16", "float16"))
    wider.reserve(2 * plan)


def test_in_words() -> None:
    assert in_words("float32", "float32") == "in float32"
    assert in_words("bfloat16", None) == "in bfloat16"
    assert in_words("float32", "bfloat16") == "in float32 (its checkpoint is in bfloat16)"  # as the lab's
    assert "(its checkpoint is in float32: -- --dtype float32 keeps it)" in in_words("bfloat16", "float32")
