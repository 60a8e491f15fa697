"""What Inspect AI finds by the entry point `inspect_ai`: the name of the provider, without loading torch."""

from __future__ import annotations

from typing import Any

from inspect_ai.model import modelapi


@modelapi(name="steersman")
def steersman() -> type[Any]:
    """The provider of `--model steersman/MODEL`."""
    from steersman.harnesses.inspect_model import SteersmanAPI

    return SteersmanAPI
