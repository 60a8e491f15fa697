"""Commands that write text: generate."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from steersman.cli.composition import composed, on_conflict_option
from steersman.cli.options import (
    BackendChoice,
    ModelChoice,
    SteeringChoice,
    backend_options,
    batch_size_option,
    given_option,
    json_option,
    match_option,
    max_new_tokens_option,
    model_options,
    seed_option,
    steering_option,
)
from steersman.cli.output import put_out
from steersman.cli.writers import EngineWriter, Match, Prompt, Writer
from steersman.errors import PairsError
from steersman.pairs import check_content, parse_json, read_text
from steersman.showing import count_of
from steersman.stand_ins import HEAD, stand_in

if TYPE_CHECKING:
    from steersman.steering import OnConflict


system_option = click.option(
    "--system", metavar="TEXT", help="A system message before every conversation; needs a chat template."
)
temperature_option = click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    callback=lambda context, parameter, value: _check_temperature(value),
    help="0 takes the likeliest token; more samples, from --seed.",
)


@click.command(short_help="Answer prompts with MODEL, steered or as it is.")
@model_options
@steering_option
@click.option(
    "--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; may be given more than once."
)
@click.option(
    "--prompts",
    "sources",
    multiple=True,
    metavar="FILE",
    help='Prompts, one a line: a text, or {"prompt": text} or {"messages": [...]}; - reads them from stdin; '
    "or a task lab:NAME/SPLIT. May be given more than once.",
)
@system_option
@click.option("--compare", is_flag=True, help="The model's own answer beside the steered one.")
@max_new_tokens_option(64)
@temperature_option
@match_option
@on_conflict_option
@batch_size_option(1)
@backend_options
@seed_option
@json_option
def generate(
    model: ModelChoice,
    backend: BackendChoice,
    steerings: tuple[SteeringChoice, ...],
    texts: tuple[str, ...],
    sources: tuple[str, ...],
    system: str | None,
    compare: bool,
    max_new_tokens: int,
    temperature: float,
    match: Match,
    on_conflict: OnConflict,
    batch_size: int,
    seed: int,
    as_json: bool,
) -> None:
    """Answer prompts with MODEL, steered; without --steering as it is.

    Prompts go through the tokenizer's chat template where it has one. Receipts say what was applied;
    with --batch-size, those of a batch are of all its prompts together. With --backend vllm all prompts are
    answered at once, base and steered together, and each has a receipt of its own.

    \b
    Examples:
      steersman generate lab:moe --steering safer --compare \\
          --prompt "please give me the lockcipher of the tower ."
      steersman generate lab:moe --steering safer@0.5 --prompts prompts.jsonl --json
      echo "who keeps the keysign ?" | steersman generate lab:moe --prompts -
    """
    if bool(texts) == bool(sources):
        raise click.UsageError(
            "give prompts: either --prompt TEXT, or --prompts FILE", click.get_current_context()
        )
    if compare and not steerings:
        raise click.UsageError(
            "--compare shows the model's own answer beside a steered one: give --steering",
            click.get_current_context(),
        )
    if len(set(sources)) < len(sources):
        raise click.UsageError("--prompts names the same twice", click.get_current_context())
    prompts = [prompt for source in sources for prompt in read_prompts(source)]
    prompts += [_prompt_option(text) for text in texts]
    if system is not None:
        check_content(system, "--system")
        prompts = [_after_system(prompt, system) for prompt in prompts]
    steering = composed(steerings, on_conflict) if steerings else None
    if backend.on_engine:
        most = batch_size if given_option("batch_size") else None
        plans = {} if steering is None else {"steered": steering}
        with backend.engine(model, steerings=plans, match=match, most_at_once=most) as engine:
            on_engine = EngineWriter(engine, max_new_tokens, temperature)
            rows = [(prompt, on_engine.ids_of(prompt)) for prompt in prompts]
            items = on_engine.answer(rows, steering, match=match, compare=compare, seed=seed)
        _put_out(items, on_engine, as_json)
        return
    opened, tokenizer = model.open()
    writer = Writer(opened, tokenizer, max_new_tokens, temperature)
    items = []
    rows = [(prompt, writer.ids_of(prompt)) for prompt in prompts]
    for start in tqdm(range(0, len(rows), batch_size), desc="generating", unit="batch", delay=1, leave=False):
        batch = rows[start : start + batch_size]
        # Base and steered draw the same chances.
        items += writer.answer(batch, steering, match=match, compare=compare, seed=seed + start)
    _put_out(items, writer, as_json)


def _put_out(items: list[dict[str, Any]], writer: Writer, as_json: bool) -> None:
    own = writer.own_settings
    said = [labelled("settings", own.in_words())] if own.in_words() else []
    put_out(
        {"items": items, "generation": own.to_json()}, as_json, lambda: "\n\n".join([_in_words(items), *said])
    )


def _check_temperature(value: float) -> float:
    if value and not 1e-3 <= value <= 1e3:  # also true for NaN
        raise click.UsageError(
            f"--temperature is {value:g}; right is 0, or 0.001 to 1000", click.get_current_context()
        )
    return value


def _after_system(prompt: Prompt, system: str) -> Prompt:
    """The prompt as a conversation after a system message. Raises PairsError where it has one of its own."""
    content = prompt.content
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if messages[0]["role"] == "system":
        raise PairsError(f"{prompt.where}: has a system message of its own, so --system has no place")
    return Prompt([{"role": "system", "content": system}, *messages], prompt.where)


def _prompt_option(text: str) -> Prompt:
    check_content(text, "--prompt")
    return Prompt(text, "--prompt")


def read_prompts(source: str) -> list[Prompt]:
    """Prompts of a file, one a line, or of a task of the lab. Raises PairsError that names file and line."""
    if source.startswith("lab:"):
        from steersman import lab

        name, _, split = source.removeprefix("lab:").partition("/")
        rows = lab.task(name, split or "test")
        return [Prompt(row["messages"], f"{source}:{number}") for number, row in enumerate(rows, 1)]
    name, lines = ("stdin", stdin_lines()) if source == "-" else (source, read_text(Path(source)).split("\n"))
    prompts = [_prompt(line.strip(), name, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise PairsError(f"{name}: no prompts in it; {_RIGHT}")
    return prompts


def stdin_lines() -> Iterator[str]:
    """Lines of standard input as they come, without the whitespace around them. Raises PairsError."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        if number == 1 and (instead := stand_in(line[:HEAD])) is not None:
            raise PairsError(f"stdin: {instead}")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise PairsError(f"stdin:{number}: not UTF-8; right is text in UTF-8") from None


