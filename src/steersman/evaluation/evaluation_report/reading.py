"""Reading evaluation.json: what is damaged, foreign or newer is refused with one line that says where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from steersman.artifacts.fields import one_line
from steersman.artifacts.manifest import parse
from steersman.errors import ArtifactError

FORMAT, FORMAT_VERSION = "steersman-evaluation", 1
FILE = "evaluation.json"
SCHEMA = "evaluation.schema.json"


def read_evaluation(source: str | Path) -> dict[str, Any]:
    """An evaluation from its folder or its file.

    Raises ArtifactError for what is missing, no JSON, of another format, newer, or not of the schema.
    """
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ArtifactError(f"{path}: missing; an evaluation's folder holds {FILE}")
    result = parse(path)
    check_evaluation(result, str(path))
    return result


def check_evaluation(result: Mapping[str, Any], name: str = FILE) -> None:
    """Raise ArtifactError where data is no evaluation of this version; `name` is what the error blames."""
    if result.get("format") != FORMAT:
        raise ArtifactError(f'{name}: not an evaluation ("format" is not "{FORMAT}")')
    version = result.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtifactError(
            f"{name}: format version {version} is newer than this tool reads ({FORMAT_VERSION}): "
            "upgrade steersman"
        )
    try:
        found = best_match(_validator().iter_errors(dict(result)))
    except RecursionError:
        raise ArtifactError(f"{name}: nested too deep to be an evaluation") from None
    if found is not None:
        place = found.json_path.removeprefix("$").removeprefix(".")
        raise ArtifactError(f"{name}: {place + ': ' if place else ''}{one_line(found.message)}")


def evaluation_schema() -> dict[str, Any]:
    """The JSON schema of evaluation.json."""
    text = files("steersman.evaluation.evaluation_report").joinpath(SCHEMA).read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(evaluation_schema())
