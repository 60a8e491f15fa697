"""Options and argument types that several commands share."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from click.core import ParameterSource

from steersman.chat_record import unkept
from steersman.errors import PlanError, ServingError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from steersman import Steering
    from steersman.vllm.backend import Engine

Command = TypeVar("Command", bound=Callable[..., Any])

LARGEST_SEED = 2**32 - 1
"""What every library's generator takes."""

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


_PAIRS_OF_LAB = {"natural": "digits", "source": "restricted", "target": "restricted"}
"""Models of the lab whose world is about something else than refusals."""


@dataclass(frozen=True)
class ModelChoice:
    """Which model to open, and how; `chat`: how `load_model` is to render its chats."""

    name: str
    device: str | None
    dtype: str | None
    revision: str | None
    chat: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> tuple[Any, Any]:
        """The model in evaluation mode and its tokenizer. Raises ModelError for what cannot be opened."""
        from steersman import load_model
        from steersman.cli.quiet import quiet_libraries

        quiet_libraries()
        return load_model(
            self.name, device=self.device, dtype=self.dtype, revision=self.revision, **self.chat
        )

    def typed(self) -> list[str]:
        """The arguments that name it to another command."""
        chat = self.chat
        given = [
            ("--device", self.device),
            ("--dtype", self.dtype),
            ("--revision", self.revision),
            ("--chat-template", chat.get("chat_template")),
            ("--chat-date", chat.get("chat_date")),
            *(
                ("--chat-template-arg", f"{key}={json.dumps(value)}")
                for key, value in chat.get("chat_template_arguments", {}).items()
            ),
        ]
        return [self.name, *(word for name, of in given if of is not None for word in (name, str(of)))]

    def pairs(self) -> str:
        """Pairs to try it with: the lab's own for its models, else a file that is yet to be written."""
        if not self.name.startswith("lab:"):
            return "pairs.jsonl"
        name = self.name.removeprefix("lab:").partition("@")[0].partition("-")[0]
        return f"lab:{_PAIRS_OF_LAB.get(name, 'refusal')}/train"


@dataclass(frozen=True)
class BackendChoice:
    """What runs the model: transformers in this process, or an engine."""

    name: Literal["transformers", "vllm"]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def on_engine(self) -> bool:
        """Whether an engine runs the model."""
        return self.name == "vllm"

    def engine(self, model: ModelChoice, **wanted: Any) -> AbstractContextManager[Engine]:
        """The model in an engine; further arguments as `steersman.vllm.backend.opened_engine` takes them."""
        from steersman.cli.quiet import quiet_libraries
        from steersman.vllm.backend import opened_engine

        if model.device is not None:
            raise ServingError(
                f"--device {model.device}: goes with --backend transformers; an engine takes what it finds "
                "(CUDA_VISIBLE_DEVICES)"
            )
        quiet_libraries()
        return opened_engine(
            model.name,
            dtype=model.dtype,
            revision=model.revision,
            chat=model.chat,
            options=dict(self.options),
            **wanted,
        )


@dataclass(frozen=True)
class SteeringChoice:
    """One ``--steering [NAME=]PATH[@STRENGTH]``."""

    path: str
    name: str | None = None
    strength: float = 1.0

    def __str__(self) -> str:
        name = "" if self.name is None else f"{self.name}="
        return f"{name}{self.path}{self.dial}"

    @property
    def dial(self) -> str:
        """The strength as it is written, every digit: "@0.5"; empty where it is 1."""
        return "" if self.strength == 1.0 else f"@{self.strength!r}".removesuffix(".0")

    def open(self, option: str = "--steering ", *, named: bool = False) -> Steering:
        """The saved steering, scaled. Raises PlanError where that takes a strength out of its range.

        Args:
            option: What the error says before it.
            named: What is made of it says its name: the folder's, without where that lies.
        """
        from steersman import Steering

        steering = Steering.from_pretrained(self.path)
        if named:
            place = Path(self.path)
            nameless = place.name in ("", "..")  # "." and "x/..": what lies there has a name
            name = (place.resolve() if nameless else place).name if place.exists() else self.path
            steering = replace(steering, provenance={**steering.provenance, "name": name})
        if self.strength == 1.0:
            return steering
        try:
            return self.strength * steering
        except PlanError as error:
            raise PlanError(f"{option}{self}: scaled by {self.strength:g}, {error}") from None


