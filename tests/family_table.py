"""The table of families in the docs, made from what the library says of a tiny model of each type.

`python tests/family_table.py` writes it.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

import every_family as e
from steersman.models.architecture import RouterSite, find_routers
from steersman.models.families import family_of

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
HEADER = ("model type", "router", "rule", "bias", "groups", "shared", "steered", "since")
OLDER_ROUTERS = {"JambaSparseMoeBlock": "JambaTopKRouter"}
"""Before transformers 5.21: the module whose forward chooses, and what is now."""


def row(model_type: str) -> tuple[str, ...]:
    """The cells of a type, in the installed transformers."""
    model = e.shared(model_type)
    sites = find_routers(model)
    site = next((site for site in sites if site.facts.steerable), sites[0])
    facts, family = site.facts, family_of(site.module)
    assert family is not None
    scoring = re.sub(r"\+(bias|groups-\w+)", "", facts.rule)
    name = type(site.module).__name__
    return (
        f"`{model_type}`",
        f"`{OLDER_ROUTERS.get(name, name)}`",
        scoring.replace("+", ", "),
        "yes" if site.correction_bias is not None else "–",
        {"top2": "by their two best", "max": "by their best"}[family.group_score or ""]
        if facts.groups
        else "–",
        "yes" if facts.shared_experts else "–",
        steered(model, sites),
        e.SINCE.get(model_type, ""),
    )


def steered(model: nn.Module, sites: list[RouterSite]) -> str:
    """Whether a type's routers are steered, and which are not and why."""
    names = {
        module: name.rpartition(".layers.")[2].partition(".")[2] for name, module in model.named_modules()
    }
    refused = {f"{names[site.module]}: {site.facts.reason}" for site in sites if not site.facts.steerable}
    if all(not site.facts.steerable for site in sites):
        return f"refused: {sites[0].facts.reason}"
    return "; ".join(["yes", *(f"not `{text.replace(': ', '`: ', 1)}" for text in sorted(refused))])


def written() -> dict[str, str]:
    """The rows of the page, by model type."""
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = table.strip().splitlines()[2:]
    return {line.split("`")[1]: line for line in lines}


def as_line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def table() -> str:
    """The whole table, for every type."""
    lines = [as_line(HEADER), f"|{' --- |' * len(HEADER)}", *(as_line(row(name)) for name in e.MODEL_TYPES)]
    return "\n".join(lines)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
