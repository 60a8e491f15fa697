"""Cached blocks are reused where every token was edited alike, and nowhere else: against a cold cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine import WIDTH, answer_of, ask, closing, open_engine, params, prompts, save_plans, save_tiny
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core import kv_cache_utils

from steersman import Steering
from steersman.edits import ROLES, SCOPES
from steersman.vllm.cache_keys import block_key
from steersman.vllm.prefix_cache import replace_everywhere
from steersman.vllm.roles import role_runs

BLOCK = 32
FIRST, SECOND = prompts(2, length=2 * BLOCK + 5, seed=3)
MORE = prompts(1, length=BLOCK, seed=4)[0]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("prefix")
    model = save_tiny("olmoe", folder / "model")
    torch.manual_seed(3)
    plans = {}
    for scope in SCOPES:
        plans[f"experts-{scope}"] = Steering.from_experts(
            model, activate={0: [1]}, deactivate={1: [3]}, scope=scope
        )
        plans[f"vectors-{scope}"] = Steering.from_vectors(model, {0: torch.randn(WIDTH)}, scope=scope)
    settings = {"steerings": save_plans(plans, folder / "plans")}
    with closing(
        open_engine(folder / "model", "olmoe", settings, block_size=BLOCK, max_model_len=256)
    ) as made:
        yield made


def differences(engine: Any, scope: str, lever: str) -> tuple[list[str], int]:
    """Where a warm cache answers otherwise than a cold one, and how many tokens came from the warm one."""
    name = f"{lever}-{scope}"
    found, reused = [], 0
    for before, after in (
        (None, name),
        (name, None),
        (name, name),
        (name, f"{name}@0.5"),
        (f"{name}@0.5", name),
    ):
        for turn in ("again", "extended", "second turn"):
            engine.reset_prefix_cache()
            (first,) = ask(engine, [FIRST], [params(before, tokens=BLOCK)])
            follows = {
                "again": FIRST,
                "extended": FIRST + MORE,
                "second turn": FIRST + answer_of(first).tokens + MORE,
            }[turn]
            (warm,) = ask(engine, [follows], [params(after)])
            reused += warm.num_cached_tokens
            engine.reset_prefix_cache()
            (cold,) = ask(engine, [follows], [params(after)])
            seen, expected = answer_of(warm), answer_of(cold)
            same = seen.tokens == expected.tokens and torch.allclose(
                seen.log_probabilities, expected.log_probabilities, atol=1e-5
            )
            if not same:
                found.append(f"{before} then {after}, {turn}")
    return found, reused


@pytest.mark.parametrize(
    ("scope", "lever"),
    [
        ("answer", "vectors"),
        ("generated", "experts"),
        *(
            pytest.param(scope, lever, marks=pytest.mark.long)
            for scope in SCOPES
            for lever in ("vectors", "experts")
            if (scope, lever) not in (("answer", "vectors"), ("generated", "experts"))
        ),
    ],
)
def test_as_with_a_cold_cache(engine: Any, scope: str, lever: str) -> None:
    found, reused = differences(engine, scope, lever)
    assert not found
    assert reused > 0


def test_without_the_rule_it_is_not(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees what the rule is for."""
    extended = kv_cache_utils.generate_block_hash_extra_keys
    replace_everywhere(extended, extended.__wrapped__)
    try:
        found = {scope: differences(engine, scope, "vectors")[0] for scope in ("all", "answer")}
    finally:
        replace_everywhere(extended.__wrapped__, extended)
    assert all(found.values()), found


def test_what_is_shared(engine: Any) -> None:
    """Prompts that no edit touches are shared with unsteered requests; steered ones among themselves."""
    for steering, shared in (("vectors-generated", 2), ("vectors-answer", 2), ("vectors-all", 0)):
        engine.reset_prefix_cache()
        ask(engine, [FIRST], [params(None)])
        (output,) = ask(engine, [FIRST], [params(steering)])
        assert output.num_cached_tokens == shared * BLOCK, steering
    engine.reset_prefix_cache()
    ask(engine, [FIRST], [params("experts-all@0.5")])
    (output,) = ask(engine, [FIRST], [params("experts-all@0.50")])
    assert output.num_cached_tokens == 2 * BLOCK


@given(
    st.integers(1, 40),
    st.integers(0, 60),
    st.integers(1, 20),
    st.lists(st.sampled_from(["", "a", "b"]), min_size=3, max_size=3),
)
def test_key_of_a_block(prompt: int, first: int, size: int, keys: list[str]) -> None:
    """The key is what each token is edited by, in order."""
    tokens = [
        keys[0] if at < prompt - 1 else keys[1] if at == prompt - 1 else keys[2]
        for at in range(first, first + size)
    ]
    key = block_key(first, first + size, prompt, keys)
    if not any(tokens):
        assert key is None
        return
    assert key is not None
    runs = [run.split(":") for run in key[1].split(";")]
    assert [name for length, name in runs for _ in range(int(length))] == tokens


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 20))
def test_roles_by_position(prompt: int, first: int, count: int) -> None:
    roles = [role for start, end, role in role_runs(first, first + count, prompt) for _ in range(start, end)]
    slow = [
        "prompt" if at < prompt - 1 else "last" if at == prompt - 1 else "generated"
        for at in range(first, first + count)
    ]
    assert [ROLES[role] for role in roles] == slow
