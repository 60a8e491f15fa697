"""Every code block of README and docs is run, in order, as a reader would; links and pictures lead somewhere.

In a page, Python blocks share one namespace and all blocks one temporary folder. A shell block is run by
bash, with `make` only asked what it would do. A `text` block right after a block is what that block prints
(… stands for anything). HTML comments just above a block, which a reader of the page's source sees:

    <!-- file: NAME -->       the block is the content of this file
    <!-- not run: REASON -->  the block is only shown

A page that says `<!-- needs data: FILE FILE -->` is run where the folder $STEERSMAN_DATA has these files, one
that says `<!-- needs packages: NAME NAME -->` where these can be imported.
`docs` is this checkout's, as for a reader who stands in it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from waiting import HANGING

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/**/*.md")]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SHOWN = {"json", "jsonl", "toml", "yaml", "text"}
PACKAGES = re.compile(r"^<!-- needs packages: (.+?) -->$", re.M)
# Which target of the Makefile runs a page that needs a package; test-harness, if it is not here.
ELSEWHERE = {"vllm": "make test-engine", "ray": "pip install ray"}
NEEDS = re.compile(r"^<!-- needs data: (.+?) -->$", re.M)
# Only what cannot be run in a test: fetching from the network, and what takes minutes.
MOST_NOT_RUN = 4

BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>file|not run): (?P<word>[^>]+?) -->\n)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)


@dataclass
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    code: str
    mark: str | None
    word: str | None
    follows: bool
    """Whether nothing stands between this block and the one before."""

    @property
    def runs(self) -> bool:
        return self.mark is None and self.language in ("python", "bash")


def blocks_of(text: str, page: str) -> list[Block]:
    assert len(re.findall(r"^```", text, re.M)) == 2 * len(BLOCK.findall(text)), (
        f"{page}: a fence is not closed"
    )
    blocks: list[Block] = []
    end = -1
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        follows = end >= 0 and not text[end : found.start()].strip()
        blocks.append(
            Block(page, line, found["language"], found["code"], found["mark"], found["word"], follows)
        )
        end = found.end()
    return blocks


def run_page(blocks: list[Block], folder: Path) -> None:
    """Run a page's blocks in order in a folder; what fails names the page and the line."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    previous: Block | None = None
    with contextlib.chdir(folder):
        for block in blocks:
            if block.mark == "file":
                assert block.word
                Path(block.word).write_text(block.code, encoding="utf-8")
            elif block.language == "text" and block.follows and previous and previous.runs:
                assert_prints(printed, block)
            elif block.runs:
                printed = (
                    run_python(block, namespace) if block.language == "python" else run_shell(block, folder)
                )
            else:
                assert block.mark == "not run" or block.language in SHOWN, (
                    f"{block.page}:{block.line}: unknown language"
                )
            previous = block


def run_python(block: Block, namespace: dict[str, object]) -> str:
    source = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's own line
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, block.page, "exec"), namespace)
    return printed.getvalue()


def run_shell(block: Block, folder: Path) -> str:
    only_asked = f'make() {{ command make --no-print-directory -n -C "{ROOT}" "$@" >/dev/null; }}\n'
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "100",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", only_asked + block.code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGING,
    )
    assert done.returncode == 0, (
        f"{block.page}:{block.line}: exit {done.returncode}\n{block.code}{done.stdout}{done.stderr}"
    )
    return done.stdout


def assert_prints(printed: str, expected: Block) -> None:
    """The printed text is what the page shows, up to white space and to what … stands for."""
    parts = [re.escape(" ".join(part.split())) for part in expected.code.split("…")]
    said = " ".join(printed.split())
    assert re.fullmatch(r"\s*.*?\s*".join(parts), said), (
        f"{expected.page}:{expected.line}: shows another text than\n{printed}"
    )


