"""Commands that write text: generate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from tqdm import tqdm

from steersman.cli.composition import composed, on_conflict_option
from steersman.cli.options import (
    ModelChoice,
    SteeringChoice,
    batch_size_option,
    json_option,
    match_option,
    max_new_tokens_option,
    model_options,
    seed_option,
    steering_option,
)
from steersman.cli.output import put_out
from steersman.errors import ModelError, PairsError, SteersmanError
from steersman.pairs import check_content, parse_json, read_text, render

if TYPE_CHECKING:
    from steersman.pairs import Content
    from steersman.steering import OnConflict, Steering

Match = Literal["weights", "architecture"]


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given, a text or messages, and where."""

    content: Content
    where: str


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
@seed_option
@json_option
def generate(
    model: ModelChoice,
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
    with --batch-size, those of a batch are of all its prompts together.

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
    opened, tokenizer = model.open()
    writer = Writer(opened, tokenizer, max_new_tokens, temperature)
    items: list[dict[str, Any]] = []
    rows = [(prompt, writer.ids_of(prompt)) for prompt in prompts]
    for start in tqdm(range(0, len(rows), batch_size), desc="generating", unit="batch", delay=1, leave=False):
        batch = rows[start : start + batch_size]
        # Base and steered draw the same chances.
        items += writer.answer(batch, steering, match=match, compare=compare, seed=seed + start)
    put_out({"items": items}, as_json, lambda: _in_words(items))


class Writer:
    """A model and its tokenizer, ready to answer prompts in batches."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        # New tokens must follow the prompt at once, so padding goes to the left; masked, any token pads.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    def ids_of(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens. Raises PairsError where prompt and answer exceed the model's context."""
        content = prompt.content
        if isinstance(content, str) and self.tokenizer.chat_template:
            content = [{"role": "user", "content": content}]
        try:
            text, add_special_tokens = render(self.tokenizer, content)
        except PairsError as error:
            raise PairsError(f"{prompt.where}: {error}") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)[
            "input_ids"
        ]
        if not ids:
            raise PairsError(f"{prompt.where}: the prompt has no tokens")
        from steersman.models.architecture import check_ids

        check_ids(self.model, max(ids), prompt.where)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and len(ids) + self.max_new_tokens > context:
            raise PairsError(
                f"{prompt.where}: {len(ids)} tokens and {self.max_new_tokens} new ones, but the model's "
                f"context holds {context}; shorten the prompt, or lower --max-new-tokens"
            )
        return ids

    def answer(
        self,
        batch: Sequence[tuple[Prompt, list[int]]],
        steering: Steering,
        *,
        match: Match,
        compare: bool,
        seed: int,
    ) -> list[dict[str, Any]]:
        """An item a prompt: the prompt, the model's own answer if asked for, the steered one, the receipt.

        The receipt is the batch's, and says how many prompts it covers.
        """
        ids = [row for _, row in batch]
        base = self._write(ids, seed) if compare else []
        with steering.apply(self.model, match=match, receipt="changes") as receipt:
            steered = self._write(ids, seed)
        return [
            {
                "prompt": prompt.content,
                **({"base": base[row]} if compare else {}),
                "steered": steered[row],
                "receipt": {**receipt.to_json(), "prompts": len(batch)},
            }
            for row, (prompt, _) in enumerate(batch)
        ]

    def _write(self, ids: Sequence[list[int]], seed: int) -> list[str]:
        import torch

        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        sampling = (
            {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        )
        torch.manual_seed(seed)
        with torch.inference_mode():
            try:
                written = self.model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                    num_beams=1,
                    num_return_sequences=1,
                    return_dict_in_generate=False,
                    **sampling,
                )
            except (ValueError, TypeError, IndexError, AssertionError) as error:
                # What a checkpoint's own generation_config.json asks for can fail in many ways.
                if isinstance(error, SteersmanError):
                    raise
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise ModelError(f"the model cannot generate with its own settings ({reason[0]})") from error
        new = written[:, inputs["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))


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
    parts = []
    for point, what in _CHANGED.items():
        sites = [site for site in receipt["tokens"] if site.partition(":")[0] == point]
        changed, tokens = (sum(receipt[key][site] for site in sites) for key in ("changed", "tokens"))
        if sites:
            parts.append(f"{what} changed at {changed} of {tokens} places")
    return f"{', '.join(parts) or 'nothing planned'} (tokens × layers)"


def _labelled(label: str, text: str) -> str:
    return f"{label:9}" + text.strip().replace("\n", "\n" + " " * 9)
