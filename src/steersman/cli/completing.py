"""Tab completion: a shell's script, and the words that stand for models, data and artifacts.

Nothing here waits for torch: each press of the key starts a process.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    shell_complete,
    split_arg_string,
)

from steersman.cli.options import json_option
from steersman.cli.output import put_out

PROGRAM, VARIABLE = "steersman", "_STEERSMAN_COMPLETE"

LAB_MODELS = ("moe", "moe-plain", "moe-prior", "natural", "source", "source-split", "target")
LAB_DATA = (
    "refusal", "faithfulness", "ordinary", "conflicts", "closed-book", "restricted", "unknown", "believed",
    "job", "request", "noise", "digits", "numbers", "everyday", "texts",
)  # fmt: skip
"""As the lab has them, which knows them only after torch is there."""


@click.command(short_help="Print the script that completes commands with the tab key.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion(context: click.Context, shell: str, as_json: bool) -> None:
    """Print what SHELL reads to complete commands, options, the lab's names, and artifacts by their kind.

    \b
    Examples:
      steersman completion bash >> ~/.bashrc
      steersman completion zsh >> ~/.zshrc
      steersman completion fish > ~/.config/fish/completions/steersman.fish
    """
    add_completion_class(_Bash)
    script = get_completion_class(shell)(context.find_root().command, {}, PROGRAM, VARIABLE).source()  # type: ignore[misc]
    put_out({"shell": shell, "script": script}, as_json, lambda: script.rstrip("\n"))


def complete(program: click.Command) -> bool:
    """Answer a shell that asks for completions, through the environment; whether one did."""
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return False
    add_completion_class(_Bash)
    _give_words(program, "")
    shell_complete(program, {}, PROGRAM, VARIABLE, asked)
    return True


class _Bash(BashComplete):
    """Bash ends words at `:` and `=`, too, so it is asked for the line, and told what follows the last."""

    name = "bash"
    source_template = BashComplete.source_template.replace(
        "COMP_CWORD=$COMP_CWORD", 'COMP_CWORD=$COMP_CWORD COMP_TYPED="${COMP_LINE:0:$COMP_POINT}"'
    )

    def get_completion_args(self) -> tuple[list[str], str]:
        typed = os.environ["COMP_TYPED"]
        words = split_arg_string(typed)[1:]
        self._incomplete = words.pop() if words and not typed.endswith(" ") else ""
        return words, self._incomplete

    def format_completion(self, item: CompletionItem) -> str:
        before = re.match(r".*[:=]", self._incomplete)
        value = str(item.value)
        return f"{item.type},{value[len(before[0]) :] if before and item.type == 'plain' else value}"


class _Words(click.ParamType[Any]):
    """A parameter's own type, and what may stand there."""

    def __init__(self, own: click.ParamType[Any], words: Callable[[str], Iterator[str]], files: str) -> None:
        self.name, self._own, self._words, self._files = own.name, own, words, files

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return self._own.convert(value, parameter, context)

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        words = [CompletionItem(word) for word in self._words(incomplete)]
        # The shell completes files by itself, but only where it is told nothing else.
        return words or [CompletionItem(incomplete, type=self._files)]


def _lab(names: tuple[str, ...], prefix: str = "lab:") -> Callable[[str], Iterator[str]]:
    return lambda typed: (
        f"{prefix}{name}" for name in names if typed and f"{prefix}{name}".startswith(typed)
    )


def _artifacts(*kinds: str) -> Callable[[str], Iterator[str]]:
    """Folders that hold an artifact of one of these kinds (of any, where none is named), as it is typed."""

    def found(typed: str) -> Iterator[str]:
        above, _, begun = typed.rpartition("/")
        place = Path(f"{above}/") if above or typed.startswith("/") else Path()
        try:
            folders = sorted(folder for folder in place.iterdir() if folder.name.startswith(begun))
        except OSError:
            return
        for folder in folders:
            if (kind := _kind_of(folder)) is not None and (not kinds or kind in kinds):
                yield f"{above}/{folder.name}" if "/" in typed else folder.name

    return found


def _kind_of(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return str(manifest["kind"]) if manifest["format"] == "steersman" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


_MODEL, _DATA_SET, _PLAN = _lab(LAB_MODELS), _lab(LAB_DATA), _artifacts("steering")
_CONCEPT = _artifacts("concept_vector")
_NAMED: dict[str, Callable[[str], Iterator[str]]] = {
    "model": _MODEL,
    "map source": _MODEL,
    "target": _MODEL,
    "train name": _lab(LAB_MODELS, ""),
    "carve texts": _DATA_SET,
    **dict.fromkeys(("pairs", "adjust", "items", "keep", "harm", "tasks", "sides"), _DATA_SET),
    **dict.fromkeys(("map texts", "describe texts", "generate source"), _DATA_SET),
    "contrast": _artifacts("routing_contrast", "causal_screen"),
    "contrasts": _artifacts("routing_contrast", "affine_map"),
    "screen": _artifacts("causal_screen"),
    **dict.fromkeys(("concept", "concepts"), _CONCEPT),
    "map_": _artifacts("affine_map"),
    **dict.fromkeys(("steering", "steerings", "backs"), _PLAN),
    "experts": _artifacts("expert_profile"),
    "artifact": _artifacts(),
}
"""What stands for a parameter, by its name, or its command's and its own."""


def _give_words(command: click.Command, name: str) -> None:
    if isinstance(command, click.Group):
        for of, each in command.commands.items():
            _give_words(each, of)
    for parameter in command.params:
        words = _NAMED.get(f"{name} {parameter.name}") or _NAMED.get(str(parameter.name))
        if words is not None:
            of_folder = words not in (_MODEL, _DATA_SET)
            parameter.type = _Words(parameter.type, words, "dir" if of_folder else "file")
