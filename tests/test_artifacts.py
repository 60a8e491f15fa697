"""Artifacts: round trips, atomic writing, readers that reject whatever was changed with one clear line."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

import contrasts
import steersman.artifacts
from hub_server import LocalHub, client_at_local_hub
from steersman import (
    AffineMap,
    ArtifactError,
    CausalScreen,
    ConceptVector,
    ExpertEdit,
    ExpertProfile,
    Router,
    RoutingContrast,
    Steering,
    compose,
)
from steersman.chat_record import ChatRecord
from steersman.steering import canonical_json, sha256_of

MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"
KINDS = ("steering", "contrast", "contrast by pair", "contrast with everything")
DATA = Path(__file__).parent / "data"
CHAT = ChatRecord("ab" * 32, {"enable_thinking": False}, "2026-11-29")


EVIDENCE = {
    "kind": "evaluation",
    "sha256": "ef" * 32,
    "created": "2026-11-22T10:00:00+00:00",
    "steersman": "0.1.0",
    "tasks": [
        {
            "task": "lab:refusal/test",
            "sha256": "01" * 32,
            "role": "effect",
            "items": 300,
            "metric": "refused",
            "kind": "rate",
            "arm": "safer",
            "arm_kind": "steered",
            "strength": 1.0,
            "difference": 0.43,
            "low": 0.38,
            "high": 0.48,
            "p": 1e-9,
            "p_holm": None,
            "random_p": 0.005,
        }
    ],
}


def rich_steering() -> Steering:
    """Several edits, soft strengths, every scope, opposite pulls added up, provenance and evidence."""
    edits = (
        ExpertEdit({1: {0: 1.0, 5: -0.3}, 4: {2: 0.1 + 0.2}}, "all"),
        ExpertEdit({1: {0: -0.25}, 2: {7: -1.0}}, "answer"),
        ExpertEdit({4: {0: 5e-324, 1: -1 + 2**-53}}, "prompt"),
        ExpertEdit({2: {1: 0.0}}, "generated"),
    )
    return Steering(
        edits=edits,
        architecture=contrasts.architecture(),
        weights_id="w" * 64,
        model="Wörter/模型",
        revision="abc123",
        on_conflict="sum",
        provenance={"made": "selection", "skipped": [{"layer": 1, "expert": 2, "reason": "a\nb\u2028c"}]},
        evidence=("ab" * 32, "cd" * 32, EVIDENCE),
    )


@functools.cache
def artifact(kind: str) -> Steering | RoutingContrast:
    if kind == "steering":
        return rich_steering()
    return contrasts.made(
        seed=3, weighting="pair" if kind.endswith("pair") else "token", everything=kind.endswith("everything")
    )


def reader(kind: str) -> Callable[[Path], Steering | RoutingContrast]:
    return Steering.from_pretrained if kind == "steering" else RoutingContrast.from_pretrained


def assert_equal(one: Steering | RoutingContrast, other: Steering | RoutingContrast) -> None:
    if isinstance(one, Steering):
        assert isinstance(other, Steering)
        assert one == other
        assert one.fingerprint == other.fingerprint
    else:
        assert isinstance(other, RoutingContrast)
        contrasts.assert_same(one, other)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, kind: str) -> Path:
    """A saved artifact of a kind."""
    artifact(kind).save_pretrained(tmp_path / "artifact")
    return tmp_path / "artifact"


def refused(read: Callable[[Path], object], folder: Path, *words: str) -> str:
    """The one line with which a folder is refused; it names the folder or one of its files."""
    with pytest.raises(ArtifactError) as raised:
        read(folder)
    line = str(raised.value)
    assert "\n" not in line
    assert str(folder) in line
    assert len(line) < len(str(folder)) + 600
    for word in words:
        assert word in line
    return line


def seal(
    folder: Path, manifest: dict[str, Any], tensors: dict[str, np.ndarray] | bytes | None = None
) -> None:
    """Write a changed artifact whose hashes fit, as someone would who knows the format."""
    if tensors is not None:
        content = tensors if isinstance(tensors, bytes) else save(tensors)
        (folder / TENSORS).write_bytes(content)
        manifest["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    manifest.pop("manifest_sha256", None)
    with contextlib.suppress(ValueError):  # NaN and half characters have no canonical form
        manifest["manifest_sha256"] = sha256_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def opened(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest, {name: array.copy() for name, array in load((folder / TENSORS).read_bytes()).items()}


# Round trips ------------------------------------------------------------------------------------------------


def test_what_is_saved_is_read_again(kind: str, folder: Path) -> None:
    assert_equal(reader(kind)(folder), artifact(kind))
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, TENSORS]


def test_saving_twice_gives_the_same_bytes(kind: str, folder: Path, tmp_path: Path) -> None:
    reader(kind)(folder).save_pretrained(tmp_path / "again")
    for name in (MANIFEST, TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_manifest_says_what_the_format_says(kind: str, folder: Path) -> None:
    manifest, _ = opened(folder)
    content = (folder / TENSORS).read_bytes()
    assert manifest["format"] == "steersman"
    assert manifest["format_version"] == (4 if kind == "steering" else 3)
    assert manifest["tensors_sha256"] == hashlib.sha256(content).hexdigest()
    without = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    assert manifest["manifest_sha256"] == hashlib.sha256(canonical_json(without).encode()).hexdigest()
    assert manifest["model"]["architecture_id"] == artifact(kind).architecture.id
    assert steersman.artifacts.read_manifest(folder) == manifest


def test_an_empty_steering_is_kept(tmp_path: Path) -> None:
    plan = Steering((), contrasts.architecture(), "w")
    plan.save_pretrained(tmp_path / "plan")
    assert Steering.from_pretrained(tmp_path / "plan") == plan


strengths = st.dictionaries(
    st.sampled_from([1, 4]),
    st.dictionaries(st.integers(0, 5), st.floats(-1, 1), max_size=2),
    max_size=2,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.tuples(strengths, st.sampled_from(["all", "prompt", "generated", "answer"])), max_size=3),
    st.dictionaries(st.text(), json_values, max_size=3),
    st.text(),
    st.none() | st.text(),
)
def test_any_steering_survives(
    edits: list[tuple[dict[int, dict[int, float]], Any]],
    provenance: dict[str, Any],
    model: str,
    revision: str | None,
) -> None:
    roomy = contrasts.architecture(None, *[Router(layer, 60, 20, "rule") for layer in range(1, 5)])
    plan = Steering(
        tuple(ExpertEdit(levels, scope) for levels, scope in edits),
        roomy,
        weights_id="w",
        model=model,
        revision=revision,
        on_conflict="sum",
        provenance=provenance,
    )
    with tempfile.TemporaryDirectory() as place:
        plan.save_pretrained(Path(place) / "plan")
        assert_equal(Steering.from_pretrained(Path(place) / "plan"), plan)


@pytest.mark.parametrize("scale", [10**6, 10**9, 10**16])
@pytest.mark.parametrize("weighting", ["token", "pair"])
def test_counts_of_any_size_survive(tmp_path: Path, weighting: Any, scale: int) -> None:
    contrast = contrasts.made(30, weighting=weighting, scale=scale)
    contrast.save_pretrained(tmp_path / "contrast")
    contrasts.assert_same(RoutingContrast.from_pretrained(tmp_path / "contrast"), contrast)


def test_derived_steerings_survive_with_their_history(tmp_path: Path) -> None:
    contrast = contrasts.made()
    plan = compose(
        0.5 * contrast.select(activate=2, deactivate=1), contrast.select(activate=1, scope="prompt")
    )
    plan.save_pretrained(tmp_path / "plan")
    assert Steering.from_pretrained(tmp_path / "plan") == plan


def test_keys_of_provenance_that_are_numbers_become_text(tmp_path: Path) -> None:
    """JSON knows no other keys; 10 sorts before 9 then, and the manifest must still fit its hash."""
    plan = Steering((), contrasts.architecture(), "w", provenance={"layers": {9: "a", 10: "b"}})
    plan.save_pretrained(tmp_path / "plan")
    assert Steering.from_pretrained(tmp_path / "plan").provenance == {"layers": {"9": "a", "10": "b"}}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}, "\ud800", {1: 0, "1": 1}])
def test_provenance_that_json_cannot_hold_is_refused_before_writing(tmp_path: Path, value: object) -> None:
    plan = Steering((), contrasts.architecture(), "w", provenance={"value": value})
    refused(plan.save_pretrained, tmp_path / "plan", "JSON")
    assert list(tmp_path.iterdir()) == []


# Writing ----------------------------------------------------------------------------------------------------


def everything_in(place: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(place)): path.read_bytes() if path.is_file() else None
        for path in place.rglob("*")
    }


def test_parents_are_created(kind: str, tmp_path: Path) -> None:
    artifact(kind).save_pretrained(tmp_path / "a" / "b" / "c")
    assert_equal(reader(kind)(tmp_path / "a" / "b" / "c"), artifact(kind))


def test_a_text_will_do_as_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rich_steering().save_pretrained("plan")
    assert Steering.from_pretrained("plan") == rich_steering()


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    rich_steering().save_pretrained(tmp_path / "plan")
    assert Steering.from_pretrained(tmp_path / "plan") == rich_steering()


def test_the_working_folder_itself_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "plan"
    place.mkdir()
    monkeypatch.chdir(place)
    rich_steering().save_pretrained(".")
    assert Steering.from_pretrained(place) == rich_steering()
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_folder(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        rich_steering().save_pretrained(tmp_path / "plan")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "plan").stat().st_mode) == 0o777 & ~mask
    for name in (MANIFEST, TENSORS):
        assert stat.S_IMODE((tmp_path / "plan" / name).stat().st_mode) == 0o666 & ~mask


def test_an_occupied_folder_is_kept_without_force(kind: str, folder: Path) -> None:
    before = everything_in(folder.parent)
    refused(contrasts.made(1).save_pretrained, folder, "not empty", "--force")
    assert everything_in(folder.parent) == before


def test_force_replaces_our_own(kind: str, folder: Path) -> None:
    (folder / TENSORS).unlink()  # also half of one
    rich_steering().save_pretrained(folder, force=True)
    assert Steering.from_pretrained(folder) == rich_steering()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "foreign", ["notes.txt", "sub/file", f"{MANIFEST}/file", f"{TENSORS}/file", ".hidden"]
)
def test_force_never_replaces_the_files_of_others(tmp_path: Path, foreign: str) -> None:
    target = tmp_path / "plan"
    (target / foreign).parent.mkdir(parents=True)
    (target / foreign).write_text("mine")
    before = everything_in(tmp_path)
    refused(functools.partial(rich_steering().save_pretrained, force=True), target, "other files")
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "what", ["file", "dangling link", "link to folder", "link to artifact", "file as parent"]
)
def test_what_is_in_the_way_is_left_alone(tmp_path: Path, what: str, force: bool) -> None:
    target = tmp_path / "plan"
    if what == "file":
        target.write_text("mine")
    elif what == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    elif what == "link to folder":
        (tmp_path / "other").mkdir()
        target.symlink_to(tmp_path / "other")
    elif what == "link to artifact":
        rich_steering().save_pretrained(tmp_path / "other")
        target.symlink_to(tmp_path / "other")
    else:
        (tmp_path / "plan").write_text("mine")
        target = target / "below"
    before = sorted(path.name for path in tmp_path.rglob("*"))
    refused(functools.partial(contrasts.made(1).save_pretrained, force=force), target)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    if what.startswith("link") or what == "dangling link":
        assert target.is_symlink()


def test_a_link_above_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    rich_steering().save_pretrained(tmp_path / "link" / "plan")
    assert Steering.from_pretrained(tmp_path / "real" / "plan") == rich_steering()


def test_a_name_that_no_file_system_takes(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    refused(rich_steering().save_pretrained, long)
    refused(Steering.from_pretrained, long)


INTERRUPTIONS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EIO, "Input/output error"),
    KeyboardInterrupt(),
    MemoryError(),
]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("operation", ["write_bytes", "write_text", "replace", "chmod"])
@pytest.mark.parametrize("occupied", [False, True])
def test_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, error: BaseException, occupied: bool
) -> None:
    """Whenever an operation fails, at its first, second or third call, all is as it was before."""
    target = tmp_path / "out" / "plan"
    target.parent.mkdir()
    if occupied:
        Steering((), contrasts.architecture(), "old").save_pretrained(target)
    before = everything_in(tmp_path)
    original = getattr(Path, operation)
    failed = 0
    for turn in (1, 2, 3):
        calls = 0

        def failing(path: Path, *args: Any, turn: int = turn, **options: Any) -> Any:
            nonlocal calls, failed
            calls += 1
            if calls == turn:
                failed += 1
                if operation.startswith("write"):
                    path.touch()
                    with path.open("wb") as stream:
                        stream.write(b"half")
                raise error
            return original(path, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, operation, failing)
            expected = ArtifactError if isinstance(error, OSError) else type(error)
            if calls_of(operation, occupied) >= turn:
                with pytest.raises(expected) as raised:
                    rich_steering().save_pretrained(target, force=True)
                if expected is ArtifactError:
                    assert str(raised.value) == f"{target}: cannot be written ({error.strerror})"
                assert everything_in(tmp_path) == before
    assert failed == calls_of(operation, occupied)


def calls_of(operation: str, occupied: bool) -> int:
    """How often saving calls an operation: an occupied folder is first moved aside."""
    return 2 if operation == "replace" and occupied else 1


def test_a_file_size_limit_of_the_system_is_one_line(tmp_path: Path) -> None:
    """A real failure in the middle of a write, from the operating system."""
    contrast = contrasts.made(40, weighting="pair")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        refused(contrast.save_pretrained, tmp_path / "contrast", "cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused(rich_steering().save_pretrained, locked / "plan", "cannot be written")


def test_a_reader_never_sees_half_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last step the old artifact is there whole; after it the new one."""
    target = tmp_path / "plan"
    old = Steering((), contrasts.architecture(), "old")
    old.save_pretrained(target)
    original = Path.write_text

    def looking(path: Path, *args: Any, **options: Any) -> int:
        written = original(path, *args, **options)
        assert Steering.from_pretrained(target) == old
        return written

    monkeypatch.setattr(Path, "write_text", looking)
    rich_steering().save_pretrained(target, force=True)
    assert Steering.from_pretrained(target) == rich_steering()