class SteeringType(click.ParamType[SteeringChoice]):
    """Reads ``[NAME=]PATH[@STRENGTH]``; what exists as it is written is a path, whatever signs are in it."""

    name = "steering"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> SteeringChoice:
        if isinstance(value, SteeringChoice):
            return value
        name, path, strength = None, str(value), 1.0
        if not Path(path).exists() and (named := re.match(r"([\w.-]+)=(?=.)", path)):
            name, path = named[1], path[named.end() :]
        if not Path(path).exists() and "@" in path:
            path, _, dial = path.rpartition("@")
            strength = self._strength(dial, value, parameter, context)
        if not path:
            self.fail(f"{value!r} names no steering; right is [NAME=]PATH[@STRENGTH]", parameter, context)
        return SteeringChoice(path, name, strength)

    def _strength(
        self, dial: str, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> float:
        try:
            strength = float(dial)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength):
            self.fail(
                f"{value!r}: {dial!r} is no strength; right is a number such as 0.5", parameter, context
            )
        return strength


class LayersType(click.ParamType[Any]):
    """Reads layer numbers such as ``3``, ``0,2-4``, or ``all``."""

    name = "layers"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, ...] | Literal["all"]:
        if isinstance(value, tuple) or value == "all":
            return value  # type: ignore[no-any-return]
        layers: list[int] = []
        for part in str(value).split(","):
            span = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part, re.ASCII)
            first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
            if first > last:
                self.fail(f"{value!r} names no layers; right is 3, 0,2-4 or all", parameter, context)
            layers += range(first, last + 1)
        return tuple(dict.fromkeys(layers))


def layers_option(meant: str) -> Callable[[Command], Command]:
    """--layers, with what they are and the default in words."""
    return click.option("--layers", type=LayersType(), metavar="LAYERS", help=meant)


_WORDS_OF_JSON = {
    **dict.fromkeys(("true", "yes", "on"), "true"),
    **dict.fromkeys(("false", "no", "off"), "false"),
    **dict.fromkeys(("none", "null"), "null"),
}
"""What people write for true, false and nothing, in small letters: as JSON writes it."""


class KeyValueType(click.ParamType[tuple[str, Any]]):
    """Reads ``KEY=VALUE``, where VALUE is JSON, or else a text."""

    name = "option"

    def __init__(self, example: str) -> None:
        self._example = example

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        key, equals, given = str(value).partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r}: right is KEY=VALUE, such as {self._example}", parameter, context)
        try:
            read = json.loads(given)
        except (ValueError, RecursionError):
            if right := _WORDS_OF_JSON.get(given.lower()):  # a text, which counts as true
                self.fail(
                    f"{value!r}: right is {key}={right}, as in JSON, or {key}='\"{given}\"' for the text",
                    parameter,
                    context,
                )
            read = given
        if reason := unkept(read):
            self.fail(f"{str(value)!a}: the value is {reason}; right is {self._example}", parameter, context)
        return key, read


def chat_options(command: Command, side: str = "") -> Command:
    """--chat-template, --chat-template-arg and --chat-date, handed over as one mapping `chat` for
    `load_model`; with a `side` as --SIDE-chat-template and so on, and `SIDE_chat`.
    """
    start, of = (f"--{side}-", f" of the {side}") if side else ("--", "")
    name = f"{side}_chat" if side else "chat"

    def with_chat(**given: Any) -> Any:
        template, pairs, day = (given.pop(f"{name}_{part}") for part in ("template", "arguments", "date"))
        arguments = dict(pairs)
        if len(arguments) < len(pairs):
            raise click.UsageError(
                f"{start}chat-template-arg: an argument is given twice", click.get_current_context()
            )
        chat = {
            "chat_template": template,
            "chat_template_arguments": arguments or None,
            "chat_date": None if day is None else day.date(),
        }
        return command(**{name: {key: value for key, value in chat.items() if value is not None}}, **given)

    with_chat.__name__ = command.__name__
    with_chat.__doc__ = command.__doc__
    with_chat.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for decorate in (
        click.option(
            f"{start}chat-date",
            f"{name}_date",
            type=click.DateTime(["%Y-%m-%d"]),
            metavar="YYYY-MM-DD",
            help=f"What the chat template{of} takes for today [default: today].",
        ),
        click.option(
            f"{start}chat-template-arg",
            f"{name}_arguments",
            type=KeyValueType("enable_thinking=false"),
            multiple=True,
            metavar="KEY=VALUE",
            help=f"An argument of the chat template{of}, such as enable_thinking=false.",
        ),
        click.option(
            f"{start}chat-template",
            f"{name}_template",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help=f"The chat template{of} [default: the tokenizer's].",
        ),
    ):
        decorate(with_chat)
    return with_chat  # type: ignore[return-value]