@pytest.mark.parametrize("name", NAMES)
def test_code_blocks_run(name: str, tmp_path: Path, own_checkpoint: Path) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    for file in " ".join(NEEDS.findall(page)).split():
        if not (Path(os.environ.get("STEERSMAN_DATA", "/nowhere")) / file).exists():
            pytest.skip(f"STEERSMAN_DATA names no folder with {file}")
    for package in " ".join(PACKAGES.findall(page)).split():
        if not installed(package):
            pytest.skip(f"{package} is not installed ({ELSEWHERE.get(package, 'make test-harness')})")
    (tmp_path / "my-model").symlink_to(own_checkpoint)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    run_page(blocks_of(page, name), tmp_path)


def installed(package: str) -> bool:
    """Whether a package is there, and not only a folder of that name (as tests/vllm is)."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


@pytest.fixture(scope="session")
def own_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `my-model` of the pages: any checkpoint of a reader's own; here, the lab's model saved."""
    import steersman

    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = steersman.load_model("lab:moe")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_few_blocks_are_not_run() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8"), page.name)]
    not_run = [f"{block.page}:{block.line}: {block.word}" for block in blocks if block.mark == "not run"]
    assert len(not_run) <= MOST_NOT_RUN, "\n".join(not_run)
    assert sum(block.runs for block in blocks) > 10


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [
        t for t in targets if not t.startswith(("http://", "https://")) and not (page.parent / t).exists()
    ]
    assert not missing


# The tests of the runner itself: what is wrong in a page must fail.


@pytest.mark.parametrize(
    "page",
    [
        "```python\n1 / 0\n```\n",
        "```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n",
        "```bash\nfalse\necho done\n```\n",
        "```bash\nmake no-such-target\n```\n",
        "```bash\nsteersman no-such-command\n```\n",
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        "```py\n1\n```\n",
    ],
    ids=["error", "assertion", "shell", "make", "steersman", "other output", "unknown language"],
)
def test_a_wrong_block_fails(page: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, ZeroDivisionError)):
        run_page(blocks_of(page, "page.md"), tmp_path)


def test_a_right_page_passes(tmp_path: Path) -> None:
    page = (
        "<!-- file: pairs.jsonl -->\n```jsonl\n{}\n```\n"
        "```python\nfrom pathlib import Path\nprint(Path('pairs.jsonl').read_text(), 'in 3 s')\n```\n"
        "prints\n\n```text\n{} in … s\n```\n"
        "```bash\ncat pairs.jsonl\nmake test PYTEST_ARGS=x\n```\n```text\n{}\n```\n"
        "<!-- not run: needs a network -->\n```bash\ngit clone nowhere\n```\n"
    )
    run_page(blocks_of(page, "page.md"), tmp_path)


def test_an_open_fence_is_noticed() -> None:
    with pytest.raises(AssertionError, match="not closed"):
        blocks_of("```python\nx = 1\n", "page.md")


def test_an_error_names_the_line_of_the_page(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_page(blocks_of("# Title\n\n```python\nx = 1\n1 / 0\n```\n", "page.md"), tmp_path)
    assert (caught.traceback[-1].frame.code.raw.co_filename, caught.traceback[-1].lineno + 1) == (
        "page.md",
        5,
    )


# The references name everything there is.


def test_python_page_names_the_public_face() -> None:
    import steersman

    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    missing = [name for name in steersman.__all__ if not re.search(rf"`{name}\b", page)]
    assert not missing


def test_command_line_page_names_every_command_and_option() -> None:
    import click

    from steersman.cli import steersman as top

    def commands(group: click.Group, path: str) -> dict[str, click.Command]:
        found: dict[str, click.Command] = {}
        for name, command in group.commands.items():
            below = f"{path} {name}"
            found |= commands(command, below) if isinstance(command, click.Group) else {below: command}
        return found

    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    every = commands(top, "steersman")
    options = {opt for c in every.values() for p in c.params if isinstance(p, click.Option) for opt in p.opts}
    missing = [f"`{name}" for name in every if f"`{name}" not in page]
    missing += [option for option in sorted(options) if not re.search(rf"{option}(?![\w-])", page)]
    assert len(every) >= 8
    assert not missing
