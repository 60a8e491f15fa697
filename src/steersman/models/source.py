"""Where transformers finds a model: a folder or a name on the Hub, and in it perhaps a GGUF file."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from steersman.models.gguf_models import (
    GGUF,
    Dequantised,
    GgufName,
    check_read,
    dequantised,
    gguf_name,
    readable,
)
from steersman.models.identity import NAME
from steersman.models.stored_tensors import GgufFile, check_folder


@dataclass(frozen=True)
class Source:
    """A model by its name, and where it is."""

    name: str
    place: str
    gguf: GgufName | None
    revision: str | None

    @classmethod
    def of(cls, name: str, revision: str | None) -> Source:
        """Raises ModelError where the files that are at hand cannot be read."""
        gguf = gguf_name(name)
        source = cls(name, name if gguf is None else gguf.place, gguf, revision)
        if gguf is not None:
            readable(gguf, revision)
        elif exists(name):
            check_folder(Path(name))
        return source

    @property
    def options(self) -> dict[str, Any]:
        """For transformers' `from_pretrained`."""
        return {"revision": self.revision, **({"gguf_file": self.gguf.file} if self.gguf else {})}

    def config(self, **options: Any) -> PretrainedConfig:
        """Its configuration. Raises ModelError where that is not all that its file says."""
        config: PretrainedConfig = AutoConfig.from_pretrained(
            self.place, trust_remote_code=False, **self.options, **options
        )
        if (file := self._file()) is not None:
            check_read(file, config)
        return config

    def mark(self, model: PreTrainedModel) -> None:
        """Let a model of a GGUF file say which."""
        if (file := self._file()) is not None:
            setattr(model, NAME, self.name)
            setattr(model, GGUF, Dequantised.of(file, model))

    def tell(self, model: PreTrainedModel) -> None:
        """Warn where a model's weights were dequantised, or settings of its file are not read."""
        if (made := dequantised(model)) is None:
            return
        said = []
        if made["from"]:
            said.append(
                f"its weights in {', '.join(made['from'])} are dequantised to {made['to']}; answers can "
                "differ from those of engines that compute with the quantised ones"
            )
        if made["not_read"]:
            said.append(f"transformers does not read {', '.join(made['not_read'])}")
        if said:
            warnings.warn(f"{self.name}: {'; '.join(said)}", stacklevel=3)

    def _file(self) -> GgufFile | None:
        return None if self.gguf is None else readable(self.gguf, self.revision)


def exists(name: str) -> bool:
    """Whether a name is that of a file or folder here."""
    try:
        return Path(name).exists()
    except OSError:  # a name that no file system takes
        return False
