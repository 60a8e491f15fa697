"""What a request asks for: `faithful,honest@0.5`, names and strengths, and nothing else."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from steersman.errors import RequestError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STRENGTH = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
LONGEST = 512
"""Characters of a request's steering at most."""
NONE = "none"
"""What asks for no steering where the server has a default one."""


@dataclass(frozen=True)
class Wanted:
    """One steering of a request, and the strength that multiplies it."""

    name: str
    strength: float = 1.0

    def __str__(self) -> str:
        return self.name if self.strength == 1 else f"{self.name}@{self.strength!r}"


def parse_request(given: object, most: int) -> tuple[Wanted, ...]:
    """Read a request's steering: `name[@strength]`, several with commas between; `none` for none.

    Args:
        given: What the client sent.
        most: Steerings that one request may ask for.

    Raises:
        RequestError: anything else, in one line that says what would be right.
    """
    right = 'right is "name", "name@0.5" or "name,other@0.5"'
    if not isinstance(given, str):
        raise RequestError(f"steering: {_shown(given)} is not a text; {right}")
    if len(given) > LONGEST:
        raise RequestError(f"steering: {len(given)} characters are too many ({LONGEST} at most); {right}")
    if given.strip(" ") == NONE:
        return ()
    parts = [part.strip(" ") for part in given.split(",")]
    if len(parts) > most:
        raise RequestError(f"steering: {len(parts)} steerings are too many for one request ({most} at most)")
    wanted = tuple(_read(part, right) for part in parts)
    names = [one.name for one in wanted]
    for name in names:
        if name == NONE:
            raise RequestError(f'steering: "{NONE}" stands alone; {right}')
        if names.count(name) > 1:
            raise RequestError(f'steering: "{name}" is named twice; give it once, with one strength')
    return wanted


def _read(part: str, right: str) -> Wanted:
    name, at, strength = part.partition("@")
    if not NAME.fullmatch(name):
        raise RequestError(f"steering: {_shown(name)} is not a name of a steering; {right}")
    if not at:
        return Wanted(name)
    if not _STRENGTH.fullmatch(strength) or not math.isfinite(float(strength)):
        raise RequestError(f'steering: {_shown(strength)} is not a strength for "{name}"; {right}')
    return Wanted(name, float(strength) + 0.0)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
