"""`steersman chat`: turns from a pipe and at a terminal, its commands, receipts, and what it refuses."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import run, save_tiny
from steersman import RoutingContrast, Steering, load_model
from waiting import HANGING

AT_A_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from steersman.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def strong(contrast: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A steering that changes what a random model writes."""
    folder = tmp_path_factory.mktemp("strong") / "steering"
    RoutingContrast.from_pretrained(contrast).select(activate=4, deactivate=8).save_pretrained(folder)
    return folder


def talk(model: Path, lines: list[str], *options: object) -> list[dict[str, Any]]:
    """The turns of a conversation from a pipe."""
    result = run("chat", model, "--max-new-tokens", 6, *options, "--json", stdin="\n".join(lines)).json
    assert set(result) == {"items", "generation"}
    items: list[dict[str, Any]] = result["items"]
    return items


def generated(model: Path, messages: list[dict[str, str]], place: Path, *options: object) -> dict[str, Any]:
    """What `generate` answers to a conversation."""
    place.write_text(json.dumps({"messages": messages}))
    result = run("generate", model, "--prompts", place, "--max-new-tokens", 6, *options, "--json").json
    (item,) = result["items"]
    return dict(item)


def test_every_turn_is_what_generate_answers_to_the_conversation(
    tiny: Path, strong: Path, tmp_path: Path
) -> None:
    lines = ["who wrote the book?", "", "/base", "is it old?", "/strength 0.5", "/system be kind", "a town?"]
    items = talk(tiny, lines, "--steering", strong)
    said: list[dict[str, str]] = []
    for item, question in zip(items, ("who wrote the book?", "is it old?", "a town?"), strict=True):
        said.append({"role": "user", "content": question})
        system = [{"role": "system", "content": "be kind"}] if question == "a town?" else []
        assert item["prompt"] == [*system, *said]
        plan = f"{strong}@0.5" if question == "a town?" else strong
        alone = generated(tiny, item["prompt"], tmp_path / "p.jsonl", "--steering", plan, "--compare")
        assert item["steered"] == alone["steered"]
        assert item["receipt"] == alone["receipt"]
        if question == "who wrote the book?":
            assert item["base"] == alone["base"] != item["steered"]
        said.append({"role": "assistant", "content": item["steered"]})
    assert [item["strength"] for item in items] == [1, 1, 0.5]
    assert items[2]["receipt"]["fingerprint"] == (0.5 * Steering.from_pretrained(strong)).fingerprint


def test_steerings_come_and_go(tiny: Path, strong: Path, steering: Path, tmp_path: Path) -> None:
    both = tmp_path / "a plan"
    shutil.copytree(steering, both)
    lines = ["hi", f"/steering {strong}@0.5", "/reset", "hi", f"/steering + '{both}'@0.1", "/reset", "hi"]
    lines += ["/steering none", "/reset", "hi", "/strength"]
    plain, one, two, none = talk(tiny, lines)
    assert plain == {**none, "seed": 0}
    assert plain["steering"] == []
    assert set(plain) == {"prompt", "base", "ended", "seed", "steering", "strength"}
    half, other = (0.5 * Steering.from_pretrained(strong), 0.1 * Steering.from_pretrained(both))
    assert one["receipt"]["fingerprint"] == half.fingerprint
    assert two["receipt"]["fingerprint"] == (half + other).fingerprint
    assert two["steering"] == [f"{strong}@0.5", f"{both}@0.1"]


def test_in_words_answers_come_with_receipts(tiny: Path, strong: Path, tmp_path: Path) -> None:
    lines = ["the river", "/base", f"/save {tmp_path / 'turns.jsonl'}", "/strength 0", "//base"]
    lines += ["/steering none", "x", "/quit", "y"]
    words = run("chat", tiny, "--steering", strong, "--max-new-tokens", 4, stdin="\n".join(lines)).words
    (kept,) = map(json.loads, (tmp_path / "turns.jsonl").read_text().splitlines())
    assert words.count("receipt  routing changed at ") == 2
    assert "routing changed at 0 of " in words  # strength 0
    assert "\nbase     " in words
    assert words.count("… (cut: --max-new-tokens)") == 4
    assert "not steered" in words
    assert kept["prompt"] == [{"role": "user", "content": "the river"}]
    assert set(kept) == {"prompt", "steered", "base", "ended", "seed", "steering", "strength", "receipt"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nope", "/nope is no command; right are /strength, /base"),
        ("/base", "there is none yet"),
        ("/strength high", "right is a number such as 0.5"),
        ("/strength 3", "must lie between -1 and 1"),
        ("/steering absent", "absent: no artifact there"),
        ("/steering 'open", "No closing quotation"),
        ("/steering +", "name the steering to add"),
        ("/save", "name the file"),
        ("/save /nope/x/y", "/nope/x/y: cannot be written (No such file or directory)"),
        ("/save a\0b", "cannot be written"),
        ("version https://git-lfs.github.com/spec/v1", "stdin: a Git LFS pointer"),
        ("/reset all", "takes nothing"),
        ("the river " * 2000, "context holds 2048; shorten it"),
    ],
)
def test_what_a_pipe_asks_for_and_cannot_have_ends_it(
    line: str, message: str, tiny: Path, strong: Path
) -> None:
    error = run("chat", tiny, "--steering", strong, "--max-new-tokens", 2, "--json", stdin=line).error
    assert message in error


