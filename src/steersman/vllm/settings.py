"""What the operator configures: vLLM's `additional_config["steersman"]`, checked before all else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from steersman.errors import ServingError
from steersman.vllm.request import NAME, NONE, parse_request

KEY = "steersman"
"""The key in vLLM's `additional_config`, in a request's `extra_args`, and of the receipt in a response."""

Sites = Literal["plans", "all"]
Match = Literal["weights", "architecture"]


@dataclass(frozen=True)
class Settings:
    """How an engine is steered.

    Attributes:
        steerings: {name: folder} of the plans that are there from the start.
        default: What a request gets that asks for nothing, as it would ask for it.
        aliases: {served model name: steering}: what a request for that model gets.
        strengths: (least, most) that a request may multiply a steering by.
        sites: `plans` installs edits where the first plans have them, and nowhere else: other layers cost
            nothing, and a plan that is added later may name no other. `all` installs them everywhere.
        max_steerings: Plans that fit in at a time, those that are still in use after a replacement included.
        max_vectors: Vectors that fit in at a time; 0: twice those of the first plans, and 512 at least.
        max_per_request: Steerings that one request may ask for.
        match: `weights` takes only plans that were made for the served weights, `architecture` also those
            made for others of its structure.
        count: Texts whose experts can be counted at a time (detection); 0: no counting.
    """

    steerings: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    strengths: tuple[float, float] = (-2.0, 2.0)
    sites: Sites = "plans"
    max_steerings: int = 64
    max_vectors: int = 0
    max_per_request: int = 4
    match: Match = "weights"
    count: int = 0

    @property
    def active(self) -> bool:
        """Whether there is anything to install."""
        return bool(self.steerings) or self.sites == "all" or self.count > 0


def read_settings(additional_config: object) -> Settings | None:
    """The settings in vLLM's additional configuration; None where there are none.

    Raises:
        ServingError: a key or value is wrong.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise _wrong(KEY, given, 'an object such as {"steerings": {"name": "folder"}}')
    known = {one.name for one in fields(Settings)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ServingError(f"{KEY}: {unknown[0]!r} is not a setting; there are {', '.join(sorted(known))}")
    values: dict[str, Any] = dict(given)
    _check_names(values.get("steerings", {}), "steerings", "{name: folder}")
    _check_texts(values.get("aliases", {}), "aliases", "{served model name: steering}")
    for name in ("max_steerings", "max_per_request"):
        _check_whole(values.get(name, 1), name, least=1)
    for name in ("max_vectors", "count"):
        _check_whole(values.get(name, 0), name, least=0)
    for name, words in (("sites", get_args(Sites)), ("match", get_args(Match))):
        if values.get(name, words[0]) not in words:
            raise _wrong(name, values[name], " or ".join(map(repr, words)))
    if "strengths" in values:
        values["strengths"] = _bounds(values["strengths"])
    settings = Settings(**values)
    if len(settings.steerings) > settings.max_steerings:
        raise ServingError(
            f"{len(settings.steerings)} steerings do not fit: max_steerings is {settings.max_steerings}"
        )
    for where, steering in (("default", settings.default), *settings.aliases.items()):
        _check_default(where, steering, settings)
    return settings


def _check_default(where: str, steering: object, settings: Settings) -> None:
    if steering is None:
        return
    for wanted in parse_request(steering, settings.max_per_request):
        if wanted.name not in settings.steerings:
            known = ", ".join(settings.steerings) or "none"
            raise ServingError(f"{where}: there is no steering {wanted.name!r} (there are: {known})")


def _check_names(given: object, setting: str, right: str) -> None:
    _check_texts(given, setting, right)
    for name in given:  # type: ignore[attr-defined]
        check_name(name)


def check_name(name: object) -> str:
    """A name that a steering may have. Raises `ServingError`."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or name == NONE:
        raise ServingError(
            f"{name!r} cannot be the name of a steering: right are letters, digits, '.', '_' and '-', 64 at "
            f"most, the first a letter or digit, and not {NONE!r}"
        )
    return name


def _check_texts(given: object, setting: str, right: str) -> None:
    if not isinstance(given, Mapping) or not all(
        isinstance(text, str) and text for pair in given.items() for text in pair
    ):
        raise _wrong(setting, given, right)


def _check_whole(given: object, setting: str, least: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise _wrong(setting, given, f"a whole number, {least} or more")


def _bounds(given: object) -> tuple[float, float]:
    right = "[least, most], two finite numbers in order"
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise _wrong("strengths", given, right)
    for one in given:
        if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
            raise _wrong("strengths", given, right)
    if given[0] > given[1]:
        raise _wrong("strengths", given, right)
    return float(given[0]), float(given[1])


def _wrong(setting: str, given: object, right: str) -> ServingError:
    return ServingError(f"{KEY}: {setting} is {given!r}; right is {right}")
