"""Writing an evaluation's reports: the page, the Markdown and the steering card, each whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steersman.artifacts.fields import blaming
from steersman.errors import ArtifactError
from steersman.evaluation.evaluation_report.card import card
from steersman.evaluation.evaluation_report.markdown_report import markdown_report
from steersman.evaluation.evaluation_report.page import page
from steersman.evaluation.evaluation_report.place import Place
from steersman.evaluation.evaluation_report.reading import FILE
from steersman.evaluation.evaluation_report.texts import harmless

PAGE, MARKDOWN, CARD = "report.html", "report.md", "card.md"
REPORTS = (PAGE, MARKDOWN, CARD)


def write_evaluation_report(folder: str | Path, result: Mapping[str, Any]) -> list[Path]:
    """Write report.html, report.md and card.md of an evaluation into its folder; returns where they are.

    Args:
        folder: A folder that is there; such files in it are replaced.
        result: The evaluation, as in evaluation.json (see docs/evaluation-json.md).

    Raises:
        ArtifactError: a number or name is not where the schema has it, or the folder cannot be written.
    """
    target = Path(folder)
    place = Place(harmless(dict(result)))
    with blaming(target / FILE):
        contents = {PAGE: page(place), MARKDOWN: markdown_report(place), CARD: card(place)}
    return [_write(target / name, content) for name, content in contents.items()]


def _write(path: Path, content: str) -> Path:
    draft = path.with_name(f".{path.name}.new")
    try:
        draft.write_text(content, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        draft.unlink(missing_ok=True)
    return path
