"""Starting the engine's own server, configured to be steered. Imports the engine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from steersman.errors import ServingError, SteersmanError
from steersman.vllm.serveable import LAB, check_heads, check_installed
from steersman.vllm.server.serving import Serving
from steersman.vllm.settings import KEY

PLUGINS = "VLLM_PLUGINS"
"""The engine's own list of plugins that it loads; all, where it is not set."""
_OURS = ("--model", "--revision")


def launch(serving: Serving, host: str, port: int, ready: Callable[[argparse.Namespace], None]) -> None:
    """Serve until the process is told to stop.

    Args:
        serving: What is served.
        host: Address to listen at.
        port: Port to listen at.
        ready: Called before the engine starts, with the server's arguments.

    Raises:
        ServingError: the engine cannot be steered, or did not start.
    """
    check_installed()
    _check_options(serving.options)
    allowed = os.environ.get(PLUGINS)
    if allowed is not None and "steersman" not in allowed.split(","):
        os.environ[PLUGINS] = ",".join(filter(None, [allowed, "steersman"]))

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    from steersman.vllm.plugin import register

    cli_env_setup()
    register()
    try:
        arguments = server_arguments(serving, host, port)
        check_heads(serving.model, serving.folder, serving.revision)
        ready(arguments)
        ServeSubcommand.cmd(arguments)
    except SteersmanError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise ServingError(
            f"vLLM does not serve {serving.model}: {_first_line(error)} (what it says above is the cause)"
        ) from error


def _check_options(options: Sequence[str]) -> None:
    for option in options:
        name = option.partition("=")[0]
        if name in _OURS:
            raise ServingError(f"{name} is given before --: steersman serve MODEL --revision REV")
        if name in ("--grpc", "--grpc-port"):
            raise ServingError(f"{name}: requests that do not come over HTTP cannot ask for a steering")


def _parser() -> Any:
    """The parser of the engine's server, whose errors are one line."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def error(message: str) -> NoReturn:
        raise ServingError(f"an option for vLLM's server: {message}")

    parser = make_arg_parser(FlexibleArgumentParser(prog="steersman serve MODEL … --"))
    parser.error = error
    return parser


def server_arguments(serving: Serving, host: str, port: int) -> argparse.Namespace:
    """The arguments of the engine's server, with steering in them."""
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.logger import configure_logging_from_args

    given = ["--model", serving.folder, "--host", host, "--port", str(port)]
    if serving.revision is not None:
        given += ["--revision", serving.revision]
    if serving.model.startswith(LAB):
        given += ["--dtype", "float32"]
    arguments: argparse.Namespace = _parser().parse_args([*given, *serving.options])
    for name, right in (("model", serving.folder), ("revision", serving.revision), ("model_tag", None)):
        if getattr(arguments, name, None) != right:
            raise ServingError(
                f"the options after -- name another {name.partition('_')[0]}; it is given before them"
            )
    configure_logging_from_args(arguments)
    validate_parsed_serve_args(arguments)
    names = list(arguments.served_model_name or [serving.model])
    for alias in serving.settings.aliases:
        if alias in names:
            raise ServingError(f"--alias {alias}: this is the name of the model itself; take another")
    arguments.served_model_name = [*names, *serving.settings.aliases]
    extra = dict(arguments.additional_config or {})
    if KEY in extra:
        raise ServingError(f"--additional-config holds {KEY!r}, which the options of steersman serve write")
    arguments.additional_config = {**extra, KEY: serving.configured()}
    return arguments


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
