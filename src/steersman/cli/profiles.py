"""What experts are for, in words and as JSON: for describe and show."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from steersman.cli.output import in_columns
from steersman.showing import count_of, on_one_line

if TYPE_CHECKING:
    from steersman import ExpertProfile
    from steersman.experts.profile import ExpertUse

Command = TypeVar("Command", bound=Callable[..., Any])

SHOWN = 24
"""Experts that are listed where none is asked for by number: those whose first token stands out most."""
SHOWN_TOKENS = 4

CAVEAT = "Use, not effect: what an expert causes shows in steering."


def filter_options(command: Command) -> Command:
    """--layer and --expert."""
    for decorate in (
        click.option(
            "--expert", type=click.IntRange(min=0), metavar="N", help="Only experts of this number."
        ),
        click.option("--layer", type=click.IntRange(min=0), metavar="N", help="Only experts of this layer."),
    ):
        decorate(command)
    return command


def profile_for_json(profile: ExpertProfile, layer: int | None, expert: int | None) -> dict[str, Any]:
    """The experts asked for, all of them where none is."""
    return {
        "tokens": profile.tokens,
        "texts": profile.texts,
        "experts": [use.to_json() for use in profile.experts(layer, expert)],
    }


def profile_in_words(profile: ExpertProfile, layer: int | None, expert: int | None) -> str:
    """A table of the experts, with contexts where few are asked for."""
    uses = profile.experts(layer, expert)
    asked = layer is not None or expert is not None
    listed = uses if asked else sorted(uses, key=_first_lift, reverse=True)[:SHOWN]
    rows = [(use.layer, use.expert, f"{use.rate:.1%}", _tokens(use)) for use in listed]
    lines = [
        f"{count_of(profile.tokens, 'token')} of {count_of(profile.texts, 'text')}, special tokens aside",
        "",
        in_columns(
            ("layer", "expert", "used by", "tokens that use it most: share of their occurrences"), rows
        ),
    ]
    if len(listed) < len(uses):
        lines.append(f"{len(uses) - len(listed)} more: ask by --layer and --expert, or --json for all")
    if asked and len(listed) <= SHOWN:
        for use in listed:
            if use.contexts:
                lines += ["", f"layer {use.layer}, expert {use.expert}: largest mixture weights"]
                lines += [
                    f"  {context.weight:.3f}  {on_one_line(context.marked)}" for context in use.contexts
                ]
    return "\n".join([*lines, "", CAVEAT])


def _first_lift(use: ExpertUse) -> float:
    return max((token.low / use.rate for token in use.tokens), default=0.0)


def _tokens(use: ExpertUse) -> str:
    return (
        ", ".join(
            f"{' '.join(token.token.split())} {token.rate:.0%} of {token.seen}"
            for token in use.tokens[:SHOWN_TOKENS]
        )
        or "–"
    )
