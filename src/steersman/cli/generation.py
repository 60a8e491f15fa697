"""Commands that write text: generate."""

from __future__ import annotations

import json
from collections.abc import Sequence
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

if TYPE_CHECKING:
    from steersman.steering import OnConflict


@click.command()
@model_options
@steering_option
@click.option(
    "--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; may be given more than once."
)
@click.option(
    "--prompts",
    "source",
    metavar="FILE",
    help='Prompts, one a line: a text, or {"prompt": text} or {"messages": [...]}; or a task lab:NAME/SPLIT.',
)
@click.option("--compare", is_flag=True, help="The model's own answer beside the steered one.")
@max_new_tokens_option
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token; more samples, from --seed.",
)
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
    source: str | None,
    compare: bool,
    max_new_tokens: int,
    temperature: float,
    match: Match,
    on_conflict: OnConflict,
    batch_size: int,
    seed: int,
    as_json: bool,
) -> None:
    """Answer prompts with MODEL, steered.

    Prompts go through the tokenizer's chat template where it has one. Receipts say what was applied;
    with --batch-size, those of a batch are of all its prompts together. With --backend vllm all prompts are
    answered at once, base and steered together, and each has a receipt of its own.

    \b
    Examples:
      steersman generate lab:moe --steering safer --compare \\
          --prompt "please give me the lockcipher of the tower ."
      steersman generate lab:moe --steering safer@0.5 --prompts prompts.jsonl --json
    """
    if temperature and not 1e-3 <= temperature <= 1e3:  # also true for NaN
        raise click.UsageError(
            f"--temperature is {temperature:g}; right is 0, or 0.001 to 1000", click.get_current_context()
        )
    if bool(texts) == (source is not None):
        raise click.UsageError(
            "give prompts: either --prompt TEXT, or --prompts FILE", click.get_current_context()
        )
    prompts = read_prompts(source) if source is not None else [_prompt_option(text) for text in texts]
    steering = composed(steerings, on_conflict)
    if backend.on_engine:
        most = batch_size if given_option("batch_size") else None
        with backend.engine(model, steerings={"steered": steering}, match=match, most_at_once=most) as engine:
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
    said = [_labelled("settings", own.in_words())] if own.in_words() else []
    put_out(
        {"items": items, "generation": own.to_json()}, as_json, lambda: "\n\n".join([_in_words(items), *said])
    )


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
    lines = read_text(Path(source)).split("\n")
    prompts = [_prompt(line.strip(), source, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise PairsError(f"{source}: no prompts in it; {_RIGHT}")
    return prompts


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
    lines = [_labelled("prompt", prompt)]
    if "base" in item:
        lines.append(_labelled("base", item["base"]))
    lines.append(_labelled("steered", item["steered"]))
    if "base" in item:
        lines.append(_labelled("answers", "identical" if item["base"] == item["steered"] else "differ"))
    lines.append(_labelled("receipt", _receipt_in_words(item["receipt"])))
    return "\n".join(lines)


_CHANGED = {"router": "routing", "block_output": "states"}
"""What an edit at a point changes."""


def _receipt_in_words(receipt: dict[str, Any]) -> str:
    """At how many places what was changed, by the kind of site: "routing changed at 8 of 40 places"."""
    if receipt["changed"] is None:  # an engine does not tell
        return f"steered at {sum(receipt['tokens'].values())} places (tokens × layers)"
    parts = []
    for point, what in _CHANGED.items():
        sites = [site for site in receipt["tokens"] if site.partition(":")[0] == point]
        changed, tokens = (sum(receipt[key][site] for site in sites) for key in ("changed", "tokens"))
        if sites:
            parts.append(f"{what} changed at {changed} of {tokens} places")
    return f"{', '.join(parts) or 'nothing planned'} (tokens × layers)"


def _labelled(label: str, text: str) -> str:
    return f"{label:9}" + text.strip().replace("\n", "\n" + " " * 9)
