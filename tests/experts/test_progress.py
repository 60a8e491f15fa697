"""Saved progress: whatever stops a detection, going on gives what one run gives; others' is refused."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import families as f
from contrasts import assert_same
from experts.test_counting import example, made_pairs, tokenizer
from steersman import ArtifactError, ContrastPairs, RoutingContrast, detect_experts, progress
from steersman.progress import MANIFEST, discard, refuse_unwanted, units_done

PAIRS = ContrastPairs(made_pairs(40, seed=1, longest=8)[0], name="many")
OTHERS = ContrastPairs(made_pairs(12, seed=8, longest=8)[0], name="others")
OPTIONS: dict[str, Any] = {"batch_size": 1, "stratify": "position", "bootstrap": 3, "adjust": OTHERS}
# Windows of 8 pairs: 5 of the one, 2 of the other.


class Stop(BaseException):
    """Stands for whatever ends a process."""


def stopped_after(model: nn.Module, forwards: int, folder: Path, **options: Any) -> None:
    """A detection that ends in the middle of a forward."""
    calls = itertools.count(1)

    def stop(*_: object) -> None:
        if next(calls) > forwards:
            raise Stop

    handle = model.get_decoder().layers[1].register_forward_pre_hook(stop)
    try:
        with pytest.raises(Stop):
            detect_experts(model, tokenizer(), PAIRS, checkpoint=folder, **{**OPTIONS, **options})
    finally:
        handle.remove()


@pytest.fixture(autouse=True)
def saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each window, whatever saving costs."""
    monkeypatch.setattr(progress, "SHARE", float("inf"))


def resumed(model: nn.Module, folder: Path, **options: Any) -> RoutingContrast:
    return detect_experts(model, tokenizer(), PAIRS, checkpoint=folder, resume=True, **{**OPTIONS, **options})


def named(settings: str) -> str:
    """Settings by their names, each with both its values."""
    both = r" \([^()]+ there, [^()]+ here\)"
    return ", ".join(rf"{name}(\.\w+)?{both}(, {name}\.\w+{both})*" for name in settings.split(", "))


@pytest.mark.parametrize("weighting", ["token", "pair"])
def test_stops_at_any_place_change_nothing(weighting: Any, tmp_path: Path) -> None:
    model = example("olmoe")[0]
    how: dict[str, Any] = {"weighting": weighting}
    if weighting == "pair":
        how["stratify"] = None
    whole = detect_experts(model, tokenizer(), PAIRS, **{**OPTIONS, **how})
    folder = tmp_path / "c.partial"
    places = []
    for forwards in (3, 20, 0, 17, 50, 1):
        stopped_after(model, forwards, folder, **how, resume=True)
        places.append(units_done(folder))
    assert places == [0, 8, 8, 16, 40, 40]
    found = resumed(model, folder, **how)
    assert_same(found, whole)
    assert_same(resumed(model, folder, **how), whole)  # all of it is saved: nothing is left to count
    assert units_done(folder) == 52


def test_a_stop_while_saving_leaves_the_state_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, few = example("olmoe")[0], ContrastPairs(PAIRS[:12], name="few")
    options = {**OPTIONS, "adjust": None}
    whole = detect_experts(model, tokenizer(), few, **options)
    names = [(progress, "_write_synced"), (Path, "replace"), (Path, "unlink"), (progress.os, "fsync")]
    for number, (owner, name) in itertools.product(range(1, 4), names):
        folder = tmp_path / f"{name}-{number}.partial"
        calls = itertools.count(1)
        with monkeypatch.context() as patched:
            original = getattr(owner, name)

            def stop(*given: Any, original: Any = original, calls: Any = calls, number: int = number) -> Any:
                if next(calls) == number:
                    raise Stop
                return original(*given)

            patched.setattr(owner, name, stop)
            try:
                detect_experts(model, tokenizer(), few, checkpoint=folder, **options)
            except Stop:
                pass
            else:
                assert number > 1  # there were fewer such calls
        found = detect_experts(model, tokenizer(), few, checkpoint=folder, resume=True, **options)
        assert_same(found, whole)
        assert len(list(folder.iterdir())) == 2


def test_saving_takes_its_share_of_the_time_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = example("olmoe")[0]
    monkeypatch.setattr(progress, "SHARE", 1e-9)
    writes = []
    original = progress.Progress._write
    monkeypatch.setattr(
        progress.Progress, "_write", lambda self, tallies: (writes.append(1), original(self, tallies))
    )
    detect_experts(model, tokenizer(), PAIRS, checkpoint=tmp_path / "p", **OPTIONS)
    assert len(writes) == 2  # after the first window, and at the end