# Reading what was changed -----------------------------------------------------------------------------------


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a manifest, by keys and indices."""
    if path:
        yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from paths_in(child, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def allowed(kind: str, path: tuple[Any, ...], value: Any) -> bool:
    """Whether a place may hold this, so that only the hashes protect it: what is for people to read."""
    if value != value:  # NaN is no JSON
        return False
    if path[:2] == ("nuisance", "from"):
        path = ("made_from", *path[1:])
    if path[0] == "new_tokens":  # how many there could have been
        return type(value) is int and value > 0
    if path[:2] == ("strata", "starts") and len(path) == 3:  # where a stratum begins
        return path[2] == 1 and type(value) is int and value > 0
    if path[:3] == ("nuisance", "strata", "starts") and len(path) == 4:
        return False  # a nuisance's begin where the contrast's do
    if path[0] == "made_from":
        depth = len(path)
        if kind == "steering":
            return depth > 1 or isinstance(value, dict)
        return depth > 3 or (depth == 3 and isinstance(value, dict)) or (depth == 2 and value == [])
    if path[0] == "evidence":
        return allowed_as_evidence(path, value)
    if path[-1] in ("reason", "revision"):
        return value is None or isinstance(value, str)
    if path[-1] in ("shared_experts", "skipped", "alike"):
        return type(value) is int and value >= 0
    return path[-1] in ("name", "tool_version", "weights_id") and isinstance(value, str)


def allowed_as_evidence(path: tuple[Any, ...], value: Any) -> bool:
    if len(path) == 1 or path[-1] == "tasks":
        return bool(value == [])
    if path[-1] in ("strength", "difference", "low", "high", "p", "p_holm", "random_p"):
        return value is None or type(value) in (int, float)
    if path[-1] == "items":
        return type(value) is int and value >= 0
    of_one = len(path) == 5 and path[-1] == "sha256"  # a task's: whatever its reader calls so
    free = ("created", "steersman", "task", "metric", "arm", "arm_kind")
    return isinstance(value, str) and (len(path) == 2 or of_one or path[-1] in free)


OTHERS: list[Any] = [
    *(None, True, False, 0, -1, 2, 0.5, 1.0, 10**30, "", "x", "1", "a\nb", "\ud800", float("nan")),
    *([], [1], [[]], [None] * 3, {}, {"x": 1}),
]


def test_every_value_of_the_manifest_is_checked(kind: str, folder: Path) -> None:
    """Each place in turn holds something else and the hashes fit: what it means must be refused."""
    manifest, _ = opened(folder)
    places = [path for path in paths_in(manifest) if path[-1] != "manifest_sha256"]
    if kind.endswith("everything"):  # what the other contrasts have as well is checked there; lists are alike
        places = [p for p in places if p[0] not in ("architecture", "model") and p[-1] not in range(2, 99)]
    assert len(places) > 40
    wrong = []
    for path in places:
        present = at(manifest, path)
        for value in OTHERS:
            if type(value) is type(present) and value == present:
                continue
            changed = copy.deepcopy(manifest)
            at(changed, path[:-1])[path[-1]] = value
            seal(folder, changed)
            try:
                reader(kind)(folder)
            except ArtifactError as error:
                if "\n" in str(error) or not str(error).startswith(str(folder)):
                    wrong.append((path, value, str(error)))
            else:
                if not allowed(kind, path, value):
                    wrong.append((path, value, "accepted"))
    assert wrong == []


def test_every_key_of_the_manifest_is_needed_and_no_other_is_taken(kind: str, folder: Path) -> None:
    manifest, _ = opened(folder)
    for path in paths_in(manifest):
        inside_provenance = path[0] == "made_from" and (kind == "steering" or len(path) > 2)
        inside_provenance |= path[:2] == ("nuisance", "from") and len(path) > 2
        changed = copy.deepcopy(manifest)
        del at(changed, path[:-1])[path[-1]]
        if path[-1] != "manifest_sha256":
            seal(folder, changed)
        else:
            (folder / MANIFEST).write_text(json.dumps(changed), encoding="utf-8")
        in_free_text = inside_provenance or (path[0] == "evidence" and len(path) in (2, 4))
        if not in_free_text or len(path) == 1:
            refused(reader(kind), folder)
        if isinstance(at(manifest, path), dict) and not (inside_provenance or path[-1] == "from"):
            changed = copy.deepcopy(manifest)
            at(changed, path)["extra"] = 1
            seal(folder, changed)
            refused(reader(kind), folder, "extra")
    seal(folder, {**manifest, "extra": 1})
    refused(reader(kind), folder, "unknown key 'extra'")


def test_every_scalar_sum_is_checked(tmp_path: Path) -> None:
    artifact("contrast").save_pretrained(tmp_path / "contrast")
    manifest, _ = opened(tmp_path / "contrast")
    for name in manifest["sums"]:
        for value in ("", "-1", "1.5", " 7", "١", "1e3", "0x10", "9" * 5000, "0"):
            changed = copy.deepcopy(manifest)
            changed["sums"][name] = value
            seal(tmp_path / "contrast", changed)
            refused(RoutingContrast.from_pretrained, tmp_path / "contrast")


def test_without_a_fitting_hash_no_change_is_taken(kind: str, folder: Path) -> None:
    manifest, _ = opened(folder)
    for path in paths_in(manifest):
        changed = copy.deepcopy(manifest)
        at(changed, path[:-1])[path[-1]] = "f" * 64
        (folder / MANIFEST).write_text(json.dumps(changed), encoding="utf-8")
        refused(reader(kind), folder)


@pytest.mark.parametrize("weighting", ["token", "pair"])
def test_contrasts_saved_by_the_first_version_are_read(weighting: Any) -> None:
    read = RoutingContrast.from_pretrained(DATA / f"contrast-format-1-{weighting}")
    contrasts.assert_same(read, contrasts.made(seed=3, weighting=weighting))


def test_the_first_version_has_no_keys_of_the_second(tmp_path: Path) -> None:
    shutil.copytree(DATA / "contrast-format-1-token", tmp_path / "contrast")
    manifest, _ = opened(tmp_path / "contrast")
    seal(tmp_path / "contrast", {**manifest, "nuisance": None})
    refused(RoutingContrast.from_pretrained, tmp_path / "contrast", "unknown key 'nuisance'")
    contrasts.made().save_pretrained(tmp_path / "contrast", force=True)
    manifest, _ = opened(tmp_path / "contrast")
    seal(tmp_path / "contrast", {**manifest, "format_version": 1})
    refused(RoutingContrast.from_pretrained, tmp_path / "contrast", "unknown key")


SAVED_BEFORE = {
    "steering-format-3": Steering,
    "contrast-format-2": RoutingContrast,
    "concept-format-1": ConceptVector,
    "map-format-1": AffineMap,
    "screen-format-1": CausalScreen,
    "profile-format-1": ExpertProfile,
}
"""What the commit before chats were kept in manifests wrote."""


@pytest.mark.parametrize("name", SAVED_BEFORE)
def test_what_was_saved_before_is_read_and_saved_anew(name: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / name, tmp_path / "old")
    kind = SAVED_BEFORE[name]
    read = kind.from_pretrained(tmp_path / "old")
    assert getattr(read, "chat", None) is None
    read.save_pretrained(tmp_path / "new")
    (old, tensors), (new, same) = opened(tmp_path / "old"), opened(tmp_path / "new")
    assert new["format_version"] == old["format_version"] + (2 if kind in (ConceptVector, AffineMap) else 1)
    assert new["model"] == old["model"] | ({} if kind is Steering else {"chat": None})
    # What labels were shuffled to before is not what a gate refits now: the concept has to be refined again.
    changed = {"shuffled", "fold_numbers", "unit_sums", "unit_sizes", "cluster_units"}
    added = {name for name in same if name.endswith(".quality")} if kind is AffineMap else set()
    assert tensors.keys() - changed == same.keys() - changed - added
    assert all(np.array_equal(tensors[key], same[key]) for key in tensors.keys() - changed)
    if isinstance(read, ConceptVector):
        assert np.array_equal(read.fold_numbers, tensors["fold_numbers"])
        assert not len(read.unit_sums) + len(read.shuffled)
    if kind is not Steering:  # neither version has the other's keys
        seal(tmp_path / "old", {**old, "model": new["model"]})
        refused(kind.from_pretrained, tmp_path / "old", "unknown key 'chat'")
        seal(tmp_path / "new", {**new, "model": old["model"]})
        refused(kind.from_pretrained, tmp_path / "new", "key 'chat' is missing")


def test_a_part_of_a_map_that_was_made_before_is_read_again() -> None:
    refused(AffineMap.from_pretrained, DATA / "map-part-format-1", "a part made by an earlier version")


def test_a_concept_of_version_1_has_no_method_of_version_2(tmp_path: Path) -> None:
    shutil.copytree(DATA / "concept-format-1", tmp_path / "old")
    manifest, _ = opened(tmp_path / "old")
    seal(tmp_path / "old", {**manifest, "method": "pca_diff"})
    refused(ConceptVector.from_pretrained, tmp_path / "old", "not one of mean_difference, pca")
    replace(ConceptVector.from_pretrained(DATA / "concept-format-1"), method="pca_diff").save_pretrained(
        tmp_path / "new"
    )
    assert ConceptVector.from_pretrained(tmp_path / "new").method == "pca_diff"


WRONG_CHATS: dict[str, tuple[Any, str]] = {
    "text": ("today", "not an object"),
    "another key": ({**CHAT.to_json(), "clock": 1}, "unknown key 'clock'"),
    "a key less": ({"arguments": {}, "date": None}, "'template_sha256' is missing"),
    "no hash": ({**CHAT.to_json(), "template_sha256": "ab"}, "not a sha256"),
    "no arguments": ({**CHAT.to_json(), "arguments": []}, "model.chat.arguments is not an object"),
    "no day": ({**CHAT.to_json(), "date": "29.11.2026"}, "not YYYY-MM-DD"),
}


@pytest.mark.parametrize("name", WRONG_CHATS)
def test_how_chats_were_rendered_is_read_strictly(name: str, tmp_path: Path) -> None:
    chat, words = WRONG_CHATS[name]
    replace(contrasts.made(), chat=CHAT).save_pretrained(tmp_path / "contrast")
    assert RoutingContrast.from_pretrained(tmp_path / "contrast").chat == CHAT
    manifest, _ = opened(tmp_path / "contrast")
    seal(tmp_path / "contrast", {**manifest, "model": {**manifest["model"], "chat": chat}})
    refused(RoutingContrast.from_pretrained, tmp_path / "contrast", words)


@pytest.mark.parametrize("version", [5, 10, 10**20])
def test_a_newer_format_says_so(kind: str, folder: Path, version: int) -> None:
    manifest, _ = opened(folder)
    seal(folder, {**manifest, "format_version": version, "keys_of_tomorrow": 1})
    refused(reader(kind), folder, "newer", "upgrade")


def test_another_kind_says_so(tmp_path: Path) -> None:
    rich_steering().save_pretrained(tmp_path / "steering")
    contrasts.made().save_pretrained(tmp_path / "contrast")
    refused(
        RoutingContrast.from_pretrained,
        tmp_path / "steering",
        "this is a steering, a routing contrast is needed",
    )
    refused(
        Steering.from_pretrained, tmp_path / "contrast", "this is a routing contrast, a steering is needed"
    )


def test_another_architecture_id_is_refused(kind: str, folder: Path) -> None:
    manifest, _ = opened(folder)
    manifest["model"]["architecture_id"] = contrasts.architecture(Router(0, 4, 1, "rule")).id
    seal(folder, manifest)
    refused(reader(kind), folder, "architecture id does not fit")


def test_another_architecture_with_its_own_id_is_refused(kind: str, folder: Path) -> None:
    """The plan's experts, or the counts, do not exist in it."""
    other = contrasts.architecture(None, None, Router(2, 4, 1, "rule"))
    manifest, _ = opened(folder)
    router = {"rule": "rule", "experts": 4, "top_k": 1, "groups": None, "shared_experts": 0, "reason": None}
    manifest["architecture"]["layers"] = [None, None, router]
    manifest["model"]["architecture_id"] = other.id
    seal(folder, manifest)
    refused(reader(kind), folder)


