"""Commands of the lab: what is in it, its models trained again, and dense models carved into experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from steersman.cli.options import (
    LARGEST_SEED,
    ModelChoice,
    json_option,
    model_options,
    output_option,
    seed_option,
)
from steersman.cli.output import in_columns, next_steps, put_out, require_free, unused


@click.group(short_help="Small trained models in which what was planted is known.")
def lab() -> None:
    """The lab: small trained models, offline, in which what was planted is known."""


@lab.command("list")
@json_option
def list_(as_json: bool) -> None:
    """The lab's models and data.

    \b
    Example:
      steersman lab list
    """
    from steersman import lab as the_lab

    result: dict[str, Any] = {
        "models": [
            {"name": f"lab:{name}", "about": about, "planted": bool(the_lab.planted(name))}
            for name, about in the_lab.MODELS.items()
        ],
        "data": [{"name": f"lab:{name}", "about": about} for name, about in the_lab.DATA.items()],
        "splits": list(the_lab.SPLITS),
    }
    put_out(result, as_json, lambda: _in_words(result))


@lab.command()
@click.argument("name")
@click.option(
    "--seed", type=click.IntRange(min=0, max=LARGEST_SEED), required=True, help="Seed of the training."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where the checkpoint goes (default: NAME-SEED here).",
)
@json_option
def train(name: str, seed: int, output: Path | None, as_json: bool) -> None:
    """Train the lab's model NAME again, from a seed: minutes on a CPU.

    \b
    Example:
      steersman lab train moe --seed 3 -o moe-3
    """
    output = Path(f"{name}-{seed}") if output is None else output
    require_free(output, force=False)
    from steersman import lab as the_lab
    from steersman.cli.quiet import quiet_libraries

    quiet_libraries()
    the_lab.train(name, seed, output, progress=True)
    result = {"output": str(output), "model": f"lab:{name}", "seed": seed}
    put_out(result, as_json, lambda: f"{output}: lab:{name}, trained with seed {seed}")


@lab.command()
@model_options
@click.option(
    "--texts",
    required=True,
    multiple=True,
    metavar="TEXTS",
    help="Texts to fit on: a file with a text or chat a line, or lab:NAME. Several share the tokens equally; "
    "the last fifth of each judges.",
)
@output_option("the checkpoint")
@click.option(
    "--experts",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    metavar="N",
    help="Experts of each layer.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=24,
    show_default=True,
    metavar="K",
    help="How many of them a token takes.",
)
@click.option(
    "--shared",
    type=click.IntRange(min=0),
    metavar="NEURONS",
    help="Neurons that always run [default: about a third; of a Qwen3 none].",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=16384,
    show_default=True,
    metavar="N",
    help="Tokens to fit on; half as many judge.",
)
@click.option(
    "--distill",
    "distillation",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="STEPS",
    help="Steps by which each layer is trained on what the dense one adds.",
)
@click.option("--random", is_flag=True, help="A control: neurons shuffled between experts, all else alike.")
@seed_option
@json_option
def carve(
    model: ModelChoice,
    texts: tuple[str, ...],
    output: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Carve the dense MODEL into a Mixture-of-Experts checkpoint, which plain transformers loads.

    A Llama, Mistral, Qwen2, Qwen3 or Gemma 1. Each FFN becomes shared neurons, experts of neurons that fire
    together, and a fitted router. The card says how far it is from the dense model on texts not fitted on.

    \b
    Examples:
      steersman lab carve lab:target --texts lab:texts -o carved --experts 16 --top-k 12
      steersman lab carve small --texts wiki.txt --texts chats.jsonl -o small-moe --experts 64 --top-k 8
      steersman lab carve small --texts wiki.txt -o control --random
    """
    require_free(output, force=False)
    from steersman import lab as the_lab
    from steersman.lab.carved_card import in_words
    from steersman.texts import load_texts

    read = [load_texts(source) for source in texts]
    opened, tokenizer = model.open()
    card = the_lab.carve(opened, tokenizer, read, output, progress=True, **options)
    put_out({"output": str(output), **card}, as_json, lambda: _card_in_words(card, in_words(card), output))


def _card_in_words(card: dict[str, Any], rows: Sequence[tuple[str, ...]], output: Path) -> str:
    control = ", shuffled between experts" if card["random"] else ""
    header = ("texts not fitted on", "dense perplexity", "carved", "ratio", "KL, nats a token")
    return (
        f"{output}: {card['class']}, top-{card['top_k']} of {card['experts']} experts of {card['size']} "
        f"neurons{control}, {card['shared']} shared\n\n{in_columns(header, rows)}\n\n"
        f"95 % intervals over rows of {card['row']} tokens"
    ) + next_steps(
        "Next, find the experts that cause a behaviour",
        ["screen", output, "pairs.jsonl", "-o", unused("screen")],
    )


def _in_words(result: dict[str, Any]) -> str:
    rows = [(entry["name"], entry["about"]) for entry in [*result["models"], *result["data"]]]
    splits = "|".join(result["splits"])
    return in_columns(("name", "what"), rows) + f"\n\nmodels take @SEED; data take /{splits}"