def test_nothing_is_shown_of_an_answer_that_is_refused(tiny: Path) -> None:
    assert "there is none yet" in run("chat", tiny, stdin="/base").error


def test_plans_for_other_models_are_refused_before_a_question(
    dense: Path, strong: Path, tmp_path: Path
) -> None:
    assert "this steering is for olmoe" in run("chat", dense, "--steering", strong, stdin="hi").error
    assert "this steering is for olmoe" in run("chat", dense, stdin=f"/steering {strong}\nhi").error
    other = save_tiny(tmp_path / "other", seed=1)
    assert "--match architecture" in run("chat", other, "--steering", strong, stdin="hi").error
    assert talk(other, ["hi"], "--steering", strong, "--match", "architecture")[0]["receipt"]


def test_without_a_chat_template_there_is_no_chat(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "plain", chat=False)
    assert "has no chat template" in run("chat", model, stdin="hi").error


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends an answer by itself."""
    folder = save_tiny(tmp_path_factory.mktemp("endless"), context=400)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": None}))
    assert load_model(str(folder))[0].generation_config.eos_token_id is None
    return folder


def test_the_context_fills_and_says_so(endless: Path) -> None:
    assert (
        "(cut: the model's context is full; /reset begins anew)" in run("chat", endless, stdin="hi\n").words
    )
    assert "(/reset begins anew)" in run("chat", endless, "--json", stdin="hi\nwho?\n").error


# ------------------------------------------------------------------------------------------- at a terminal


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-c", AT_A_TERMINAL, *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            start_new_session=True,
            # What a shell runs in the background ignores Ctrl-C, and its children with it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            env={**os.environ, "TERM": "dumb"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str, *, typing: str = "") -> str:
        """What is shown until the pattern is, from where the last wait ended. Keys are typed again if nothing
        follows: a Ctrl-C between prompt and wait for keys is heard with the next key (CPython's readline).
        """
        end, quiet = time.monotonic() + HANGING, 0
        self.type(typing)
        while (found := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < end, self.shown
            if not select.select([self.master], [], [], 1)[0]:
                quiet += 1
                self.type(typing if quiet % 10 == 0 else "")
            else:
                try:
                    self.shown += os.read(self.master, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    pytest.fail(f"ended before {pattern!r}: {self.shown}")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before


@pytest.fixture
def terminal(endless: Path, strong: Path) -> Iterator[Terminal]:
    opened = Terminal("chat", endless, "--steering", f"s={strong}", "--match", "architecture")
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.master)


def test_at_a_terminal_ctrl_c_stops_the_answer_and_not_the_session(terminal: Terminal) -> None:
    assert "steered by s=" in terminal.wait_for("\n> ")
    terminal.type("who wrote the book?\n")
    terminal.wait_for("book\\?\r\n[^\r]{10}")  # it comes as it is written
    terminal.type("\x03")
    stopped = terminal.wait_for("\n> ")
    assert "… (stopped)" in stopped
    assert re.search(r"receipt  routing changed at \d+ of \d+ places", stopped)
    terminal.type("/nope\n")
    assert "steersman: error: /nope is no command" in terminal.wait_for("nope\\)\r\n> ")
    terminal.type("/steering absent\n")
    assert "absent: no artifact there" in terminal.wait_for("expected\\)\r\n> ")
    terminal.type("/strength\n")
    terminal.wait_for("steered by s=.*\r\n> ")
    terminal.type("half a que")
    terminal.wait_for("half a que")
    terminal.wait_for("Ctrl-D or /quit ends\\)\r\n> ", typing="\x03")
    terminal.type("\x04")
    assert terminal.process.wait(HANGING) == 0


def test_a_file_that_is_there_is_not_written_over(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "turns").write_text("mine")
    error = run("chat", tiny, "--json", stdin=f"/save {tmp_path}/turns").error
    assert error.endswith("the file exists; name another")
    own = f"/save {tmp_path}/own"
    run("chat", tiny, "--max-new-tokens", 1, stdin=f"{own}\nthe river\n{own}")
    assert len((tmp_path / "own").read_text().splitlines()) == 1