def test_a_plan_that_breaks_its_routers_limits_is_refused(tmp_path: Path) -> None:
    Steering((ExpertEdit({1: {0: 1, 1: 1}}),), contrasts.architecture(), "w").save_pretrained(
        tmp_path / "plan"
    )
    manifest, tensors = opened(tmp_path / "plan")
    tensors = {
        "edits.0.layers": np.array([1, 1, 1]),
        "edits.0.experts": np.array([0, 1, 2]),
        "edits.0.strengths": np.ones(3),
    }
    seal(tmp_path / "plan", manifest, tensors)
    refused(Steering.from_pretrained, tmp_path / "plan", "3 experts activated, but the router chooses 2")


def test_opposite_pulls_need_the_word(tmp_path: Path) -> None:
    rich_steering().save_pretrained(tmp_path / "plan")
    manifest, _ = opened(tmp_path / "plan")
    seal(tmp_path / "plan", {**manifest, "on_conflict": "error"})
    refused(Steering.from_pretrained, tmp_path / "plan", "one edit activates it and another deactivates it")


# Files that are not what they should be ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"null",
        b"[]",
        b"1",
        b'"manifest"',
        b"{",
        b"{} {}",
        b"\xff\xfe{}",
        b'{"format": "steersman"',
        b'{"format": "steersman", "format": "steersman"}',
        b'{"format": NaN}',
        b'{"format": "steersman", "format_version": 1, "kind": Infinity}',
        b'{"format": "steersman", "format_version": 1, "kind": {"a": {"a": 1, "a": 2}}}',
        b'{"format": "steersman", "format_version": 1, "kind": ["steering"]}',
        b'{"format": "steersman", "format_version": 1, "kind": "a\\nb"}',
        b'{"format": "steersman", "format_version": "1\\n2", "kind": "steering"}',
        b'{"format": "steersman", "format_version": ' + b"9" * 10_000 + b"}",
        b'{"format": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format": ' + b'{"a":' * 100_000,
        b'{"format": "' + b"x" * 5_000_000 + b'"}',
        b'{"format": "steersman", "format_version": 1, "kind": "' + b"x" * 1_000_000 + b'"}',
        b'{"\xed\xa0\x80": 1}',
    ],
    ids=range(23),
)
def test_what_is_no_manifest_is_one_line(kind: str, folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    refused(reader(kind), folder)
    refused(steersman.artifacts.read_manifest, folder)


def test_json_of_any_depth_is_one_line(kind: str, folder: Path) -> None:
    """Also where the parser still takes what the hash, or the reader, would trip over."""
    manifest, _ = opened(folder)
    text = json.dumps(manifest)
    for depth in (100, 300, 450, 480, 500, 600, 900, 950, 980, 1000, 1500, 5000):
        deep = text.replace('"made_from": {', '"made_from": {"deep": ' + "[" * depth + "]" * depth + ", ", 1)
        assert deep != text
        (folder / MANIFEST).write_text(deep, encoding="utf-8")
        refused(reader(kind), folder)


def test_a_key_given_twice_is_refused_also_with_equal_values(kind: str, folder: Path) -> None:
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    for twice in ('{\n  "format": "steersman",', '{"format_version": 1,'):
        (folder / MANIFEST).write_text(text.replace("{", twice, 1), encoding="utf-8")
        refused(reader(kind), folder, "twice")


class Bomb:
    """Unpickling it would leave a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["BOMB_MARK"],))


def test_a_pickle_is_never_opened(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB_MARK", str(folder.parent / "exploded"))
    manifest, _ = opened(folder)
    seal(folder, manifest, pickle.dumps(Bomb()))
    refused(reader(kind), folder, "not a safetensors file")
    (folder / TENSORS).rename(folder / "tensors.pkl")
    refused(reader(kind), folder, "missing")
    assert not (folder.parent / "exploded").exists()


def safetensors_bytes(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 8,
        safetensors_bytes(b"{}"),
        safetensors_bytes(b"not json"),
        safetensors_bytes(b"[" * 50_000),
        safetensors_bytes(b'{"tokens":{"dtype":"I64","shape":[2],"data_offsets":[0,999999]}}', b"\0" * 16),
        safetensors_bytes(b'{"tokens":{"dtype":"I64","shape":[-1],"data_offsets":[0,16]}}', b"\0" * 16),
        safetensors_bytes(b'{"tokens":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}', b"\0" * 4),
        safetensors_bytes(b'{"tokens":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}', b"\0" * 2),
        safetensors_bytes(b'{"tokens":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}', b"\0" * 8),
        safetensors_bytes(b'{"tokens":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', b"\0"),
        safetensors_bytes(b'{"tokens":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}}', b"\0\1"),
        safetensors_bytes(b'{"tokens":{"dtype":"I64","shape":[4611686018427387905,4],"data_offsets":[0,32]}}'),
    ],
    ids=range(14),
)  # fmt: skip
def test_what_is_no_safetensors_is_one_line(kind: str, folder: Path, content: bytes) -> None:
    manifest, _ = opened(folder)
    seal(folder, manifest, content)
    refused(reader(kind), folder)


def test_bytes_cut_off_added_or_flipped(kind: str, folder: Path) -> None:
    for name in (MANIFEST, TENSORS):
        content = (folder / name).read_bytes()
        turned = bytearray(content)
        turned[-20] ^= 1
        for changed in (
            content[:-2],
            content[: len(content) // 2],
            b"",
            content + b"\0",
            bytes(turned),
            b"\0" + content,
        ):
            (folder / name).write_bytes(changed)
            refused(reader(kind), folder)
        (folder / name).write_bytes(content)
    assert_equal(reader(kind)(folder), artifact(kind))


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_files_that_are_missing_or_no_files(kind: str, folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(reader(kind), folder)
    (folder / name).mkdir()
    refused(reader(kind), folder)
    (folder / name).rmdir()
    os.mkfifo(folder / name)  # nobody writes: whoever opened it would wait for ever
    refused(reader(kind), folder)


@pytest.mark.parametrize("read", [Steering.from_pretrained, RoutingContrast.from_pretrained])
def test_places_without_an_artifact(tmp_path: Path, read: Callable[..., object]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    for place in ("missing", "empty", "file", "file/below"):
        refused(read, tmp_path / place, "no artifact there")
    with pytest.raises(
        ArtifactError, match=r"^someone/plan: neither a folder here nor an artifact .* the Hub$"
    ):
        read("someone/plan")
    with pytest.raises(ArtifactError, match=r"^some one/plan: neither"):
        read("some one/plan")


def test_another_programs_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"manifest_version": 3, "name": "extension"}')
    refused(Steering.from_pretrained, tmp_path, "not a Steersman artifact")


# Tensors, with hashes that fit ------------------------------------------------------------------------------


def changes_of(name: str, array: np.ndarray) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Ways in which one tensor can be wrong; the empty dictionary leaves it out."""
    yield "missing", {}
    yield "one more dimension", {name: array[None]}
    yield "flat", {name: array.reshape(-1)} if array.ndim > 1 else {name: array.reshape(-1, 1)}
    yield "too short", {name: array[:-1]}
    yield "too long", {name: np.concatenate([array, array[-1:]])}
    yield "empty", {name: array[:0]}
    yield "float", {name: array.astype(np.float32)}
    yield "narrow", {name: array.astype(np.int32)}
    yield "unsigned", {name: array.astype(np.uint64)}
    yield "boolean", {name: array.astype(bool)}
    yield "negative", {name: array - 10**6}
    yield "other", {name: np.where(np.arange(array.size).reshape(array.shape) == 0, array + 1, array)}
    yield (
        "last other",
        {name: np.where(np.arange(array.size).reshape(array.shape) == array.size - 1, array + 7, array)},
    )
    yield "huge", {name: np.full_like(array, 2**62)}
    yield "extra", {name: array, f"{name}.extra": array}
    if array.dtype.kind == "f":
        for bad in (np.nan, np.inf, -np.inf, 1.0000001, -2.0):
            yield str(bad), {name: np.concatenate([array[:-1], [bad]])}


def test_every_tensor_is_checked(kind: str, folder: Path) -> None:
    manifest, tensors = opened(folder)
    wrong = []
    for name, array in tensors.items():
        for what, changed in changes_of(name, array):
            others = {key: value for key, value in tensors.items() if key != name}
            seal(folder, copy.deepcopy(manifest), {**others, **changed})
            try:
                read = reader(kind)(folder)
            except ArtifactError as error:
                if "\n" in str(error) or not str(error).startswith(str(folder)):
                    wrong.append((name, what, str(error)))
            else:
                if not consistent(read, name, what):
                    wrong.append((name, what, "accepted"))
    assert wrong == []


def consistent(read: Steering | RoutingContrast, name: str, what: str) -> bool:
    """Whether a change gives another artifact that is in itself without fault: other clusters, other products
    of counts. That such numbers were never counted, only the hash can tell.
    """
    if isinstance(read, Steering):
        return False  # the fingerprint tells
    if what not in ("other", "last other", "negative", "huge"):
        return False
    if name == "nuisance.cluster_ids":
        return bool((np.diff(read.nuisance.cluster_ids) > 0).all())
    if name == "cluster_ids":
        return bool((np.diff(read.cluster_ids) > 0).all())
    if name.endswith("replicates.tokens") or name.endswith("replicates.activations"):
        return False
    return ("sums." in name or "strata." in name) and bool((read.standard_error[read.valid] >= 0).all())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_strengths_that_are_no_numbers_say_so(tmp_path: Path, value: float) -> None:
    rich_steering().save_pretrained(tmp_path / "plan")
    manifest, tensors = opened(tmp_path / "plan")
    tensors["edits.0.strengths"][0] = value
    seal(tmp_path / "plan", manifest, tensors)
    refused(Steering.from_pretrained, tmp_path / "plan", "'edits.0.strengths' holds NaN or infinity")


def test_an_expert_given_twice_is_refused(tmp_path: Path) -> None:
    rich_steering().save_pretrained(tmp_path / "plan")
    manifest, tensors = opened(tmp_path / "plan")
    for name in ("layers", "experts", "strengths"):
        array = tensors[f"edits.0.{name}"]
        tensors[f"edits.0.{name}"] = np.concatenate([array, array[:1]])
    seal(tmp_path / "plan", manifest, tensors)
    refused(Steering.from_pretrained, tmp_path / "plan", "given twice")


# Fuzzing ----------------------------------------------------------------------------------------------------


@functools.cache
def saved_files(kind: str) -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as place:
        artifact(kind).save_pretrained(Path(place) / "artifact")
        return tuple((Path(place) / "artifact" / name).read_bytes() for name in (MANIFEST, TENSORS))  # type: ignore[return-value]


def mutated(content: bytes, dice: random.Random) -> bytes:
    """A few random changes of bytes: set, flipped, left out, repeated, moved."""
    data = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 5])):
        place = dice.randrange(len(data) + 1)
        length = dice.choice([1, 1, 2, 8, 64])
        change = dice.randrange(5)
        if change == 0:
            data[place : place + 1] = bytes([dice.randrange(256)])
        elif change == 1:
            data[place : place + length] = b""
        elif change == 2:
            data[place:place] = data[place : place + length]
        elif change == 3:
            data[place:place] = dice.randbytes(length)
        elif place < len(data):
            data[place] ^= 1 << dice.randrange(8)
    return bytes(data)


