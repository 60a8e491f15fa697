"""The weights id of a checkpoint of 0.5 GB: its first reading, and every later one, by the clock.

The rival is sha256 over the same files in one thread, which is what reading every byte costs at least there.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

import torch
from measuring import interleaved, options, ratio, report
from safetensors.torch import save_file

from steersman.models import digest_cache
from steersman.models.digests import id_by_bytes
from steersman.models.stored_tensors import checkpoint_files, stored_tensors

SHARDS, TENSORS, SIDE = 4, 16, 2048


def checkpoint(folder: Path) -> list[Path]:
    """Files of random bfloat16 matrices."""
    for shard in range(SHARDS):
        tensors = {f"layers.{shard}.{n}": torch.randn(SIDE, SIDE).bfloat16() for n in range(TENSORS)}
        save_file(tensors, folder / f"{shard}.safetensors")
    index = ",".join(f'"layers.{shard}.0": "{shard}.safetensors"' for shard in range(SHARDS))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    return checkpoint_files(str(folder), None)


def main() -> None:
    """Print both ratios."""
    given = options(__doc__ or "")
    with tempfile.TemporaryDirectory() as place:
        (files_at := Path(place) / "model").mkdir()
        files = checkpoint(files_at)
        size = sum(file.stat().st_size for file in files)
        os.environ["STEERSMAN_CACHE"] = str(Path(place) / "cache")

        def first() -> None:
            digest_cache.SETTLED_NS = 1 << 62  # nothing is kept
            id_by_bytes([tensor for file in files for tensor in stored_tensors(file)])

        def later() -> None:
            digest_cache.SETTLED_NS = 0
            id_by_bytes([tensor for file in files for tensor in stored_tensors(file)])

        def one_thread() -> None:
            for file in files:
                with file.open("rb") as stream:
                    hashlib.file_digest(stream, "sha256")

        later()
        kept = {path: path.read_bytes() for path in (Path(place) / "cache" / "weights").iterdir()}

        def forgotten() -> None:
            for path in kept:
                path.unlink(missing_ok=True)
            first()
            for path, content in kept.items():
                path.write_bytes(content)

        arms = {"first": forgotten, "later": later, "one thread": one_thread}
        times = interleaved(arms, given.rounds or 7, warm=1, clock=time.perf_counter)
    rival = times["one thread"]
    speed = size / 1e9 / sorted(times["first"])[len(rival) // 2]
    report(
        f"weights id of {size / 1e9:.2f} GB in {SHARDS} files",
        [ratio("the first time", times["first"], rival), ratio("later", times["later"], rival, bound=0.05)],
        notes=f"the rival is one thread's sha256 over the files; {speed:.2f} GB/s on {os.cpu_count()} cores",
        name="identity",
        save=given.save,
    )


if __name__ == "__main__":
    main()
