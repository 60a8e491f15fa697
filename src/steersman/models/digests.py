"""How ids of weights are made: sha256 over every byte of every tensor, or, as before, over a sample."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from threading import Event, Lock
from typing import Protocol

from tqdm import tqdm

from steersman.errors import ModelError
from steersman.models import digest_cache
from steersman.models.stored_tensors import StoredTensor, is_gguf
from steersman.models.weights_ids import GGUF_SCHEME, SCHEME

WINDOWS = 8
"""How many stretches of a tensor's bytes a sample has."""
WINDOW_BYTES = 64
"""How long each of them is."""

_CHUNK = 8 << 20
_MOST_THREADS = 8


class TensorBytes(Protocol):
    """A tensor as a run of bytes, wherever it lies."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...
    def read(self, offset: int, count: int) -> bytes: ...


def windows(size: int) -> list[tuple[int, int]]:
    """(offset, bytes) of evenly spaced stretches; the whole tensor where it is short.

    Offsets are multiples of 8.
    """
    if size <= WINDOWS * WINDOW_BYTES:
        return [(0, size)]
    last = size - WINDOW_BYTES
    return [(last * i // (WINDOWS - 1) // 8 * 8, WINDOW_BYTES) for i in range(WINDOWS)]


def id_by_sample(tensors: Iterable[TensorBytes]) -> str:
    """Hex sha256 over names, shapes and a sample of the bytes, in the order of the names."""
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name}\0{list(tensor.shape)}\0".encode())
        for offset, count in windows(tensor.size):
            digest.update(tensor.read(offset, count))
    return digest.hexdigest()


def id_by_bytes(tensors: Sequence[TensorBytes]) -> str:
    """sha256 over names, dtypes, shapes and the sha256 of each tensor's bytes, in the order of the names.

    What was read from files is kept on disk, and not read again while the files are as they were.
    """
    stored = [tensor for tensor in tensors if isinstance(tensor, StoredTensor)]
    digests = _of_files(stored) | _hashed(
        [tensor for tensor in tensors if not isinstance(tensor, StoredTensor)]
    )
    whole = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        shape = list(tensor.shape)
        whole.update(f"{tensor.name}\0{tensor.dtype}\0{shape}\0{digests[tensor]}\n".encode())
    scheme = GGUF_SCHEME if any(is_gguf(tensor.file) for tensor in stored) else SCHEME
    return f"{scheme}:{whole.hexdigest()}"


def _of_files(tensors: list[StoredTensor]) -> dict[TensorBytes, str]:
    """Tensor → hex sha256 of its bytes, from the cache where the file is as it was."""
    by_file: dict[Path, list[StoredTensor]] = {
        file: list(of_file) for file, of_file in groupby(tensors, lambda tensor: tensor.file)
    }
    found: dict[TensorBytes, str] = {}
    missing: dict[Path, digest_cache.Stamp] = {}
    for file, of_file in by_file.items():
        stamp = digest_cache.stamp(file)
        kept = digest_cache.read(file, stamp)
        if kept is not None and kept.keys() == {tensor.name for tensor in of_file}:
            found |= {tensor: kept[tensor.name] for tensor in of_file}
        else:
            missing[file] = stamp
    hashed = _hashed([tensor for file in missing for tensor in by_file[file]])
    for file, before in missing.items():
        if digest_cache.stamp(file) != before:
            raise ModelError(f"{file}: was changed while it was read; try again when it is written")
        digest_cache.write(file, before, {tensor.name: hashed[tensor] for tensor in by_file[file]})
    return found | hashed


def _hashed(tensors: Sequence[TensorBytes]) -> dict[TensorBytes, str]:
    """Tensor → hex sha256 of its bytes, several at a time (hashing lets other threads run)."""
    if not tensors:
        return {}
    stop, lock = Event(), Lock()
    threads = min(_MOST_THREADS, len(tensors), os.cpu_count() or 1)
    with (
        tqdm(
            total=sum(tensor.size for tensor in tensors),
            desc="identify weights",
            unit="B",
            unit_scale=True,
            delay=1,
            leave=False,
        ) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):

        def progressed(count: int) -> bool:
            with lock:
                bar.update(count)
            return not stop.is_set()

        largest_first = sorted(tensors, key=lambda tensor: -tensor.size)
        work = {pool.submit(_sha256, tensor, progressed): tensor for tensor in largest_first}
        try:
            return {work[done]: done.result() for done in as_completed(work)}
        except BaseException:  # also Ctrl-C: the threads end at their next chunk
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _sha256(tensor: TensorBytes, progressed: Callable[[int], bool]) -> str:
    digest = hashlib.sha256()
    for offset in range(0, tensor.size, _CHUNK):
        part = tensor.read(offset, min(_CHUNK, tensor.size - offset))
        digest.update(part)
        if not progressed(len(part)):
            break
    return digest.hexdigest()
