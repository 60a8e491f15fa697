"""Expert profiles on disk: what each expert is used for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steersman.artifacts.content import read_artifact, write_artifact
from steersman.artifacts.fields import blaming, exact_keys, mapping, nothing_left, strings, take, whole
from steersman.artifacts.kinds import register
from steersman.artifacts.manifest import manifest_of, read_model
from steersman.errors import ArtifactError
from steersman.experts.plausibility import check_profile
from steersman.experts.profile import ExpertProfile

_KEYS = {"tokens", "texts", "words", "snippets"}
PROFILE = register("expert_profile", "an expert profile", {1: _KEYS, 2: _KEYS}, chats=2)


def save_profile(profile: ExpertProfile, folder: str | Path, *, force: bool = False) -> None:
    """Write what experts are for. Raises `ArtifactError` as `save_steering` does."""
    manifest = {
        **manifest_of(PROFILE, profile, {"from": [dict(source) for source in profile.made_from]}),
        "tokens": profile.tokens,
        "texts": profile.texts,
        "words": list(profile.words),
        "snippets": [list(snippet) for snippet in profile.snippets],
    }
    write_artifact(folder, manifest, {name: getattr(profile, name) for name in _PROFILE_TENSORS}, force)


_PROFILE_TENSORS: dict[str, tuple[type[Any], int]] = {
    "uses": (np.int64, 2),
    "token_places": (np.int64, 3),
    "token_uses": (np.int64, 3),
    "word_seen": (np.int64, 1),
    "context_places": (np.int64, 3),
    "context_weights": (np.float64, 3),
}


def load_profile(source: str | Path, *, revision: str | None = None) -> ExpertProfile:
    """Read what experts are for from a folder or the Hub.

    Raises `ArtifactError` for anything damaged, foreign or newer.
    """
    path, manifest, tensors = read_artifact(source, PROFILE, revision)
    with blaming(path):
        arrays: dict[str, Any] = {name: take(tensors, name, *form) for name, form in _PROFILE_TENSORS.items()}
        nothing_left(tensors)
        made_from = mapping(manifest["made_from"], "made_from")
        exact_keys(made_from, {"from"}, "made_from")
        snippets = manifest["snippets"]
        if not isinstance(snippets, list) or not all(len(strings(s, "a snippet")) == 3 for s in snippets):
            raise ArtifactError("snippets is not a list of [before, token, after]")
        profile = ExpertProfile(
            **arrays,
            tokens=whole(manifest["tokens"], "tokens"),
            texts=whole(manifest["texts"], "texts"),
            words=tuple(strings(manifest["words"], "words")),
            snippets=tuple((before, token, after) for before, token, after in snippets),
            **read_model(manifest, PROFILE, manifest["format_version"]),
            made_from=tuple(mapping(entry, "made_from.from") for entry in made_from["from"]),
        )
        check_profile(profile)
        return profile
