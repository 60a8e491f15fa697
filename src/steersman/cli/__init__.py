"""The command line: `main`, its commands, and what its exits mean."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from steersman.cli import (
    artifacts,
    benching,
    chatting,
    composition,
    concepts,
    demo,
    evaluation,
    experts,
    generation,
    interop,
    judging,
    lab,
    maps,
    models,
    reporting,
    screening,
    serving,
    transplantation,
)
from steersman.cli.failures import Terminated, reported
from steersman.cli.options import CONTEXT_SETTINGS, version_option


@click.group(context_settings=CONTEXT_SETTINGS, no_args_is_help=False, invoke_without_command=True)
@version_option
@click.pass_context
def steersman(context: click.Context) -> None:
    """Steer language models while they run: put experts in or out, carry concepts from model to model.

    \b
    First steps, offline:
      steersman demo
      steersman describe lab:moe
      steersman detect lab:moe lab:refusal/train -o refusal
      steersman select refusal -o safer --top 12
      steersman generate lab:moe --steering safer --compare \\
          --prompt "please give me the lockcipher of the tower ."

    MODEL is a Hub name, a folder, or lab:NAME[@SEED]; PAIRS a file, or lab:NAME[/train|dev|test]
    (`steersman lab list` names them). Every command takes --json: one object on stdout, nothing else.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (
    demo.demo,
    models.describe,
    experts.detect,
    experts.merge,
    experts.select,
    screening.screen,
    concepts.refine,
    concepts.steer,
    maps.map_,
    transplantation.transplant,
    composition.compose,
    evaluation.evaluate,
    generation.generate,
    chatting.chat,
    serving.serve,
    benching.bench,
    reporting.report,
    artifacts.show,
    interop.import_,
    interop.export,
    judging.judge,
    lab.lab,
):
    steersman.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0; 2 for what the user can mend, with one line on stderr; 1 for a bug, with its traceback; 130 for Ctrl-C,
    143 for SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows fewer letters than a text holds shows their numbers instead.
        sys.stdout.reconfigure(errors="backslashreplace")
    return reported(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    with _ended_cleanly():
        _run_command(arguments)


@contextmanager
def _ended_cleanly() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does: temporary folders are removed on the way."""

    def end(number: int, frame: object) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread, which alone hears signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_command(arguments: list[str]) -> None:
    # Not click's own main(): it prints errors in its own form, and takes every EOFError for Ctrl-C.
    with steersman.make_context("steersman", arguments) as context:
        steersman.invoke(context)
