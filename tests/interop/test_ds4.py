"""ds4's map of DeepSeek V4 Flash: what is in it, byte by byte, and what is refused."""

from __future__ import annotations

import array
import sys
from pathlib import Path
from typing import Any

import pytest

from steersman import Steering, export_ds4
from steersman.errors import ArtifactError
from steersman.limits import Router
from steersman.steering import Architecture, ExpertEdit

HASHED = "layers 0 to 2 choose by a hash of the token"


def made(
    strengths: dict[int, dict[int, float]],
    *,
    model_type: str = "deepseek_v4",
    layers: int = 43,
    experts: int = 256,
    top_k: int = 6,
    **options: Any,
) -> Steering:
    routers = tuple(
        Router(
            layer, experts, top_k, "sqrtsoftplus-topk+renormalised+bias", reason=HASHED if layer < 3 else None
        )
        for layer in range(layers)
    )
    return Steering((ExpertEdit(strengths, **options),), Architecture(model_type, 4096, routers), "0" * 64)


def test_every_place_of_the_map(tmp_path: Path) -> None:
    path = tmp_path / "map.f32"
    strengths = {3: {0: 1.0, 255: -1.0}, 20: {17: -1.0, 18: 0.0}, 42: {255: 1.0}}
    export_ds4(made(strengths), path)
    assert path.stat().st_size == 43 * 256 * 4
    values = array.array("f", path.read_bytes())
    if sys.byteorder == "big":
        values.byteswap()
    read = {(place // 256, place % 256): value for place, value in enumerate(values.tolist()) if value != 0}
    assert read == {(3, 0): 1.0, (3, 255): -1.0, (20, 17): -1.0, (42, 255): 1.0}
    assert path.read_bytes()[3 * 256 * 4 :][:4] == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        (lambda: made({3: {5: 0.5}}), r"expert 5 of layer 3 has the strength 0\.5"),
        (
            lambda: made({3: {5: 1.0}}, scope="generated"),
            r"has no scopes: the steering's is 'generated'.*\(export --scope all\)",
        ),
        (lambda: made({3: {5: 1.0}}, layers=61), "this steering is for deepseek_v4 with 61 layers"),
        (lambda: made({3: {5: 1.0}}, experts=384), "384 experts, 6 a token"),
        (lambda: made({3: {5: 1.0}}, top_k=4), "256 experts, 4 a token"),
        (lambda: made({3: {5: 1.0}}, model_type="deepseek_v3"), "this steering is for deepseek_v3"),
    ],
)
def test_what_it_cannot_say(steering: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        export_ds4(steering(), tmp_path / "map.f32")
    assert not list(tmp_path.iterdir())


def test_files_are_whole_and_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "map.f32"
    path.write_text("mine")
    with pytest.raises(ArtifactError, match="already there"):
        export_ds4(made({3: {5: 1.0}}), path)
    assert path.read_text() == "mine"
    export_ds4(made({3: {5: 1.0}}), path, force=True)
    assert path.stat().st_size == 44032
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ArtifactError, match="cannot be written"):
        export_ds4(made({3: {5: 1.0}}), path / "below", force=True)
    with pytest.raises(ArtifactError, match="is a folder"):
        export_ds4(made({3: {5: 1.0}}), tmp_path, force=True)
