"""Emotions: whether a model names the emotion of a scenario, as ConTrans measures it.

arXiv 2405.13578. A folder with a JSON list of scenarios for each emotion (anger.json …); the
file's name is the word.
"""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from steersman.errors import PairsError
from steersman.evaluation.judges import Unjudged
from steersman.evaluation.measures import Naming
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.pairs import parse_json, read_text

RIGHT = "right is a folder with a JSON list of scenarios for each emotion (anger.json, fear.json …)"


@task_form("emotions", "scenarios of emotions: the word named (token accuracy), the likeliest word (logit)")
def emotions(place: str, *, limit: int | None) -> Task:
    """FOLDER, or FOLDER#EMOTION for the scenarios of one; the emotions take turns."""
    folder, _, only = place.partition("#")
    files = sorted(Path(folder).glob("*.json")) if Path(folder).is_dir() else []
    if len(files) < 2:
        raise PairsError(f"{folder}: {len(files)} emotions in it; {RIGHT}")
    words = tuple(file.stem for file in files)
    if only and only not in words:
        raise PairsError(f"{place}: no scenarios of {only!r}; there are {', '.join(words)}")
    each = [_items(file, words) for file in files if only in ("", file.stem)]
    items = [item for item in chain.from_iterable(zip_longest(*each)) if item is not None]
    behaviour = Behaviour(
        "Naming emotions", "names the emotion that a scenario calls up", "", "", Unjudged(), Naming()
    )
    return Task(f"emotions:{place}", items[:limit], behaviour)


def _items(file: Path, words: tuple[str, ...]) -> list[Item]:
    word = file.stem
    return [
        Item(
            id=f"{word}-{number}",
            group=f"{word}-{number}",
            content=f"Scenario: {scenario}\nWhat one feels in this scenario is",
            positive=word,
            negative=None,
            kind=word,
            options=words,
            correct=(words.index(word),),
        )
        for number, scenario in enumerate(_scenarios(file), 1)
    ]


def _scenarios(file: Path) -> list[str]:
    try:
        found: Any = parse_json(read_text(file))
    except ValueError as error:
        if isinstance(error, PairsError):
            raise
        raise PairsError(f"{file}: not JSON ({str(error).splitlines()[0]}); {RIGHT}") from None
    if not isinstance(found, list) or not found:
        raise PairsError(f"{file}: no list of scenarios; {RIGHT}")
    for number, scenario in enumerate(found, 1):
        if not isinstance(scenario, str) or not scenario.strip():
            raise PairsError(f"{file}: item {number} is {scenario!r:.40}; right is a scenario in words")
    return found