def model_options(command: Command) -> Command:
    """MODEL with --device, --dtype, --revision and how its chats are rendered, handed over as one
    `ModelChoice` named `model`.
    """

    @chat_options
    def with_choice(
        *,
        model: str,
        device: str | None,
        dtype: str | None,
        revision: str | None,
        chat: Mapping[str, Any],
        **rest: Any,
    ) -> Any:
        return command(model=ModelChoice(model, device, dtype, revision, chat), **rest)

    with_choice.__name__ = command.__name__
    with_choice.__doc__ = command.__doc__
    with_choice.__click_params__ = [  # type: ignore[attr-defined]
        *getattr(command, "__click_params__", []),
        *getattr(with_choice, "__click_params__", []),
    ]
    for decorate in (
        click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="Number format of the weights (default: the checkpoint's).",
        ),
        click.option(
            "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps, or auto to spread over devices."
        ),
        click.argument("model"),
    ):
        decorate(with_choice)
    return with_choice  # type: ignore[return-value]


def backend_options(command: Command) -> Command:
    """--backend with --engine-option, handed over as one `BackendChoice` named `backend`."""

    def with_backend(
        *,
        backend: Literal["transformers", "vllm"],
        engine_options: tuple[tuple[str, Any], ...],
        **rest: Any,
    ) -> Any:
        if engine_options and backend != "vllm":
            raise click.UsageError("--engine-option goes with --backend vllm", click.get_current_context())
        if backend == "vllm":  # before torch is imported: it has remarks on the host's memory
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        return command(backend=BackendChoice(backend, engine_options), **rest)

    with_backend.__name__ = command.__name__
    with_backend.__doc__ = command.__doc__
    with_backend.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for decorate in (
        click.option(
            "--engine-option",
            "engine_options",
            type=KeyValueType("max_model_len=8192"),
            multiple=True,
            metavar="KEY=VALUE",
            help="An option of vLLM's engine, such as tensor_parallel_size=2.",
        ),
        click.option(
            "--backend",
            type=click.Choice(["transformers", "vllm"]),
            default="transformers",
            show_default=True,
            help="What runs the model.",
        ),
    ):
        decorate(with_backend)
    return with_backend  # type: ignore[return-value]


def given_option(name: str) -> bool:
    """Whether the user gave an option, rather than leaving it at its default."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


def output_option(what: str) -> Callable[[Command], Command]:
    """-o FOLDER, required."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=True,
        metavar="FOLDER",
        help=f"Where {what} goes.",
    )


resume_option = click.option(
    "--resume", is_flag=True, help="Go on from what a run that was stopped has saved."
)
match_option = click.option(
    "--match",
    type=click.Choice(["weights", "architecture"]),
    default="weights",
    show_default=True,
    help="Take only the weights that the steering was made for, or any of the same architecture.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
force_option = click.option("--force", is_flag=True, help="Replace what is already there.")
seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0, max=LARGEST_SEED),
    default=0,
    show_default=True,
    help="Seed of every random choice.",
)
steering_option = click.option(
    "--steering",
    "steerings",
    type=SteeringType(),
    multiple=True,
    metavar="[NAME=]PATH[@STRENGTH]",
    help="A saved steering, dialled by @STRENGTH; several are summed [default: none].",
)
version_option = click.version_option(package_name="steersman", message="%(prog)s %(version)s")


def batch_size_option(default: int) -> Callable[[Command], Command]:
    """--batch-size N."""
    return click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help="Texts that the model reads at once.",
    )


def max_new_tokens_option(default: int, unless: str = "") -> Callable[[Command], Command]:
    """--max-new-tokens N."""
    return click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        metavar="N",
        help=f"At most so many tokens an answer{unless}.",
    )


def scope_option(
    default: str | None, meant: str = "Which tokens are steered."
) -> Callable[[Command], Command]:
    """--scope, with what it means, which tells the default where that is none of the scopes."""
    return click.option(
        "--scope",
        type=click.Choice(["all", "prompt", "generated", "answer"]),
        default=default,
        show_default=default is not None,
        help=meant,
    )
