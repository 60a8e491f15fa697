"""EasySteer's vectors (github.com/ZJU-REAL/EasySteer, `StatisticalControlVector.export_gguf`): GGUF, read.

A control vector file (see `gguf`) with keys that say how the vectors were made. EasySteer's engine reads the
tensors alone: direction.N is added, times the request's `scale`, to the hidden state that decoder layer N,
from 0, gives on (`algorithm="direct"`), so N is our layer and there is a direction.0. The request, not the
file, says which layers and tokens, and whether vectors are projected out instead (`erase`). So of the keys

- `method` must be one that makes vectors to add;
- `normalize` says that every vector was scaled to length 1, which is checked: a file that says so and has
  others would need a strength that it does not name;
- `token_pos` is where in a *sample* the states were read (-1, mean …), not which tokens are steered;
- the numbers of samples, settings of the fit, and its scores by layer change nothing;

all but the scores are kept in the steering's provenance. The model hint is free text there ("unknown") and
not checked. Any other key is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steersman.errors import ArtifactError
from steersman.interop.gguf import ARCHITECTURE, METHOD, ControlVector, parse_gguf

_PREFIX = f"{ARCHITECTURE}."
_METHODS = {
    *("diffmean", "lat", "linear_probe", "sae", "Average"),
    *("pca", "pca_standard", "pca_center", "pca_diff", "standard", "center", "diff"),
}
_HOW_MADE = {
    *("method", "normalize", "token_pos", "n_positive", "n_negative", "n_samples", "n_components"),
    *("correct_direction", "use_positive_only", "regularization", "C", "standardize"),
    *("num_vectors_averaged", "composition"),
}
_BY_LAYER = ("explained_variance.", "classification_scores.")


def parse_vectors(content: bytes, path: Path) -> ControlVector:
    """The vectors of an EasySteer file, and what it says of how they were made.

    Raises:
        ArtifactError: it is damaged, foreign, or says what a steering that adds vectors cannot say.
    """
    found = parse_gguf(content, path, _knows)
    said = {key.removeprefix(_PREFIX): value for key, value in found.said.items() if not _is_by_layer(key)}
    _check(said, found.directions, path)
    return ControlVector(found.model_hint, found.directions, said)


def _knows(key: str) -> bool:
    return key.removeprefix(_PREFIX) in _HOW_MADE or _is_by_layer(key)


def _is_by_layer(key: str) -> bool:
    return key.removeprefix(_PREFIX).startswith(_BY_LAYER)


def _check(said: Mapping[str, Any], directions: Mapping[int, Any], path: Path) -> None:
    for key, value in said.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ArtifactError(f"{path}: {_PREFIX}{key} is {value}, which is no number")
    method = said.get("method")
    if method is None:
        raise ArtifactError(
            f"{path}: has no {METHOD}, as EasySteer writes it; a plain control vector is of --format gguf"
        )
    if method not in _METHODS:
        raise ArtifactError(
            f"{path}: {METHOD} is {str(method)[:40]!r}: of EasySteer's methods {', '.join(sorted(_METHODS))} "
            "make vectors to add"
        )
    normalize = said.get("normalize", 0)
    if normalize not in (0, 1):
        raise ArtifactError(f"{path}: {_PREFIX}normalize is {str(normalize)[:40]!r} and neither 0 nor 1")
    for layer, vector in directions.items():
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if normalize and length and not math.isclose(length, 1, rel_tol=1e-3):
            raise ArtifactError(
                f"{path}: {_PREFIX}normalize says that vectors have length 1, and direction.{layer} has "
                f"{length:g}"
            )
