"""Commands that share what was saved: push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from steersman.cli.options import force_option, json_option
from steersman.cli.output import put_out
from steersman.errors import ArtifactError


@click.command(short_help="Upload ARTIFACT to the Hub, with a model card.")
@click.argument("artifact")
@click.argument("repository", metavar="REPO")
@click.option(
    "--license", "licence", metavar="ID", help="Under which licence, as the Hub names it: apache-2.0, mit …"
)
@click.option(
    "--base-model",
    metavar="OWNER/NAME",
    help="The model that it is for, as the Hub names it, where that is not known.",
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option(
    "--revision", "--branch", metavar="BRANCH", help="The branch, made where it is not there [default: main]."
)
@click.option("--message", metavar="TEXT", help="What the commit says.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write what would be uploaded here, to be read first, and upload nothing.",
)
@force_option
@json_option
def push(
    artifact: str,
    repository: str,
    licence: str | None,
    base_model: str | None,
    private: bool,
    revision: str | None,
    message: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Upload ARTIFACT to REPO on the Hugging Face Hub, with a model card: what it is, how it was made, what
    evaluations attached to it found, where that ends.

    The token is the one of `hf auth login`, or HF_TOKEN. A README.md that is there already is replaced.

    \b
    Examples:
      steersman push safer you/safer --license apache-2.0 -o look-first
      steersman push safer you/safer --license apache-2.0 --private
    """
    if output is None and force:
        raise click.UsageError("--force goes with -o", click.get_current_context())
    if output is not None and (private or revision or message):
        raise click.UsageError(
            "-o uploads nothing: --private, --revision and --message have no effect",
            click.get_current_context(),
        )
    import steersman
    from steersman.artifacts import read_manifest, save_with_card
    from steersman.evaluation.model_card import CLASSES, base_models

    if output is not None and Path(artifact).exists() and output.resolve() == Path(artifact).resolve():
        raise ArtifactError(f"{output}: this is what the command reads; write to another folder")
    manifest = read_manifest(artifact)
    saved = getattr(steersman, CLASSES[manifest["kind"]]).from_pretrained(artifact)
    result: dict[str, Any] = {
        "repository": repository,
        "kind": manifest["kind"],
        "license": licence,
        "base_model": base_models(manifest, base_model),
        "evaluations": len(manifest["evidence"]),
    }
    if output is not None:
        save_with_card(saved.save_pretrained, output, repository, licence, base_model, force=force)
        result["output"] = str(output)
    else:
        said = {} if message is None else {"commit_message": message}
        result["address"] = saved.push_to_hub(
            repository,
            license=licence,
            base_model=base_model,
            private=private or None,
            revision=revision,
            **said,
        )
    put_out(result, as_json, lambda: _in_words(result))


def _in_words(result: dict[str, Any]) -> str:
    kind = result["kind"].replace("_", " ")
    where = result.get("address") or f"{result['output']}: what would be uploaded to {result['repository']}"
    lines = [f"{where}: {kind}, with its card"]
    if result["kind"] == "steering" and not result["evaluations"]:
        lines.append(
            "The card says that it was not evaluated: `steersman evaluate … --attach` attaches what is found."
        )
    if not result["base_model"]:
        lines.append(
            "The card names no base model: the artifact's is not known by a name on the Hub, nor does the "
            "configuration of a local copy give one. If you know it, name it: --base-model OWNER/NAME"
        )
    return "\n".join(lines)
