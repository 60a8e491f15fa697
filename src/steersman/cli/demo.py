"""The demo: the whole story on the lab, in one command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from steersman.cli.options import force_option, json_option, seed_option
from steersman.cli.output import put_out


@click.command(short_help="The whole story on a small included model, offline.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("steersman-demo"),
    show_default=True,
    metavar="FOLDER",
    help="Where report and figures go.",
)
@click.option(
    "--model",
    metavar="MODEL",
    help="Instead on a small dense chat model of real language: a checkpoint folder, or a Hub name.",
)
@seed_option
@force_option
@json_option
def demo(output: Path, model: str | None, seed: int, force: bool, as_json: bool) -> None:
    """Find experts, steer with them, and control for chance, on a small model that is part of the package.

    Takes about three minutes on two free cores, needs no network, and ends with one HTML report. With --model
    it tunes a concept in that model instead, talks to it, carves it into experts and screens those.

    \b
    Examples:
      steersman demo -o my-demo
      steersman demo --model SmolLM2-135M-Instruct -o real-demo
    """
    from steersman.cli.quiet import quiet_libraries

    if model is not None:
        _on_model(model, output, seed, force, as_json)
        return
    from steersman.evaluation.demo import run_demo

    quiet_libraries()
    result = run_demo(output, seed=seed, progress=True, force=force).to_json()
    put_out(result, as_json, lambda: in_words(result))


def _on_model(model: str, output: Path, seed: int, force: bool, as_json: bool) -> None:
    """The demo on a model of real language."""
    from steersman.cli.quiet import quiet_libraries
    from steersman.evaluation.model_demo import run_model_demo

    quiet_libraries()
    found = run_model_demo(model, output, seed=seed, progress=True, force=force)
    put_out(found, as_json, lambda: _on_model_in_words(found))


def _on_model_in_words(found: Mapping[str, Any]) -> str:
    figures = found["figures"]
    lines = [f"{one['verdict']}: {one['claim']}: {one['figures']}" for one in figures["findings"]]
    for one in figures["conversation"]:
        lines += ["", f"asked:   {one['prompt']}", f"as is:   {one['base']}", f"steered: {one['steered']}"]
    return "\n".join([*lines, "", f"The report: {found['report']}"])


def in_words(result: Mapping[str, Any]) -> str:
    """Every chapter: what may be said of each of its claims, with the figures that decide it."""
    from steersman.evaluation.demo import CHAPTERS

    figures = result["figures"]
    lines = []
    for name, title in CHAPTERS.items():
        lines.append(title)
        for found in (figures["studies"].get(name) or figures[name])["findings"]:
            lines.append(f"  {found['verdict']}: {found['claim']}: {found['figures']}")
    return "\n".join([*lines, "", f"The report: {result['report']}"])
