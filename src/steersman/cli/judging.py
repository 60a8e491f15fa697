"""Commands about judges: judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from steersman.cli.options import json_option, seed_option
from steersman.cli.output import in_columns, put_out
from steersman.errors import JudgeError
from steersman.showing import count_of, on_one_line

if TYPE_CHECKING:
    from steersman.evaluation.judging import Judged


@click.command()
@click.argument("records", type=click.Path(path_type=Path))
@click.option("--judge", "judge_name", metavar="JUDGE", help="Judge the answers anew by this judge.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="People's labels (rows with id, label, and arm where there are several): Cohen's kappa.",
)
@click.option("--task", metavar="TASK", help="Which task of several.")
@click.option("--arm", metavar="ARM", help="Only the answers of this arm.")
@seed_option
@json_option
def judge(
    records: Path,
    judge_name: str | None,
    labels: Path | None,
    task: str | None,
    arm: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Judge the answers of an evaluation anew, and compare a judge with people.

    RECORDS is an evaluation's folder or its items.jsonl. Labels are positive, negative or neither.

    \b
    Examples:
      steersman judge results --judge phrases:my-refusals.txt
      steersman judge results --labels people.csv --arm base
    """
    from steersman.evaluation.judges import load_judge
    from steersman.evaluation.judging import judge_records

    if judge_name is None and labels is None:
        raise JudgeError("nothing to judge by: name a --judge, or people's --labels, or both")
    chosen = None if judge_name is None else load_judge(judge_name)
    found = judge_records(records, judge=chosen, labels=labels, task=task, arm=arm, seed=seed)
    put_out(found.to_json(), as_json, lambda: _in_words(found))


def _in_words(found: Judged) -> str:
    sides = ("positive", "negative", "neither", "unjudged")
    rows = [(arm, *(counts[side] for side in sides)) for arm, counts in found.counts().items()]
    lines = [on_one_line(found.task), in_columns(("arm", *sides), rows)]
    compared = found.agreement
    if compared is not None:
        interval = "" if compared.low is None else f" ({compared.low:.2f} to {compared.high:.2f})"
        kappa = "does not exist" if compared.kappa is None else f"{compared.kappa:.2f}{interval}"
        lines.append(
            f"agreement with people: kappa {kappa}, the same side in {compared.share:.0%} of "
            f"{count_of(compared.count, 'answer')}"
        )
        if compared.unjudged:
            lines.append(f"{compared.unjudged} labelled answers have no verdict and are left out")
    return "\n".join(lines)
