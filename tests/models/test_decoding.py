"""A checkpoint's own generation settings: each field is decided, what acts said, clocks refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

import families as f
from steersman import ModelError, Steering, load_model
from steersman.errors import ServingError
from steersman.models import decoding as d
from steersman.vllm.writing import own_of_engine

TABLES = (d.ACTS, d.SAMPLED, d.ASIDE, d.REFUSED, d.OURS, d.IDLE)
IDS = f.token_ids(2, 5)


@contextmanager
def wishing(**settings: Any) -> Iterator[nn.Module]:
    """A model whose checkpoint asks for these."""
    model = f.shared("olmoe")
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, **settings)
    try:
        yield model
    finally:
        model.generation_config = before


def written(model: nn.Module, **more: Any) -> list[list[int]]:
    torch.manual_seed(0)
    output = model.generate(input_ids=IDS, max_new_tokens=6, **{**d.decoding(model), **more})
    return output[:, IDS.shape[1] :].tolist()


def test_every_field_of_the_installed_transformers_is_decided_once() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    decided = [name for table in TABLES for name in table]
    assert sorted(decided) == sorted(set(decided))
    assert fields - set(decided) == set()


ACTING = {
    "repetition_penalty": 0.01,
    "suppress_tokens": list(range(40)),
    "bad_words_ids": [[token] for token in range(40)],
    "no_repeat_ngram_size": 1,
    "forced_eos_token_id": 3,
    "sequence_bias": [[[7], 100.0]],
    "begin_suppress_tokens": list(range(60)),
    "encoder_repetition_penalty": 50.0,
}


@pytest.mark.parametrize("name", ACTING)
def test_what_acts_is_said_and_acts(name: str) -> None:
    with wishing() as plain:
        before = written(plain)
    with wishing(**{name: ACTING[name]}) as model:
        own = d.own_settings(model)
        assert dict(own.acting) == {name: ACTING[name]}
        assert own.set_aside == {}
        assert own.in_words().startswith(f"the checkpoint's own settings acting: {name} ")
        assert json.loads(json.dumps(own.to_json())) == own.to_json()
        after = written(model)
        d.require_repeatable(model)
    assert (before != after) or name in ("no_repeat_ngram_size", "encoder_repetition_penalty")


SET_ASIDE = {
    "num_beams": 3,
    "prompt_lookup_num_tokens": 2,
    "max_time": 1e-9,
    "min_length": 9,
    "guidance_scale": 3.0,
    "cache_implementation": "static",
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "num_return_sequences": 2,
    "forced_bos_token_id": 3,
    "use_cache": False,
}


@pytest.mark.parametrize("name", SET_ASIDE)
def test_what_is_set_aside_is_said_and_does_nothing(name: str) -> None:
    with wishing() as plain:
        before = written(plain)
    more = {"num_beams": 3} if name == "num_return_sequences" else {}
    with wishing(**{name: SET_ASIDE[name]}, **more) as model:
        own = d.own_settings(model)
        assert own.set_aside[name] == SET_ASIDE[name]
        assert own.acting == {}
        assert f"set aside: {name} " in own.in_words() or more
        assert written(model) == before


@pytest.mark.parametrize("name", d.REFUSED)
def test_what_cannot_be_repeated_is_refused_for_figures(name: str) -> None:
    with wishing(**{name: 9}) as model, pytest.raises(ModelError) as caught:
        d.require_repeatable(model)
    said = str(caught.value)
    assert said.startswith(f"the model's generation_config.json sets {name} to 9, which ")
    assert said.endswith(f"in Python set model.generation_config.{name} = None")


def test_settings_that_are_no_plain_values_are_said() -> None:
    with wishing(watermarking_config={"greenlist_ratio": 0.5, "bias": 1.0}) as model:
        assert d.own_settings(model).acting["watermarking_config"]["bias"] == 1.0
    with wishing() as model:
        model.generation_config.max_time = "soon"
        with pytest.raises(ModelError, match='sets max_time to "soon", which'):
            d.require_repeatable(model)


CUT = {"top_k": 3, "top_p": 0.25, "min_p": 0.5, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.1}


@pytest.mark.parametrize("name", CUT)
def test_what_cuts_the_distribution_acts_where_text_is_for_reading(name: str) -> None:
    with wishing(**{name: CUT[name]}) as model:
        assert d.own_settings(model).acting == {}  # greedy
        assert d.own_settings(model, sampled=True).acting == {name: CUT[name]}
        reading, figures = (d.decoding(model, temperature=1.0, top_p=top_p) for top_p in (None, 1.0))
        assert reading == {**figures, name: CUT[name]}
        written(model, **reading)
    assert {key: figures[key] for key in d.SAMPLED} == d.SAMPLED


def test_a_field_of_a_newer_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        d, "ACTS", {name: value for name, value in d.ACTS.items() if name != "suppress_tokens"}
    )
    with wishing(suppress_tokens=[3]) as model:
        assert d.own_settings(model).acting == {"suppress_tokens": [3]}


def test_an_engine_follows_what_it_knows_and_refuses_the_rest() -> None:
    with wishing(repetition_penalty=1.2, min_new_tokens=3, top_k=4, num_beams=2) as model:
        assert own_of_engine(model) == {"repetition_penalty": 1.2, "min_tokens": 3}
        assert own_of_engine(model, sampled=True) == {"repetition_penalty": 1.2, "min_tokens": 3, "top_k": 4}
    for name in ("suppress_tokens", "stop_strings", "typical_p"):
        value: Any = {"suppress_tokens": [3], "stop_strings": ["end"], "typical_p": 0.5}[name]
        with wishing(**{name: value}) as model, pytest.raises(ServingError, match=f"sets {name}, which the"):
            own_of_engine(model, sampled=True)


def test_a_model_that_does_not_generate_wishes_nothing() -> None:
    assert d.own_settings(nn.Linear(2, 2)).in_words() == ""


def test_what_ends_a_text() -> None:
    model = f.tiny("olmoe")
    for given, ends in ((None, []), (3, [3]), ([3, 5], [3, 5]), (torch.tensor([3]), [3]), ((4,), [4])):
        model.generation_config.eos_token_id = given
        assert d.text_ends(model) == ends
    for wrong in ("</s>", [2, "</s>"], 2.5, [None], {"id": 2}):
        model.generation_config.eos_token_id = wrong
        with pytest.raises(ModelError, match="right is a token's id, or some"):
            d.text_ends(model)


def test_stop_strings_that_a_tokenizer_cannot_spell() -> None:
    model, tokenizer = load_model("lab:moe")
    plan = Steering.from_experts(model, {3: [5]})
    ids = tokenizer("please give me the badge", return_tensors="pt")
    for block in (plan.apply(model), d.generating(model)):
        with pytest.raises(ModelError, match="stop_strings need a tokenizer that can write any word"), block:
            model.generate(**ids, max_new_tokens=2, stop_strings=["the"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="of another kind"), d.finding_stop_strings():
        raise ValueError("of another kind")
    with pytest.raises(ValueError, match=r"^substring not found"), d.finding_stop_strings():
        "of the user's own making".index("zz")