def mutated_json(value: Any, dice: random.Random) -> Any:
    """A manifest with one place changed, left out, doubled or moved."""
    changed = copy.deepcopy(value)
    places = list(paths_in(changed))
    path = dice.choice(places)
    parent = at(changed, path[:-1])
    what = dice.randrange(4)
    if what == 0:
        del parent[path[-1]]
    elif what == 1:
        parent[path[-1]] = copy.deepcopy(at(value, dice.choice(places)))
    elif what == 2 and isinstance(parent, dict):
        parent[str(path[-1]) + dice.choice("sx ")] = parent[path[-1]]
    else:
        parent[path[-1]] = dice.choice([*OTHERS[:-8], dice.randrange(100), dice.random()])
    return changed


def read_fuzzed(kind: str, manifest: bytes, tensors: bytes) -> Steering | RoutingContrast | None:
    """The artifact that two files give, None where they are refused with one line. Anything else fails."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / MANIFEST).write_bytes(manifest)
        (folder / TENSORS).write_bytes(tensors)
        try:
            return reader(kind)(folder)
        except ArtifactError as error:
            line = str(error)
    assert "\n" not in line
    assert line.startswith(place)
    return None


@given(st.sampled_from(KINDS), st.randoms(use_true_random=False), st.booleans())
def test_random_bytes_never_give_anything_else(kind: str, dice: random.Random, which: bool) -> None:
    manifest, tensors = saved_files(kind)
    if which:
        read = read_fuzzed(kind, mutated(manifest, dice), tensors)
    else:
        read = read_fuzzed(kind, manifest, mutated(tensors, dice))
    if read is not None:
        assert_equal(read, artifact(kind))


@given(st.sampled_from(KINDS), st.randoms(use_true_random=False))
def test_random_manifests_and_tensors_with_fitting_hashes_never_crash(kind: str, dice: random.Random) -> None:
    """What is accepted is an artifact that can be used, saved and read again."""
    original, tensors = saved_files(kind)
    manifest = mutated_json(json.loads(original), dice)
    content = mutated(tensors, dice) if dice.random() < 0.5 else tensors
    if dice.random() < 0.9:
        manifest["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    manifest.pop("manifest_sha256", None)
    with contextlib.suppress(ValueError):
        manifest["manifest_sha256"] = sha256_of(manifest)
    read = read_fuzzed(kind, json.dumps(manifest).encode(), content)
    if read is None:
        return
    if isinstance(read, RoutingContrast):
        read.table()
    with tempfile.TemporaryDirectory() as place:
        read.save_pretrained(Path(place) / "again")
        assert_equal(reader(kind)(Path(place) / "again"), read)


# The Hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with client_at_local_hub(monkeypatch, tmp_path / "cache") as server:
        yield server


def test_push_to_hub_uploads_the_artifact_and_its_card(kind: str, hub: LocalHub, tmp_path: Path) -> None:
    address = artifact(kind).push_to_hub(
        "someone/thing", license="mit", commit_message="first", token="hf_secret"
    )
    (commit,) = hub.commits
    assert address == f"{hub.address}/someone/thing/commit/{commit.sha}"
    assert (commit.branch, commit.message, commit.token) == ("main", "first", "hf_secret")
    assert sorted(commit.files) == ["README.md", MANIFEST, TENSORS]
    card = huggingface_hub.ModelCard(commit.files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.library_name == "steersman"
    assert card.data.tags == ["steersman", json.loads(commit.files[MANIFEST])["kind"].replace("_", "-")]
    assert reader(kind).__qualname__.removesuffix(".from_pretrained") in card.text
    assert_equal(reader(kind)("someone/thing"), artifact(kind))  # and from there again
    assert hub.repositories == {"someone/thing": False}


def test_a_branch_and_privacy(hub: LocalHub) -> None:
    rich_steering().push_to_hub("someone/thing", license="mit", private=True, revision="trial")
    assert hub.repositories == {"someone/thing": True}
    assert [commit.branch for commit in hub.commits] == ["trial"]
    assert Steering.from_pretrained("someone/thing", revision="trial") == rich_steering()
    with pytest.raises(ArtifactError, match="neither a folder here nor an artifact that can be had"):
        Steering.from_pretrained("someone/thing")


@pytest.mark.parametrize("said", [None, "", "Apache License 2.0", "mit\nlicense"])
def test_a_licence_is_asked_for(kind: str, said: str | None, hub: LocalHub) -> None:
    with pytest.raises(ArtifactError, match="licence") as caught:
        artifact(kind).push_to_hub("someone/thing", license=said)
    assert "\n" not in str(caught.value)
    assert not hub.repositories


def test_what_the_hub_refuses_is_one_line(hub: LocalHub) -> None:
    hub.refuses = True
    with pytest.raises(ArtifactError, match="someone/thing: cannot be uploaded to the Hub") as caught:
        rich_steering().push_to_hub("someone/thing", license="mit")
    assert "\n" not in str(caught.value)


def test_from_pretrained_reads_what_the_hub_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    rich_steering().save_pretrained(tmp_path / "snapshot")

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert Steering.from_pretrained("someone/plan", revision="v2") == rich_steering()
    assert asked == [("someone/plan", {"revision": "v2", "allow_patterns": [MANIFEST, TENSORS]})]


def test_push_to_hub_without_a_hub_is_one_line() -> None:
    """The tests run offline: the Hub's own client refuses."""
    with pytest.raises(ArtifactError, match="someone/thing: cannot be uploaded to the Hub") as caught:
        rich_steering().push_to_hub("someone/thing", license="mit")
    assert "\n" not in str(caught.value)


def test_below_a_file_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for below in ("file/plan", "file/a/b"):
        with pytest.raises(ArtifactError, match="file is not a folder"):
            steersman.artifacts.check_free(tmp_path / below, ours=set())
    steersman.artifacts.check_free(tmp_path / "none/yet/plan", ours=set())
