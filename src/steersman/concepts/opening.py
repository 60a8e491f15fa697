"""The two models of a map: given open, or named and opened when it is their turn."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from steersman.chats.format import chat_format
from steersman.concepts.affine_map import MappedModel
from steersman.concepts.alignment import Reader
from steersman.errors import ModelError
from steersman.models.architecture import decoder_config, read_architecture
from steersman.models.identity import model_name, weights_id
from steersman.models.loading import load_model, load_structure, load_tokenizer
from steersman.models.reading import evaluating

Opened = tuple[nn.Module, PreTrainedTokenizerBase]


def check_opened(given: Any, what: str) -> None:
    """Raise ModelError where something else is given than a model with its tokenizer."""
    if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[0], nn.Module):
        raise ModelError(f"the {what} is no (model, tokenizer): give both, in this order, or a name")


class Side:
    """A model of a map, and what is known of it before its weights are needed.

    Args:
        model: Model and tokenizer, or a name.
        late: Open a named model only when it is used, and let go of it then.
        options: For `load_model`.
        which: What errors call a named one on the command line: `source`, `target`.

    Raises:
        ModelError: it cannot be opened.
    """

    def __init__(
        self, model: Opened | str | Path, late: bool, options: Mapping[str, Any] | None, which: str = ""
    ) -> None:
        self._options = dict(options or {})
        model = str(model) if isinstance(model, Path) else model
        self._name = model if isinstance(model, str) else None
        if isinstance(model, str):
            revision = self._options.get("revision")
            if late:
                self.opened: Opened | None = None
                structure: nn.Module = load_structure(model, revision=revision)
                chat = {key: value for key, value in self._options.items() if key.startswith("chat_")}
                self.tokenizer = load_tokenizer(model, revision=revision, **chat)
            else:
                self.opened = load_model(model, **self._options)
                structure, self.tokenizer = self.opened
            chat_format(self.tokenizer).side = which and f"{which}-"
        else:
            check_opened(model, "model")
            self.opened = model
            structure, self.tokenizer = model
        name, commit = model_name(structure)
        self.identity = MappedModel(
            model=name,
            revision=commit,
            weights_id=weights_id(structure),
            architecture=read_architecture(structure),
        )
        self.dtype = self._dtype(structure)
        config = decoder_config(structure)
        self.longest: int | None = getattr(config, "max_position_embeddings", None)
        self.embeddings = _embeddings(structure)

    @property
    def layers(self) -> tuple[int, ...]:
        """All decoder layers."""
        return tuple(range(len(self.identity.architecture.layers)))

    @property
    def width(self) -> int:
        """Dimensions of a state."""
        return self.identity.architecture.hidden_size

    def reader(self) -> Reader:
        """Reads texts as this model does."""
        return Reader(self.tokenizer, self.longest, self.embeddings)

    @contextmanager
    def ready(self) -> Iterator[nn.Module]:
        """The model in evaluation mode. One that was opened for this is let go of at the end."""
        if self.opened is not None:
            with evaluating(self.opened[0]):
                yield self.opened[0]
            return
        assert self._name is not None
        model, _ = load_model(self._name, **self._options)
        try:
            yield model
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _dtype(self, structure: nn.Module) -> str:
        asked = self._options.get("dtype")
        if self.opened is None and asked not in (None, "auto"):
            return str(asked).removeprefix("torch.")
        return str(next(structure.parameters()).dtype).removeprefix("torch.")


def _embeddings(model: nn.Module) -> int | None:
    """How many tokens the model knows."""
    known = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "num_embeddings", None)
    return known if isinstance(known, int) else None
