"""The command that writes an evaluation's reports again: report."""

from __future__ import annotations

from pathlib import Path

import click

from steersman.cli.options import json_option
from steersman.cli.output import put_out


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def report(folder: Path, as_json: bool) -> None:
    """Write report.html, report.md and card.md of an evaluation anew, from the evaluation.json in FOLDER.

    \b
    Example:
      steersman report results
    """
    from steersman.errors import ArtifactError
    from steersman.evaluation.evaluation_report import read_evaluation, write_evaluation_report

    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no folder there; give the one that evaluate has written")
    written = write_evaluation_report(folder, read_evaluation(folder))
    result = {"output": str(folder), "files": [path.name for path in written]}
    put_out(result, as_json, lambda: "\n".join(f"written: {path}" for path in written))
