"""Artifacts on the Hub: had from it, and uploaded to it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steersman.artifacts.fields import one_line
from steersman.artifacts.folder import MANIFEST, TENSORS
from steersman.errors import ArtifactError


def resolve(source: str | Path, revision: str | None) -> Path:
    """The local folder of an artifact: given, or downloaded from the Hub (only the two files)."""
    folder = Path(source)
    name = str(source)
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


def push_folder(save: Callable[[Path], None], repo_id: str, **options: Any) -> str:
    """Save an artifact into a temporary folder and upload it to the Hub; returns the commit's address."""
    from huggingface_hub import HfApi

    token, private = options.pop("token", None), options.pop("private", None)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "artifact"
        save(folder)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
        except Exception as error:
            # Whatever the Hub's client and the library below it raise for names, tokens and networks.
            library = type(error).__module__.partition(".")[0]
            if isinstance(error, OSError) or library.startswith(("huggingface_hub", "httpx")):
                raise ArtifactError(f"{repo_id}: cannot be uploaded to the Hub ({one_line(error)})") from None
            raise
