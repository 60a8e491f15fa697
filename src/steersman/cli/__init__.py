"""The command line: `main`, its commands, and what its exits mean."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from tqdm import tqdm

from steersman.cli import (
    artifacts,
    benching,
    chatting,
    completing,
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
    pushing,
    reporting,
    screening,
    serving,
    sweeping,
    transplantation,
    tuning,
)
from steersman.cli.failures import Terminated, reported
from steersman.cli.options import CONTEXT_SETTINGS, version_option


class Workflow(click.Group):
    """A group whose help lists its commands by what one does with them, in that order."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each step."""
        width = max(map(len, self.commands))
        for step, commands in WORKFLOW.items():
            with formatter.section(step):
                formatter.write_dl(
                    [(str(one.name).ljust(width), one.get_short_help_str(100)) for one in commands]
                )


@click.group(
    cls=Workflow, context_settings=CONTEXT_SETTINGS, no_args_is_help=False, invoke_without_command=True
)
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

    MODEL is a Hub name, a folder, a GGUF file, or lab:NAME[@SEED]; PAIRS a file, or lab:NAME[/train|dev|test]
    (`steersman lab list` names them). Every command takes --json: one object on stdout, nothing else.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


WORKFLOW: dict[str, tuple[click.Command, ...]] = {
    "Look around": (demo.demo, lab.lab, models.describe),
    "Steer by experts": (experts.detect, experts.merge, experts.select, screening.screen, sweeping.sweep),
    "Steer by concepts": (concepts.refine, concepts.steer, maps.map_, transplantation.transplant),
    "Find where and how hard": (tuning.tune,),
    "Use a steering": (composition.compose, generation.generate, chatting.chat, serving.serve),
    "Measure it": (evaluation.evaluate, reporting.report, judging.judge, benching.bench),
    "Keep and share": (artifacts.show, pushing.push, interop.import_, interop.export),
    "The shell": (completing.completion,),
}

for command in (command for commands in WORKFLOW.values() for command in commands):
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
    with _ended_cleanly(), _stops_are_heard(), _bars_are_brief():
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


@contextmanager
def _stops_are_heard() -> Iterator[None]:
    """Raise a stop (Ctrl-C, SIGTERM) once more that was raised where Python drops exceptions: in destructors,
    callbacks of weak references, of C libraries.
    """
    before, timers = sys.unraisablehook, list[threading.Timer]()

    def again(dropped: sys.UnraisableHookArgs) -> None:
        number = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(dropped.exc_type)
        if number is None:
            before(dropped)
            return
        # A little later, when it is elsewhere; a real signal, which ends a sleep.
        main_thread = threading.main_thread().ident
        timers.append(threading.Timer(0.05, signal.pthread_kill, [main_thread, number]))
        timers[-1].start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


@contextmanager
def _bars_are_brief() -> Iterator[None]:
    """Let every bar, the libraries' too, be shown once, then once a minute and at its end where no terminal
    shows it: in a log each time is a line.
    """
    if sys.stderr.isatty():
        yield
        return
    before = tqdm.display

    def display(bar: tqdm[Any], *args: Any, **kwargs: Any) -> Any:
        bar.mininterval = bar.maxinterval = 60
        bar.leave = True
        return before(bar, *args, **kwargs)

    tqdm.display = display
    try:
        yield
    finally:
        tqdm.display = before


def _run_command(arguments: list[str]) -> None:
    if completing.complete(steersman):
        return
    # Not click's own main(): it prints errors in its own form, and takes every EOFError for Ctrl-C.
    with steersman.make_context("steersman", arguments) as context:
        steersman.invoke(context)
