"""Artifacts on the Hub: had from it, and uploaded to it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steersman.artifacts.fields import one_line
from steersman.artifacts.folder import MANIFEST, TENSORS, new_folder
from steersman.errors import ArtifactError, valid_name

CARD = "README.md"
"""What the Hub shows of a repository."""
_REPOSITORY = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
"""As `huggingface_hub.utils.validate_repo_id` wants it, with an owner."""
_YAML_WORDS = {"yes", "no", "y", "n", "on", "off", "true", "false", "null", "nan", "inf", "none"}


def resolve(source: str | Path, revision: str | None) -> Path:
    """The local folder of an artifact: given, or downloaded from the Hub (only the two files)."""
    name = valid_name(source, ArtifactError)
    folder = Path(name)
    try:
        here = folder.exists()
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise ArtifactError(f"{name}: cannot be a folder ({getattr(error, 'strerror', error)})") from None
    if here or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[MANIFEST, TENSORS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        raise ArtifactError(
            f"{name}: neither a folder here nor an artifact that can be had from the Hub"
        ) from None


def is_repository(name: str) -> bool:
    """Whether a repository of the Hub can have this name: owner/name."""
    return _REPOSITORY.fullmatch(name) is not None


def push_folder(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> str:
    """Upload an artifact to the Hub, with a model card; returns the commit's address.

    Args:
        save: Writes the artifact into a folder.
        repo_id: `owner/name`; made where it does not exist.
        license: Under which it is shared, as the Hub names it: "apache-2.0", "cc-by-4.0", "other".
        base_model: `owner/name` of the model that it is for, where the artifact does not say.
        private: Whether a repository that is made is private.
        revision: A branch, made where it does not exist (default: main).
        token: As the Hub's client takes it (default: the one that is logged in).
        options: Of `huggingface_hub.HfApi.upload_folder`, such as `commit_message`.

    Raises:
        ArtifactError: no licence is said, or the Hub cannot be had or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "artifact"
        save_with_card(save, folder, repo_id, license, base_model)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, **options))
        except Exception as error:
            # Whatever the Hub's client and the library below it raise for names, tokens and networks.
            library = type(error).__module__.partition(".")[0]
            if isinstance(error, OSError) or library.startswith(("huggingface_hub", "httpx")):
                raise ArtifactError(f"{repo_id}: cannot be uploaded to the Hub ({one_line(error)})") from None
            raise


def save_with_card(
    save: Callable[[Path], None],
    folder: Path,
    repo_id: str,
    license: str | None,
    base_model: str | None = None,
    *,
    force: bool = False,
) -> None:
    """Write what is uploaded: an artifact's two files and its model card. Raises ArtifactError."""
    if not isinstance(repo_id, str) or not is_repository(repo_id):
        raise ArtifactError(f"{repo_id!r} is no repository's name; right is OWNER/NAME, such as you/safer")
    if license is None:
        raise ArtifactError(
            f'{repo_id}: under which licence is it shared? Say license="apache-2.0" or another that the Hub '
            "knows (--license); what it was made from may decide it"
        )
    if license in _YAML_WORDS or not re.fullmatch(r"[a-z][a-z0-9]*([.-][a-z0-9]+)*(\+\+)?", license):
        raise ArtifactError(
            f'{repo_id}: the licence {license!r} is no name of the Hub\'s; right are "apache-2.0", "mit", '
            '"cc-by-4.0", "other" …'
        )
    # The card's words are the reports': they know what evidence says.
    from steersman.evaluation.model_card import model_card

    with new_folder(folder, force=force, ours={MANIFEST, TENSORS, CARD}) as place:
        save(place)
        (place / CARD).write_text(model_card(place, repo_id, license, base_model), encoding="utf-8")
