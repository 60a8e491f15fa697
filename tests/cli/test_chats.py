"""--chat-template, --chat-template-arg and --chat-date reach the model in every command with chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chats import templates
from cli.command_line import run, save_tiny, write_pairs
from steersman.artifacts import read_manifest

DAY = "2026-11-29"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: no chat template."""
    return save_tiny(tmp_path_factory.mktemp("base") / "base", chat=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "dated.jinja").write_text(templates.GPT_OSS, encoding="utf-8")
    (folder / "thinking.jinja").write_text(templates.QWEN_3, encoding="utf-8")
    (folder / "silent.jinja").write_text("{{ bos_token }}", encoding="utf-8")
    write_pairs(folder / "pairs.jsonl", range(24))
    rows = [{"messages": [{"role": "user", "content": f"Question {n}: who?"}]} for n in range(24)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


COMMANDS: dict[str, tuple[Any, ...]] = {
    "describe": ("describe", "{base}", "--experts", "{files}/texts.jsonl"),
    "detect": ("detect", "{base}", "{files}/pairs.jsonl", "-o", "{out}"),
    "refine": ("refine", "{base}", "{files}/pairs.jsonl", "-o", "{out}"),
    "generate": ("generate", "{base}", "--prompt", "who?"),
    "chat": ("chat", "{base}"),
    "evaluate": ("evaluate", "{base}", "--task", "lab:refusal/dev", "--steering", "{plan}", "-o", "{out}"),
    "screen": ("screen", "{base}", "{files}/pairs.jsonl", "-o", "{out}"),
    "map, source": ("map", "{base}", "lab:source", "{files}/texts.jsonl", "-o", "{out}"),
    "map, target": ("map", "lab:source", "{base}", "{files}/texts.jsonl", "-o", "{out}"),
}
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "a template that shows nothing": (
        ("--chat-template", "{files}/silent.jinja"),
        "does not reach the model",
    ),
    "no such file": (("--chat-template", "{files}/none.jinja"), "none.jinja: no such file"),
    "an argument for nothing": (
        ("--chat-template", "{files}/dated.jinja", "--chat-template-arg", "enable_thinking=false"),
        'never uses the argument "enable_thinking"',
    ),
    "a date for nothing": (
        ("--chat-template", "{files}/thinking.jinja", "--chat-date", DAY),
        "asks for no date",
    ),
}


@pytest.fixture(scope="module")
def plan(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from steersman import Steering, load_model

    folder = tmp_path_factory.mktemp("plan") / "plan"
    Steering.from_experts(load_model(str(base), device="cpu")[0], {0: [1]}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_what_would_not_reach_the_model_stops_every_command(
    name: str, base: Path, files: Path, plan: Path, tmp_path: Path
) -> None:
    places = {"base": base, "files": files, "plan": plan, "out": tmp_path / "out"}
    command = [str(part).format(**places) for part in COMMANDS[name]]
    side = f"--{name.partition(', ')[2]}-" if "," in name else "--"
    for options, words in WRONG.values():
        given = [option.format(**places).replace("--", side, 1) for option in options]
        done = run(*command, *given)
        assert done.status == 2, (name, done.error)
        assert words in done.error.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_a_base_model_reads_chats_by_a_template_of_another(base: Path, files: Path, tmp_path: Path) -> None:
    pairs, out = files / "pairs.jsonl", tmp_path / "c"
    assert "--chat-template FILE" in run("detect", base, pairs, "-o", out).error
    options = ["--chat-template", files / "dated.jinja", "--chat-date", DAY]
    assert run("detect", base, pairs, "-o", out, *options).status == 0
    chat = read_manifest(out)["model"]["chat"]
    assert (chat["arguments"], chat["date"]) == ({}, DAY)
    line = f"chats rendered by the chat template {chat['template_sha256'][:8]}…, the date {DAY}"
    assert line in run("show", out).words
    assert run("select", out, "-o", tmp_path / "s", "--top", 2).status == 0
    assert line in run("show", tmp_path / "s").words


def test_the_target_of_a_map_has_a_template_of_its_own(base: Path, files: Path, tmp_path: Path) -> None:
    given = ["lab:source", base, files / "texts.jsonl", "-o", tmp_path / "m", "--source-layers", 1]
    template = ["--target-chat-template", files / "thinking.jinja"]
    done = run(
        "map", *given, "--target-layers", 1, *template, "--target-chat-template-arg", "enable_thinking=false"
    )
    assert done.status == 0, done.error
    manifest = read_manifest(tmp_path / "m")
    assert manifest["model"]["chat"]["arguments"] == {"enable_thinking": False}
    assert manifest["source"]["model"]["chat"]["arguments"] == {}
    shown = run("show", tmp_path / "m").words
    assert "enable_thinking=false" in shown
    assert "the source's chats rendered by the chat template" in shown


@pytest.mark.parametrize("side", ["source", "target"])
def test_what_a_map_lacks_is_named_by_its_own_option(
    side: str, base: Path, files: Path, tmp_path: Path
) -> None:
    sides = [base, "lab:source"] if side == "source" else ["lab:source", base]
    for more in ([], ["--sequential"]):
        said = run("map", *sides, files / "texts.jsonl", "-o", tmp_path / "m", *more).error
        assert f"{base} has no chat template" in said
        assert f"(--{side}-chat-template FILE)" in said


def test_a_model_of_the_lab_is_called_by_its_name(tmp_path: Path) -> None:
    roles = [{"role": role, "content": "hi"} for role in ("tool", "user")]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": roles}))
    given = ["generate", "lab:moe", "--prompts", tmp_path / "p.jsonl"]
    assert "the chat template of lab:moe refuses" in run(*given).error


def test_arguments_are_json_and_given_once(base: Path, files: Path) -> None:
    command = ["generate", base, "--prompt", "who?", "--chat-template", files / "thinking.jinja"]
    for value, words in (
        (["enable_thinking=False"], "right is enable_thinking=false"),
        (["enable_thinking=NO"], "right is enable_thinking=false"),
        (["enable_thinking=yes"], "right is enable_thinking=true"),
        (["enable_thinking=NaN"], "the value is not JSON"),
        (["enable_thinking=[1e999]"], "the value is not JSON"),
        (['enable_thinking="\\ud800"'], "the value is not UTF-8"),
        (["enable_thinking=\udcff"], "the value is not UTF-8"),
        (["enable_thinking"], "right is KEY=VALUE"),
        (["enable_thinking=true", "enable_thinking=false"], "given twice"),
    ):
        given = [part for one in value for part in ("--chat-template-arg", one)]
        done = run(*command, *given)
        assert done.status == 2
        assert words in done.error
    assert run(*command, "--chat-date", "29.11.2026").status == 2


def test_what_a_template_leaves_out_stops_generating(base: Path, files: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(templates.NO_DEVELOPER)
    chat = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "who?"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    done = run("generate", base, "--prompts", tmp_path / "p.jsonl", "--chat-template", tmp_path / "t.jinja")
    assert done.status == 2
    assert 'p.jsonl:1: message 1 ("Be kind."), of the role developer, does not reach the model' in done.error


def test_parts_reach_the_model(base: Path, files: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(templates.SMOL_VLM)
    given = ["--chat-template", tmp_path / "t.jinja", "--max-new-tokens", 4, "--json"]
    answers = [
        run("generate", base, "--prompt", text, *given).json["items"] for text in ("who?", "the river")
    ]
    assert answers[0] != answers[1]
