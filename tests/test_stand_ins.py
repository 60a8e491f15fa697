"""What lies in a file in place of its content is named, with the remedy, by whatever reads the file."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import families as f
from concepts import twins
from steersman import (
    Steering,
    SteersmanError,
    import_easysteer,
    import_gguf,
    import_repeng,
    import_steering_vectors,
    import_steermoe,
    load_model,
    load_pairs,
    load_task,
)
from steersman.evaluation.judges import load_judge
from steersman.evaluation.judges.endpoint import endpoint_judge
from steersman.models.loading import load_structure, load_tokenizer
from steersman.stand_ins import stand_in
from steersman.texts import load_texts

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:82a1503ff9e77f4c3a36b06aab517b4f76faae68eda6003a542bd38324fbf0cb\nsize 173632\n"
)
IN_PLACE: dict[str, tuple[bytes, str]] = {
    "Git LFS": (POINTER, "a Git LFS pointer .*git lfs pull"),
    "git-annex": (b"/annex/objects/SHA256E-s173632--82a1503f.gguf\n", "a git-annex pointer .*git annex get"),
    "a page": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "a web page .*download it again"),
    "gzip": (gzip.compress(b"{}" * 50), "compressed with gzip; unpack it first"),
}

FILES: dict[str, Callable[[Path], Any]] = {
    "pairs.jsonl": load_pairs,
    "pairs.csv": load_pairs,
    "texts.txt": load_texts,
    "texts.jsonl": load_texts,
    "task.jsonl": lambda path: load_task(str(path)),
    "xstest.csv": lambda path: load_task(f"xstest:{path}"),
    "prompt.txt": lambda path: endpoint_judge(f"http://localhost:1#model#{path}"),
    "vector.gguf": lambda path: import_gguf(path, f.dense()),
    "repeng.gguf": lambda path: import_repeng(path, f.dense()),
    "repeng.pkl": lambda path: import_repeng(path, f.dense()),
    "plan.json": lambda path: import_easysteer(path, f.dense()),
    "ranking.pkl": lambda path: import_steermoe(path, f.dense()),
    "vector.pt": lambda path: import_steering_vectors(path, f.dense()),
}


@pytest.mark.parametrize("what", IN_PLACE)
@pytest.mark.parametrize("name", FILES)
def test_every_reader_of_a_file_says_what_lies_there(name: str, what: str, tmp_path: Path) -> None:
    path, (content, message) = tmp_path / name, IN_PLACE[what]
    path.write_bytes(content)
    with pytest.raises(SteersmanError, match=message) as caught:
        FILES[name](path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_link_of_git_annex_to_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.symlink_to(Path(".git/annex/objects/x9/Kq/SHA256E-s173632--82a1503f/SHA256E-s173632--82a1503f"))
    with pytest.raises(SteersmanError, match="git annex get"):
        FILES[name](path)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "plan"
    Steering.from_experts(f.shared("olmoe"), {1: [5]}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("what", [*IN_PLACE, "nothing"])
@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors"])
def test_files_of_an_artifact(name: str, what: str, plan: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plan, tmp_path / "plan"))
    content, message = IN_PLACE.get(what, (b"", "the file is empty"))
    (folder / name).write_bytes(content)
    with pytest.raises(SteersmanError, match=rf"{name}: {message}"):
        Steering.from_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = twins.save(twins.source(), tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


CHECKPOINT = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "model.safetensors",
)


@pytest.mark.parametrize("what", [*IN_PLACE, "nothing"])
@pytest.mark.parametrize("name", CHECKPOINT)
def test_files_of_a_checkpoint(name: str, what: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    content, message = IN_PLACE.get(what, (b"", "the file is empty"))
    (folder / name).write_bytes(content)
    of_structure = name in ("config.json", "model.safetensors")
    for opened in (load_model, load_structure if of_structure else load_tokenizer):
        with pytest.raises(SteersmanError, match=rf"{name}: {message}"):
            opened(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_files_of_a_judge(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "judge"))
    (folder / name).write_bytes(POINTER)
    with pytest.raises(SteersmanError, match=rf"{name}: a Git LFS pointer"):
        load_judge(f"classifier:{folder}#toxic").record()


def test_a_chat_template(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_bytes(POINTER)
    with pytest.raises(SteersmanError, match=r"template\.jinja: a Git LFS pointer"):
        load_tokenizer(str(checkpoint), chat_template=tmp_path / "template.jinja")


def test_an_index_and_one_of_its_files(tmp_path: Path) -> None:
    twins.source().save_pretrained(tmp_path, max_shard_size="10KB")
    twins.tokenizer().save_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(POINTER)
    with pytest.raises(SteersmanError, match=rf"{shard.name}: a Git LFS pointer"):
        load_model(str(tmp_path))
    shard.write_bytes(whole[:-100])
    with pytest.raises(SteersmanError, match=rf"{shard.name}: cut off: it has {len(whole) - 100} bytes"):
        load_model(str(tmp_path))
    shard.write_bytes(whole)
    (tmp_path / "model.safetensors.index.json").write_bytes(POINTER)
    with pytest.raises(SteersmanError, match=r"index\.json: a Git LFS pointer"):
        load_model(str(tmp_path))


def test_what_is_not_read_may_be_a_pointer(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    for name in ("pytorch_model.bin", "training_args.json", "README.md"):
        (folder / name).write_bytes(POINTER)
    load_model(str(folder))


@pytest.mark.parametrize(
    "content",
    [b"", b"version 2", b"a text about <html>", b"<HTMLElement", json.dumps({"a": "<html>"}).encode()],
)
def test_other_content_is_content(content: bytes) -> None:
    assert stand_in(content) is None
