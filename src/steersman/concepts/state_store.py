"""A model's states of texts on disk: written once, reused for every model that is mapped from it.

A folder with manifest.json (whose states: weights, dtype, texts, layers) and one safetensors file a chunk of
texts, with the states of all tokens. Files appear whole or not at all, so that a run may stop at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from steersman.errors import ArtifactError, valid_name
from steersman.progress import differences
from steersman.steering import canonical_json, sha256_of

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "steersman-states", 1
CHUNK_TEXTS = 16

Ints = np.ndarray[Any, Any]
Compute = Callable[[list[Ints]], Iterator[Tensor]]
"""States [tokens, layers, width] of each text, given token ids."""


class StateStore:
    """States of all tokens of texts, by the number of the text.

    Args:
        folder: Where; made if it is not there.
        facts: Whose states: what is there of others is refused. Without "layers".
        layers: Which are wanted; a folder that has more will do.
        lengths: Tokens of each text by its number.

    Attributes:
        layers: Those that the folder keeps: what is computed for it must have them, in this order.

    Raises:
        ArtifactError: the folder is of another model or other texts, lacks layers, or holds other files.
    """

    def __init__(
        self, folder: str | Path, facts: Mapping[str, Any], layers: Sequence[int], lengths: Mapping[int, int]
    ) -> None:
        self._folder, self._wanted = Path(valid_name(folder, ArtifactError)), list(layers)
        self.layers = list(layers)
        numbers = sorted(lengths, key=lambda number: (number // (32 * CHUNK_TEXTS), lengths[number], number))
        self._chunks = [numbers[at : at + CHUNK_TEXTS] for at in range(0, len(numbers), CHUNK_TEXTS)]
        self._place: dict[int, tuple[int, int, int]] = {}
        for chunk, members in enumerate(self._chunks):
            start = 0
            for number in members:
                self._place[number] = chunk, start, start + lengths[number]
                start += lengths[number]
        run = json.loads(canonical_json({**facts, "tokens": sha256_of(sorted(lengths.items()))}))
        self._id = sha256_of(run)
        self._check_or_make(run)

    def fill(
        self,
        numbers: Sequence[int],
        ids: Callable[[int], Ints],
        compute: Compute,
        *,
        progress: bool = False,
    ) -> None:
        """Make sure that the states of these texts are there.

        Args:
            ids: Token ids of a text by its number.
            compute: What is asked for those that are missing.
            progress: Show a bar on stderr.
        """
        chunks = sorted({self._place[number][0] for number in numbers})
        for chunk in tqdm(
            chunks, desc="source", unit=f"{CHUNK_TEXTS} texts", delay=1, leave=False, disable=not progress
        ):
            if not self._file(chunk).is_file():
                members = [ids(number) for number in self._chunks[chunk]]
                states = torch.cat(list(compute(members)))
                self._save(chunk, states)

    def read(self, number: int) -> Tensor:
        """States of a text, [tokens, layers, width]. Raises ArtifactError where they are damaged."""
        chunk, start, end = self._place[number]
        file = self._file(chunk)
        try:
            with safe_open(str(file), framework="pt") as stored:
                if (stored.metadata() or {}).get("states") != self._id:
                    raise ArtifactError(f"{file}: states of something else; remove the folder")
                parts = [stored.get_slice(f"layer.{layer}")[start:end] for layer in self._wanted]
        except ArtifactError:
            raise
        except (OSError, SafetensorError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"{file}: damaged ({reason}); remove the file and start again") from None
        if any(part.shape != parts[0].shape or len(part) != end - start for part in parts):
            raise ArtifactError(f"{file}: damaged (tokens are missing); remove the file and start again")
        if any(not part.is_floating_point() or not bool(torch.isfinite(part).all()) for part in parts):
            raise ArtifactError(f"{file}: damaged (no finite numbers); remove the file and start again")
        return torch.stack(parts, dim=1)

    def _save(self, chunk: int, states: Tensor) -> None:
        file = self._file(chunk)
        new = file.with_suffix(".new")
        tensors = {f"layer.{layer}": states[:, place].contiguous() for place, layer in enumerate(self.layers)}
        try:
            save_file(tensors, new, metadata={"states": self._id})
            new.replace(file)
        except (OSError, SafetensorError) as error:
            new.unlink(missing_ok=True)
            raise ArtifactError(f"{file}: cannot be written ({error})") from None

    def _file(self, chunk: int) -> Path:
        return self._folder / f"states-{chunk:06d}.safetensors"

    def _check_or_make(self, run: dict[str, Any]) -> None:
        path = self._folder / MANIFEST
        try:
            if path.is_file():
                self._check(json.loads(path.read_bytes()), run, path)
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            if other := next((entry.name for entry in self._folder.iterdir()), None):
                raise ArtifactError(
                    f"{self._folder}: holds other files ({other}), and states are to be kept there"
                )
            content = {"format": FORMAT, "format_version": FORMAT_VERSION, "layers": self.layers, "of": run}
            path.write_text(json.dumps(content, indent=1))
        except ArtifactError:
            raise
        except OSError as error:
            raise ArtifactError(f"{self._folder}: cannot be used for states ({error.strerror})") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ArtifactError(f"{path}: not the manifest of kept states; remove the folder") from None

    def _check(self, stored: Any, run: dict[str, Any], path: Path) -> None:
        if stored["format"] != FORMAT or stored["format_version"] != FORMAT_VERSION:
            raise ArtifactError(f"{path}: not states that this version keeps; remove the folder")
        if different := differences(dict(stored["of"]), run):
            raise ArtifactError(
                f"{self._folder}: states of another run, which differs in {different}: give another folder"
            )
        if lacking := sorted(set(self._wanted) - set(stored["layers"])):
            raise ArtifactError(
                f"{self._folder}: keeps states of layers {stored['layers']}, not of {lacking[0]}: "
                "give another folder"
            )
        # What is still missing is written with all the layers of what is there.
        self.layers = list(stored["layers"])
