"""Serving: a model on vLLM, each request with its own steering."""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.cli.options import SteeringChoice, SteeringType, json_option, match_option
from steersman.cli.output import harmless
from steersman.showing import on_one_line
from steersman.vllm.dtypes import in_words

if TYPE_CHECKING:
    from steersman.vllm.server.serving import Serving


class PairType(click.ParamType[tuple[str, str]]):
    """Reads ``ALIAS=STEERING``."""

    name = "alias"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        alias, _, steering = str(value).partition("=")
        if not alias or not steering:
            self.fail(
                f"{value!r}: right is ALIAS=STEERING, as in qwen3-faithful=faithful", parameter, context
            )
        return alias, steering


class BoundsType(click.ParamType[tuple[float, float]]):
    """Reads ``LEAST,MOST``."""

    name = "bounds"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        number = r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*"
        found = re.fullmatch(f"{number},{number}", str(value), re.ASCII)
        if not found:
            self.fail(f"{value!r}: right is LEAST,MOST, as in -2,2", parameter, context)
        return float(found[1]), float(found[2])


@click.command(short_help="Serve a model on vLLM; each request asks for its own steering.")
@click.argument("model")
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM-OPTIONS…]")
@click.option(
    "--steering",
    "steerings",
    type=SteeringType(),
    multiple=True,
    metavar="NAME=PATH",
    help="A saved steering and the name that requests ask for it by (default: its folder's).",
)
@click.option("--default", metavar="NAME[@S]", help="What requests get that ask for nothing.")
@click.option(
    "--alias",
    "aliases",
    type=PairType(),
    multiple=True,
    metavar="ALIAS=NAME[@S]",
    help="A further name of the model; requests for it are steered.",
)
@click.option(
    "--admin-key-env",
    metavar="VAR",
    help="Environment variable with the key of those who may change plans (default: STEERSMAN_ADMIN_KEY).",
)
@click.option(
    "--strengths",
    type=BoundsType(),
    default="-2,2",
    show_default=True,
    metavar="LEAST,MOST",
    help="What requests may multiply a steering by.",
)
@click.option(
    "--sites",
    type=click.Choice(["plans", "all"]),
    default="plans",
    show_default=True,
    help="Layers that can be edited: those of the first plans, or all (for plans that come later).",
)
@click.option(
    "--max-steerings",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Plans that fit in at a time.",
)
@click.option(
    "--max-per-request",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="N",
    help="Steerings that one request may ask for.",
)
@match_option
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option(
    "--port",
    type=click.IntRange(min=1, max=65535),
    default=8000,
    show_default=True,
    metavar="N",
    help="Where to listen.",
)
@json_option
def serve(
    model: str,
    vllm_options: tuple[str, ...],
    steerings: tuple[SteeringChoice, ...],
    default: str | None,
    aliases: tuple[tuple[str, str], ...],
    admin_key_env: str | None,
    strengths: tuple[float, float],
    sites: str,
    max_steerings: int,
    max_per_request: int,
    match: str,
    revision: str | None,
    host: str,
    port: int,
    as_json: bool,
) -> None:
    """Serve MODEL with vLLM's OpenAI-compatible server, steered request by request.

    Requests name what they want: "vllm_xargs": {"steering": "faithful,honest@0.5"}. Options after -- are
    those of vLLM's server. One line (with --json one object) on stdout says that it answers; the engine's own
    lines go to stderr. Ctrl-C ends it.

    \b
    Examples:
      steersman serve lab:target --steering honest=plans/honest
      steersman serve Qwen/Qwen3-30B-A3B --steering faithful=plans/faithful \\
          --alias qwen3-faithful=faithful -- --tensor-parallel-size 2 --max-model-len 8192
    """
    from steersman.cli.quiet import quiet_libraries
    from steersman.vllm.serveable import check_installed

    check_installed()  # before the server's parts, which need what comes with the engine
    from steersman.vllm.server.launch import launch
    from steersman.vllm.server.ready import when_ready
    from steersman.vllm.server.serving import prepare, take_admin_key

    quiet_libraries()
    settings = {
        "steerings": _named(steerings),
        "default": default,
        "aliases": _once(aliases, "--alias"),
        "strengths": strengths,
        "sites": sites,
        "max_steerings": max_steerings,
        "max_per_request": max_per_request,
        "match": match,
    }
    changeable = take_admin_key(admin_key_env)
    serving = prepare(model, settings, vllm_options, revision)
    with _lines_to_stderr() as stdout:

        def say(address: str, listed: dict[str, Any], arguments: Namespace) -> None:
            told = _told(serving, address, arguments, changeable, listed)
            line = json.dumps(told) if as_json else harmless(_in_words(told))
            os.write(stdout, f"{line}\n".encode())

        def ready(arguments: Namespace) -> None:
            when_ready(arguments, lambda address, listed: say(address, listed, arguments))

        launch(serving, host, port, ready)


def _named(steerings: tuple[SteeringChoice, ...]) -> dict[str, str]:
    for one in steerings:
        if one.strength != 1:
            raise click.UsageError(
                f"--steering {one}: requests dial the strength; for all of them: --default NAME@STRENGTH",
                click.get_current_context(),
            )
    return _once(tuple((one.name or Path(one.path).name, one.path) for one in steerings), "--steering")


def _once(pairs: tuple[tuple[str, str], ...], option: str) -> dict[str, str]:
    """Pairs as a mapping, where each name is given once."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"{option}: {name!r} is given twice", click.get_current_context())
    return dict(pairs)


@contextmanager
def _lines_to_stderr() -> Iterator[int]:
    """Send what this process and its children print to stderr; gives the real stdout, as a descriptor."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield kept
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _told(
    serving: Serving, address: str, arguments: Namespace, changeable: bool, listed: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "address": f"{address}/v1",
        "models": list(arguments.served_model_name),
        "steerings": [
            {"name": one.name, "fingerprint": one.steering.fingerprint} for one in serving.registry.names()
        ],
        "default": serving.settings.default,
        "aliases": dict(serving.settings.aliases),
        "changeable": changeable,
        "dtype": listed.get("dtype"),
        "checkpoint_dtype": listed.get("checkpoint_dtype"),
    }


def _in_words(told: Mapping[str, Any]) -> str:
    told = on_one_line(told)
    names = ", ".join(one["name"] for one in told["steerings"]) or "none yet"
    default = f"; without a word: {told['default']}" if told["default"] else ""
    dtype = f" {in_words(told['dtype'], told['checkpoint_dtype'])}" if told["dtype"] else ""
    return f"{', '.join(told['models'])} at {told['address']}{dtype}; steerings: {names}{default}"
