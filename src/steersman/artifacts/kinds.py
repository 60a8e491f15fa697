"""Kinds of artifacts: each one's name, words, version and what its manifest holds, by version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COMMON = frozenset(
    {
        "format",
        "format_version",
        "kind",
        "tool_version",
        "model",
        "architecture",
        "made_from",
        "evidence",
        "tensors_sha256",
        "manifest_sha256",
    }
)
"""What every manifest holds."""


@dataclass(frozen=True)
class Kind:
    """A kind of artifact.

    Attributes:
        name: As manifests say it: `routing_contrast`.
        words: As people say it: "a routing contrast".
        keys: {format version: what a manifest of it holds beside what all hold}; the newest is written.
        chats: The first version that says of each model how its chats were rendered; None for a kind that has
            read nothing.
    """

    name: str
    words: str
    keys: Mapping[int, frozenset[str]]
    chats: int | None = None

    @property
    def version(self) -> int:
        """The version that is written; older ones are read."""
        return max(self.keys)

    def keys_of(self, version: int) -> frozenset[str]:
        """All that a manifest of this version holds."""
        return COMMON | self.keys[version]


KINDS: dict[str, Kind] = {}
"""Every kind by its name: those whose file in this room has been imported, which the room's face does."""


def register(name: str, words: str, keys: Mapping[int, set[str]], chats: int | None = None) -> Kind:
    """Make a kind known, with the keys of each of its versions beside those that all have."""
    KINDS[name] = Kind(name, words, {version: frozenset(more) for version, more in keys.items()}, chats)
    return KINDS[name]
