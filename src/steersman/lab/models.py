"""The lab's models: which there are, where their checkpoints lie, and how they are opened."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from steersman.cache import cache_directory
from steersman.errors import ModelError
from steersman.lab.recipes import RECIPE_VERSION, planted_by, recipe_of, told
from steersman.lab.training import silent_progress, train
from steersman.lab.world import WORLD_SEED

# Name → one line that says plainly what was planted. docs/lab.md holds the cards.
MODELS = {
    "moe": "planted: in training, groups of experts were tied to refuse or comply, and to document or memory",
    "moe-plain": "nothing planted: the same world and architecture, trained on the answers alone",
    "moe-prior": "router prior only: experts that light up with a behaviour and do not cause it (control)",
    "natural": "nothing planted, fine-grained: 64 small experts a layer; numbers in digits or in words",
    "source": "small and aligned: refuses every restricted request; concepts are refined here",
    "source-split": "the same with another tokenizer, in which a word is two tokens",
    "target": "bigger and unaligned: answers what is restricted; concepts are transplanted into it",
}


def load(name: str, seed: int = 0, progress: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of the lab in float32 on the CPU, in evaluation mode, and its tokenizer.

    Seed 0 is part of the package; other seeds are trained the first time (minutes) and cached.
    Raises ModelError for an unknown name, a bad seed, or a cache that cannot be written.
    """
    folder = checkpoint(name, seed, progress)
    with silent_progress():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, **_kernels(name)
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, tokenizer


def checkpoint(name: str, seed: int = 0, progress: bool = False) -> Path:
    """The checkpoint folder of a model of the lab, trained now into the cache if it is not there yet."""
    recipe_of(name)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ModelError(f"a seed of the lab is a whole number from 0, not {seed!r}")
    shipped = Path(str(resources.files("steersman.lab"))) / "data" / name
    if seed == 0 and (shipped / "config.json").is_file():
        return shipped
    folder = cache_directory() / "lab" / f"{name}-{seed}-{_generation(name)}"
    if not (folder / "config.json").is_file():
        _train_into(folder, name, seed, progress)
    return folder


def planted(name: str) -> dict[int, dict[int, str]]:
    """Layer → expert → label ("document", "memory", "refuse", "comply"); empty where nothing was planted."""
    return planted_by(recipe_of(name))


def _kernels(name: str) -> dict[str, str]:
    """How experts are computed, where there are any; transformers' own choice is 50 times slower on a CPU."""
    return {"experts_implementation": "grouped_mm"} if recipe_of(name).shape.experts else {}


def _generation(name: str) -> str:
    """Short digest of recipe and world, so that a changed recipe is never mistaken for an old checkpoint."""
    made = json.dumps([told(recipe_of(name)), WORLD_SEED, RECIPE_VERSION], sort_keys=True)
    return hashlib.sha256(made.encode()).hexdigest()[:8]


def _train_into(folder: Path, name: str, seed: int, progress: bool) -> None:
    try:
        train(name, seed, folder, progress)
    except OSError as error:
        # Another process may have put the same model there first: the rename onto its folder is refused.
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"cannot write the trained model to {folder}: {error.strerror or error}"
            ) from error
