"""Commands that talk with a model, turn by turn: chat."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from steersman.cli.composition import composed, on_conflict_option
from steersman.cli.failures import explain, one_line
from steersman.cli.generation import (
    labelled,
    receipt_in_words,
    stdin_lines,
    system_option,
    temperature_option,
)
from steersman.cli.options import (
    ModelChoice,
    SteeringChoice,
    SteeringType,
    json_option,
    match_option,
    max_new_tokens_option,
    model_options,
    seed_option,
    steering_option,
)
from steersman.cli.output import harmless, put_out, whole_file
from steersman.cli.writers import Match, Prompt, Streamed, Writer
from steersman.errors import PairsError, PlanError
from steersman.pairs import check_content
from steersman.showing import count_of

if TYPE_CHECKING:
    from steersman.steering import OnConflict, Steering

HELP = """\
/strength X            dial the steering: 0.5 is half, 0 off, -1 the other way; alone, say what it is
/base                  answer the last question once more as the model is; the conversation does not change
/steering PATH[@X] …   steer by these from now on; + PATH[@X] adds one; none takes all off; alone, say which
                       (a path with spaces in quotes)
/system TEXT           a system message before the conversation; none takes it off; alone, say which
/reset                 forget the conversation
/save FILE             write the turns with their receipts, JSON lines; the same file again is written anew
/help, /quit           this; the end (as is Ctrl-D). Ctrl-C stops an answer
A question that begins with a slash is written with two."""


@click.command(short_help="Talk with MODEL, steered, turn by turn.")
@model_options
@steering_option
@system_option
@max_new_tokens_option(512)
@temperature_option
@match_option
@on_conflict_option
@seed_option
@json_option
def chat(
    model: ModelChoice,
    steerings: tuple[SteeringChoice, ...],
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    match: Match,
    on_conflict: OnConflict,
    seed: int,
    as_json: bool,
) -> None:
    """Talk with MODEL, steered: a line is a question, answered with all that was said before; after each
    answer, what was in fact steered. /help lists what else a line can be: /strength, /base, /steering,
    /system, /save, /reset.

    Questions from a file or a pipe are taken line by line; what is refused then ends the command. With --json
    the answers come at the end, as items of one object. The model runs by transformers, in this process.

    \b
    Examples:
      steersman chat lab:moe --steering safer
      printf 'hello\\n/base\\n' | steersman chat lab:moe --steering safer@0.5 --json
    """
    opened, tokenizer = model.open()
    writer = Writer(opened, tokenizer, max_new_tokens, temperature)
    conversation = Conversation(writer, match, on_conflict, seed)
    conversation.say_first(system, "--system")
    conversation.steer(steerings, 1.0)
    interactive = sys.stdin.isatty()
    # The object on stdout is alone there.
    out = sys.stdout if not as_json else sys.stderr if interactive else None
    Session(conversation, out, interactive).run(model.name)
    if as_json:
        put_out({"items": conversation.items, "generation": writer.own_settings.to_json()}, True, str)


@dataclass
class Conversation:
    """What was said, and the plan by which the next answer is steered."""

    writer: Writer
    match: Match
    on_conflict: OnConflict
    seed: int
    steerings: tuple[SteeringChoice, ...] = ()
    strength: float = 1.0
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)
    """The turns as `generate` gives them: prompt, base or steered, receipt; and what they were made with."""
    _plan: Steering | None = None

    def steer(self, steerings: Sequence[SteeringChoice], strength: float) -> None:
        """Answer by these from now on. Raises what refuses a plan, and stays with those before then."""
        plan = composed(steerings, self.on_conflict) if steerings else None
        if plan is not None:
            from steersman.models.apply import check_model

            plan = plan if strength == 1 else strength * plan
            check_model(plan, self.writer.model, self.match)
        self._plan, self.steerings, self.strength = plan, tuple(steerings), strength

    def say_first(self, system: str | None, where: str) -> None:
        """Have a system message before the conversation, or none. Raises PairsError for an empty one."""
        if system is not None:
            check_content(system, where)
        self.system = system

    def ask(self, text: str, watch: Watch) -> dict[str, Any]:
        """Put a question, and keep it with its answer. Raises PairsError where it does not fit the model."""
        check_content(text, "the question")
        prompt = self._prompt(text)
        seed = self.seed + len(self.items)
        answer = self._answer(prompt, self._plan, seed, watch)
        said = "base" if self._plan is None else "steered"
        item = {
            "prompt": prompt.content,
            said: answer.text,
            "ended": answer.ended,
            "seed": seed,
            "steering": [str(choice) for choice in self.steerings],
            "strength": self.strength,
            **({} if answer.receipt is None else {"receipt": answer.receipt}),
        }
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
        self.items.append(item)
        return item

    def last_steered(self) -> dict[str, Any]:
        """The last question with its answer. Raises PlanError where there is none, or nothing was steered."""
        if not self.messages:
            raise PlanError("/base answers the last question as the model is: there is none yet")
        item = self.items[-1]
        if "steered" not in item:
            raise PlanError("/base: the last answer is the model's own already, nothing was steered")
        return item

    def ask_again_unsteered(self, item: dict[str, Any], watch: Watch) -> dict[str, Any]:
        """Answer a question as the model is."""
        answer = self._answer(Prompt(item["prompt"], "the question"), None, item["seed"], watch)
        item["base"] = answer.text
        return {"ended": answer.ended}

    def _answer(self, prompt: Prompt, plan: Steering | None, seed: int, watch: Watch) -> Streamed:
        try:
            ids = self.writer.ids_of(prompt, least=1)
        except PairsError as error:
            raise PairsError(f"{error} (/reset begins anew)" if self.messages else str(error)) from None
        return self.writer.stream(ids, plan, match=self.match, seed=seed, **watch.options())

    def _prompt(self, text: str) -> Prompt:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return Prompt([*first, *self.messages, {"role": "user", "content": text}], "the question")


class Watch:
    """While an answer is written: where its text goes as it comes, and whether Ctrl-C has stopped it."""

    def __init__(self, out: TextIO | None) -> None:
        self.out = out
        self.stopped = False

    def options(self) -> dict[str, Any]:
        """What `Writer.stream` is told."""
        return {"show": self._show, "stopped": lambda: self.stopped}

    def _show(self, text: str) -> None:
        if self.out is not None:
            self.out.write(harmless(text))
            self.out.flush()

    @contextmanager
    def open(self, interruptible: bool) -> Iterator[Watch]:
        """A first Ctrl-C ends the answer at its next token, so that all that was steered is counted; a second
        one, for who cannot wait for it, breaks off.
        """

        def stop(number: int, frame: object) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True

        before = signal.signal(signal.SIGINT, stop) if interruptible else None
        try:
            yield self
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)


class Session:
    """Lines in, answers out, until the lines end."""

    def __init__(self, conversation: Conversation, out: TextIO | None, interactive: bool) -> None:
        self.conversation = conversation
        self.out = out
        self.interactive = interactive
        self.saved: set[Path] = set()
        """Files of this conversation, which it may write anew."""

    def run(self, model: str) -> None:
        """Take lines until they end, or /quit."""
        if self.interactive:
            self._say(f"{model}, {self._plan_in_words()}. /help lists the commands, Ctrl-D ends.")
        if own := self.conversation.writer.own_settings.in_words():
            self._say(labelled("settings", own))
        for line in self._typed() if self.interactive else stdin_lines():
            try:
                if line in ("/quit", "/exit"):
                    return
                if line:
                    self._take(line)
            except Exception as error:
                reason = explain(error)
                if reason is None or not self.interactive:
                    raise
                print(f"steersman: error: {harmless(one_line(reason))}", file=sys.stderr)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self._say("\n(broken off: the question is not part of the conversation)")

    def _typed(self) -> Iterator[str]:
        """Lines of a terminal; Ctrl-C drops the line that is being typed."""
        with suppress(ImportError):
            import readline  # noqa: F401  # gives `input` its keys and its memory
        while True:
            try:
                yield input("> ").strip()
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D or /quit ends)")
            except EOFError:
                self._say("")
                return
            except UnicodeDecodeError:
                print("steersman: error: what was typed is not UTF-8", file=sys.stderr)

    def _take(self, line: str) -> None:
        if not line.startswith("/") or line.startswith("//"):
            question = line[1:] if line.startswith("//") else line
            self._answer("", lambda watch: self.conversation.ask(question, watch))
            return
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "strength": self._strength,
            "base": self._base,
            "steering": self._steering,
            "system": self._system,
            "reset": self._reset,
            "save": self._save,
            "help": lambda _: self._say(HELP),
        }
        if name not in commands:
            known = ", ".join(f"/{one}" for one in (*commands, "quit"))
            raise PlanError(f"/{name} is no command; right are {known} (a question: //{name})")
        commands[name](rest.strip())

    def _answer(self, label: str, write: Callable[[Watch], dict[str, Any]]) -> None:
        """Show an answer as it is written, and below it what was steered."""
        if label and self.out is not None:
            self.out.write(label)
        with Watch(self.out).open(self.interactive) as watch:
            item = write(watch)
        ends = {
            "end": "",
            "length": " … (cut: --max-new-tokens)",
            "full": " … (cut: the model's context is full; /reset begins anew)",
            "stopped": " … (stopped)",
        }
        self._say(ends[item["ended"]])
        if "receipt" in item:
            self._say(labelled("receipt", receipt_in_words(item["receipt"])))

    def _base(self, rest: str) -> None:
        _nothing_after("/base", rest)
        item = self.conversation.last_steered()  # refused before anything is shown
        self._answer(f"{'base':9}", lambda watch: self.conversation.ask_again_unsteered(item, watch))

    def _strength(self, rest: str) -> None:
        conversation = self.conversation
        if rest:
            try:
                strength = float(rest)
            except ValueError:
                raise PlanError(f"/strength {rest}: right is a number such as 0.5") from None
            if not conversation.steerings:
                raise PlanError("/strength: there is no steering to dial; /steering PATH takes one")
            conversation.steer(conversation.steerings, strength)
        self._say(self._plan_in_words())

    def _steering(self, rest: str) -> None:
        if rest:
            adding = rest.startswith("+")
            given = () if rest == "none" else _steerings(rest.removeprefix("+"))
            before = self.conversation.steerings if adding else ()
            self.conversation.steer((*before, *given), self.conversation.strength if adding else 1.0)
        self._say(self._plan_in_words())

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.say_first(None if rest == "none" else rest, "/system")
        said = self.conversation.system
        self._say("no system message" if said is None else f"system   {said}")

    def _reset(self, rest: str) -> None:
        _nothing_after("/reset", rest)
        self.conversation.messages.clear()
        self._say("the conversation is forgotten")

    def _save(self, rest: str) -> None:
        if not rest:
            raise PairsError("/save FILE: name the file")
        file = Path(rest)
        with whole_file(file, force=file.absolute() in self.saved or None) as place:
            lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in self.conversation.items]
            place.write_text("".join(lines), encoding="utf-8")
        self.saved.add(file.absolute())
        self._say(f"{rest}: {count_of(len(self.conversation.items), 'turn')}")

    def _plan_in_words(self) -> str:
        conversation = self.conversation
        if not conversation.steerings:
            return "not steered"
        named = ", ".join(map(str, conversation.steerings))
        return f"steered by {named}" + (
            "" if conversation.strength == 1 else f", times {conversation.strength:g}"
        )

    def _say(self, text: str) -> None:
        if self.out is not None:
            print(harmless(text), file=self.out, flush=True)


def _nothing_after(command: str, rest: str) -> None:
    if rest:
        raise PlanError(f"{command} takes nothing; {rest!r} is too much")


def _steerings(text: str) -> tuple[SteeringChoice, ...]:
    """What `--steering` would read of each word; quotes hold a path with spaces together."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise PlanError(f"/steering {text}: {error}") from None
    if not words:
        raise PlanError("/steering +: name the steering to add")
    return tuple(SteeringType().convert(word, None, None) for word in words)