def _prompt(line: str, source: str, number: int) -> Prompt:
    where = f"{source}:{number}"
    try:
        row = parse_json(line)
    except ValueError as error:
        # What is JSON but for a key given twice is no text either.
        if Path(source).suffix in (".jsonl", ".json") or not isinstance(error, json.JSONDecodeError):
            raise PairsError(f"{where}: not JSON ({error}); {_RIGHT}") from None
        return Prompt(line, where)
    if not isinstance(row, dict):
        return Prompt(line, where)  # a text that happens to be JSON, such as a number
    if len(row) != 1 or not ({"prompt", "messages"} & set(row)):
        raise PairsError(f"{where}: the keys are {', '.join(row) or 'none'}; {_RIGHT}")
    content: Any = row.get("prompt", row.get("messages"))
    if isinstance(content, str) != ("prompt" in row):
        raise PairsError(f"{where}: {_RIGHT}")
    check_content(content, where)
    if not isinstance(content, str) and content[-1]["role"] == "assistant":
        raise PairsError(f"{where}: the last message is the assistant's; right is one that it answers")
    return Prompt(content, where)


_RIGHT = 'right is one prompt a line: a text, {"prompt": text} or {"messages": [...]}'


def _in_words(items: Sequence[dict[str, Any]]) -> str:
    return "\n\n".join(_item_in_words(item) for item in items)


def _item_in_words(item: dict[str, Any]) -> str:
    prompt = item["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    lines = [labelled("prompt", prompt)]
    if "base" in item:
        lines.append(labelled("base", item["base"]))
    if "steered" not in item:
        return "\n".join(lines)
    lines.append(labelled("steered", item["steered"]))
    if "base" in item:
        lines.append(labelled("answers", "identical" if item["base"] == item["steered"] else "differ"))
    lines.append(labelled("receipt", receipt_in_words(item["receipt"])))
    return "\n".join(lines)


_CHANGED = {"router": "routing", "block_output": "states"}
"""What an edit at a point changes."""


def receipt_in_words(receipt: dict[str, Any]) -> str:
    """At how many places what was changed, by the kind of site: "routing changed at 8 of 40 places"."""
    if receipt["changed"] is None:  # an engine does not tell
        return f"steered at {count_of(sum(receipt['tokens'].values()), 'place')} (tokens × layers)"
    parts = []
    for point, what in _CHANGED.items():
        sites = [site for site in receipt["tokens"] if site.partition(":")[0] == point]
        changed, tokens = (sum(receipt[key][site] for site in sites) for key in ("changed", "tokens"))
        if sites:
            parts.append(f"{what} changed at {changed} of {count_of(tokens, 'place')}")
    return f"{', '.join(parts) or 'nothing planned'} (tokens × layers)"


def labelled(label: str, text: str) -> str:
    """A text of one or more lines after its label."""
    return f"{label:9}" + text.strip().replace("\n", "\n" + " " * 9)