def test_progress_that_nobody_asked_for_is_an_error(tmp_path: Path) -> None:
    model = example("olmoe")[0]
    folder = tmp_path / "c.partial"
    stopped_after(model, 20, folder)
    with pytest.raises(ArtifactError) as raised:
        detect_experts(model, tokenizer(), PAIRS, checkpoint=folder, **OPTIONS)
    for word in (str(folder), "--resume", "resume=True", "--force"):
        assert word in str(raised.value)
    discard(folder)
    assert not folder.exists()
    discard(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 2}, "batch size"),
        ({"bootstrap": 4}, "bootstrap"),
        ({"stratify": None}, "stratify"),
        ({"shard": "1/2"}, "shard, tokenization"),
        ({"truncate": True}, "truncate"),
        ({"tokens": "prompt"}, "tokenization, tokens"),
        ({"generate": 2}, "generate, tokenization, tokens"),
        ({"adjust": None}, "pairs, tokenization"),
        ({"stratify": None, "weighting": "pair"}, "stratify, weighting"),
    ],
)
def test_progress_of_other_options_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    model = example("olmoe")[0]
    folder = tmp_path / "c.partial"
    stopped_after(model, 20, folder)
    with pytest.raises(ArtifactError, match=f"another run, which differs in {named(words)};") as raised:
        resumed(model, folder, **change)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_progress_of_other_inputs_is_refused(tmp_path: Path) -> None:
    model = example("olmoe")[0]
    folder = tmp_path / "c.partial"
    stopped_after(model, 20, folder)
    with pytest.raises(ArtifactError, match="differs in weights"):
        resumed(f.tiny("olmoe", seed=1), folder)
    with pytest.raises(ArtifactError, match=f"differs in {named('pairs, tokenization')}"):
        detect_experts(model, tokenizer(), OTHERS, checkpoint=folder, resume=True, **OPTIONS)
    changed = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer)
    changed.chat_template = "{% for m in messages %} w1 {{ m['content'] }} {% endfor %}"
    with pytest.raises(ArtifactError, match=r"differs in the chat template .* give --chat-template FILE"):
        detect_experts(model, changed, PAIRS, checkpoint=folder, resume=True, **OPTIONS)


@pytest.mark.parametrize("damage", ["cut", "tensors", "json", "key", "hash", "missing", "newer", "path"])
def test_damaged_progress_is_refused(tmp_path: Path, damage: str) -> None:
    model = example("olmoe")[0]
    folder = tmp_path / "c.partial"
    stopped_after(model, 20, folder)
    manifest = folder / MANIFEST
    tensors = next(folder.glob("*.safetensors"))
    content = json.loads(manifest.read_text())
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-8])
    elif damage == "tensors":
        tensors.write_bytes(tensors.read_bytes()[:-8] + b"\1" * 8)
    elif damage == "missing":
        tensors.unlink()
    elif damage == "json":
        manifest.write_text("[" * 5000)
    else:
        changes = {
            "key": ("more", 1),
            "hash": ("states", {}),
            "newer": ("format_version", 3),
            "path": ("tensors", "../x"),
        }
        content[changes[damage][0]] = changes[damage][1]
        manifest.write_text(json.dumps(content))
    with pytest.raises(ArtifactError) as raised:
        resumed(model, folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    assert "--force" in str(raised.value)


def test_others_files_are_left_alone(tmp_path: Path) -> None:
    model = example("olmoe")[0]
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds other files"):
        resumed(model, folder)
    with pytest.raises(ArtifactError, match="holds other files"):
        discard(folder)
    assert (folder / "thesis.txt").read_text() == "mine"
    with pytest.raises(ArtifactError, match="is not a folder"):
        resumed(model, folder / "thesis.txt")


def test_the_same_run_saves_the_same_progress(tmp_path: Path) -> None:
    """What the same inputs give depends on nothing but what is compared."""
    model = example("olmoe")[0]
    first, second = (
        detect_experts(model, tokenizer(), PAIRS, checkpoint=tmp_path / name, **OPTIONS) for name in "ab"
    )
    assert_same(first, second)
    a, b = (json.loads((tmp_path / name / MANIFEST).read_text()) for name in "ab")
    assert a["run"] == b["run"]
    assert a["tensors_sha256"] == b["tensors_sha256"]
    assert np.isfinite(first.adjusted[first.valid]).all()


def test_a_pipe_in_place_of_progress_is_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "k.partial"
    folder.mkdir()
    os.mkfifo(folder / "manifest.json")
    assert units_done(folder) == 0
    with pytest.raises(ArtifactError, match=r"manifest\.json is not a file"):
        refuse_unwanted(folder)
