"""Benchmarks of what runs elsewhere: a server's speed with steerings and without."""

from __future__ import annotations

import re
import statistics
from typing import TYPE_CHECKING, Any

import click

from steersman.cli.options import json_option, seed_option
from steersman.cli.output import in_columns, put_out

if TYPE_CHECKING:
    from steersman.vllm.client_benchmark import Run


@click.group(short_help="Measure a running server.")
def bench() -> None:
    """Measure what runs elsewhere."""


@bench.command("serve", short_help="Tokens a second of a server, with steerings and without.")
@click.option(
    "--url", default="http://127.0.0.1:8000", show_default=True, metavar="URL", help="Of the server."
)
@click.option(
    "--steering",
    "names",
    multiple=True,
    required=True,
    metavar="NAME",
    help="A steering that the server knows; several make requests that differ.",
)
@click.option(
    "--requests", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="A run."
)
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=32, show_default=True, metavar="N", help="At a time."
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Of each.",
)
@click.option(
    "--answer-tokens",
    type=click.IntRange(min=2),
    default=128,
    show_default=True,
    metavar="N",
    help="Of each.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="N",
    help="Runs of each arm.",
)
@seed_option
@json_option
def bench_serve(
    url: str,
    names: tuple[str, ...],
    requests: int,
    concurrency: int,
    prompt_tokens: int,
    answer_tokens: int,
    rounds: int,
    seed: int,
    as_json: bool,
) -> None:
    """Measure a server that `steersman serve` started, by vLLM's own benchmark client.

    Four kinds of requests: unsteered, all steered alike, all steered differently (the names in turn, each
    time at another strength), and mixed. In every round each kind is run once, in random order; what is
    shown are medians, and the ratio to unsteered with its least and most over the rounds.

    A server that wants a key finds it in OPENAI_API_KEY, as from any client.

    \b
    Example:
      steersman bench serve --steering faithful --steering honest --concurrency 64
    """
    from steersman.cli.quiet import quiet_libraries
    from steersman.vllm.client_benchmark import Load, measure
    from steersman.vllm.serveable import check_installed

    check_installed()
    quiet_libraries()
    for name in names:
        if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == "none":
            raise click.UsageError(
                f"--steering {name!r}: right is the name of one steering, without a strength",
                click.get_current_context(),
            )
    load = Load(requests, concurrency, prompt_tokens, answer_tokens)
    runs = measure(url.rstrip("/").removesuffix("/v1"), names, load, rounds, seed)
    result = {"url": url, **vars(load), "rounds": rounds, "arms": summary(runs)}
    put_out(result, as_json, lambda: _in_words(result))


def summary(runs: list[Run]) -> list[dict[str, Any]]:
    """Medians by arm, in the order of the arms; `ratio` is of tokens a second to those unsteered."""
    from steersman.vllm.client_benchmark import ARMS

    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in ARMS}
    base = [run.tokens_per_second for run in by_arm["unsteered"]]
    rows = []
    for arm, of_arm in by_arm.items():
        rates = [run.tokens_per_second for run in of_arm]
        ratios = [rate / unsteered for rate, unsteered in zip(rates, base, strict=True)]
        rows.append(
            {
                "arm": arm,
                "tokens_per_second": statistics.median(rates),
                "first_token_ms": statistics.median(run.first_token for run in of_arm),
                "next_token_ms": statistics.median(run.next_token for run in of_arm),
                "ratio": statistics.median(rates) / statistics.median(base),
                "least": min(ratios),
                "most": max(ratios),
            }
        )
    return rows


def _in_words(result: dict[str, Any]) -> str:
    rows = [
        (
            row["arm"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['first_token_ms']:.1f}",
            f"{row['next_token_ms']:.2f}",
            f"{row['ratio']:.3f}",
            f"[{row['least']:.3f}, {row['most']:.3f}]",
        )
        for row in result["arms"]
    ]
    header = ("requests", "tokens/s", "first token, ms", "next token, ms", "to unsteered", "least, most")
    return in_columns(header, rows)
