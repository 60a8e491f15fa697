"""Manifests: what every artifact says of itself, checked by their own hash."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from steersman.artifacts.evidence import read_evidence
from steersman.artifacts.fields import blaming, exact_keys, mapping, one_line, one_of, text_in, whole
from steersman.artifacts.folder import MANIFEST
from steersman.artifacts.hub import resolve
from steersman.artifacts.kinds import KINDS, Kind
from steersman.chat_record import ChatRecord, to_json
from steersman.errors import ArtifactError
from steersman.limits import Router
from steersman.stand_ins import stand_in_at
from steersman.steering import Architecture, sha256_of

FORMAT = "steersman"
_MOST_EXPERTS = 1 << 20
"""Far above any router there is: what a manifest says must not make the reader allocate without bound."""


class OfModel(Protocol):
    """What belongs to one model, and says which."""

    @property
    def architecture(self) -> Architecture: ...
    @property
    def weights_id(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str | None: ...


def read_manifest(source: str | Path) -> dict[str, Any]:
    """The manifest of an artifact of any kind, in a folder or on the Hub, checked by its own hash.

    Raises `ArtifactError`.
    """
    path = resolve(source, None) / MANIFEST
    manifest = parse(path)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f'{path}: not a Steersman artifact ("format" is not "{FORMAT}")')
    with blaming(path):
        version_ = whole(manifest.get("format_version"), "format_version")
        # A kind that only a newer tool knows may come with a newer version: that is the news then.
        known = KINDS.get(str(manifest.get("kind")))
        newest = max(kind.version for kind in KINDS.values()) if known is None else known.version
        if version_ > newest:
            raise ArtifactError(
                f"format version {version_} is newer than this tool reads ({newest}): upgrade steersman"
            )
        if version_ < 1:
            raise ArtifactError("format_version is 0; the first is 1")
        kind = KINDS[one_of(manifest.get("kind"), "kind", tuple(KINDS))]
        exact_keys(manifest, kind.keys_of(version_), "the manifest")
        claimed = manifest["manifest_sha256"]
        content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
        if sha256_of(content) != claimed:
            raise ArtifactError("the manifest does not match its own sha256: it was changed or damaged")
        text_in(manifest["tool_version"], "tool_version")
        read_evidence(manifest["evidence"], in_brief=kind.name == "steering" and version_ > 2)
    return manifest


def manifest_of(kind: Kind, artifact: OfModel, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """What all manifests hold, but for the hashes, which come when it is written."""
    return {
        "format": FORMAT,
        "format_version": kind.version,
        "kind": kind.name,
        "tool_version": version("steersman"),
        **model_json(artifact, chats=kind.chats is not None),
        "made_from": dict(made_from),
        "evidence": [],
    }


def model_json(artifact: OfModel, *, chats: bool = True) -> dict[str, Any]:
    """Which model something belongs to, and how its `chats` were rendered: what `read_model` reads."""
    architecture = artifact.architecture
    return {
        "model": {
            "name": artifact.model,
            "revision": artifact.revision,
            "architecture_id": architecture.id,
            "weights_id": artifact.weights_id,
            **({"chat": to_json(getattr(artifact, "chat", None))} if chats else {}),
        },
        "architecture": {
            "model_type": architecture.model_type,
            "hidden_size": architecture.hidden_size,
            "layers": [None if router is None else _router_json(router) for router in architecture.layers],
        },
    }


def _router_json(router: Router) -> dict[str, Any]:
    return {
        "rule": router.rule,
        "experts": router.experts,
        "top_k": router.top_k,
        "groups": None if router.groups is None else list(router.groups),
        "shared_experts": router.shared_experts,
        "reason": router.reason,
    }


def read_model(facts: Mapping[str, Any], kind: Kind, version: int) -> dict[str, Any]:
    """Which model a manifest of this kind and version, or a part of it, is of: `architecture`, `weights_id`,
    `model`, `revision`, and how its chats were rendered (`chat`; None in older versions, which do not say)
    for kinds that say it. Raises `ArtifactError`.
    """
    model = facts["model"]
    says_chat = kind.chats is not None and version >= kind.chats
    keys = {"name", "revision", "architecture_id", "weights_id"}
    exact_keys(model, keys | {"chat"} if says_chat else keys, "model")
    for key in ("name", "architecture_id", "weights_id"):
        text_in(model[key], f"model.{key}")
    if model["revision"] is not None:
        text_in(model["revision"], "model.revision")
    architecture = _read_architecture(facts["architecture"])
    if architecture.id != model["architecture_id"]:
        raise ArtifactError("the architecture id does not fit the architecture")
    return {
        "architecture": architecture,
        "weights_id": model["weights_id"],
        "model": model["name"],
        "revision": model["revision"],
        **({} if kind.chats is None else {"chat": _read_chat(model["chat"]) if says_chat else None}),
    }


def _read_chat(chat: Any) -> ChatRecord | None:
    if chat is None:
        return None
    exact_keys(chat, {"template_sha256", "arguments", "date"}, "model.chat")
    if not re.fullmatch("[0-9a-f]{64}", text_in(chat["template_sha256"], "model.chat.template_sha256")):
        raise ArtifactError("model.chat.template_sha256 is not a sha256")
    if chat["date"] is not None and not re.fullmatch(
        r"\d{4}-\d\d-\d\d", text_in(chat["date"], "model.chat.date"), re.ASCII
    ):
        raise ArtifactError("model.chat.date is not YYYY-MM-DD")
    return ChatRecord(
        chat["template_sha256"], mapping(chat["arguments"], "model.chat.arguments"), chat["date"]
    )


def _read_architecture(facts: Any) -> Architecture:
    exact_keys(facts, {"model_type", "hidden_size", "layers"}, "architecture")
    if not isinstance(facts["layers"], list):
        raise ArtifactError("architecture.layers is not a list")
    return Architecture(
        model_type=text_in(facts["model_type"], "architecture.model_type"),
        hidden_size=whole(facts["hidden_size"], "architecture.hidden_size"),
        layers=tuple(
            None if entry is None else _read_router(layer, entry)
            for layer, entry in enumerate(facts["layers"])
        ),
    )


def _read_router(layer: int, entry: Any) -> Router:
    name = f"architecture.layers[{layer}]"
    exact_keys(entry, {"rule", "experts", "top_k", "groups", "shared_experts", "reason"}, name)
    experts = whole(entry["experts"], f"{name}.experts", most=_MOST_EXPERTS)
    top_k = whole(entry["top_k"], f"{name}.top_k", most=experts)
    groups = entry["groups"]
    if groups is not None:
        if not isinstance(groups, list) or len(groups) != 2:
            raise ArtifactError(f"{name}.groups is not a pair of whole numbers")
        groups = (whole(groups[0], f"{name}.groups"), whole(groups[1], f"{name}.groups"))
    reason = None if entry["reason"] is None else text_in(entry["reason"], f"{name}.reason")
    if reason is None:
        if top_k < 1:
            raise ArtifactError(f"{name}.top_k is 0")
        if groups is not None and (not 0 < groups[1] <= groups[0] or experts % groups[0]):
            raise ArtifactError(f"{name}.groups does not divide its experts")
    return Router(
        layer=layer,
        experts=experts,
        top_k=top_k,
        rule=text_in(entry["rule"], f"{name}.rule"),
        groups=groups,
        shared_experts=whole(entry["shared_experts"], f"{name}.shared_experts"),
        reason=reason,
    )


def parse(path: Path) -> dict[str, Any]:
    try:
        if (instead := stand_in_at(path)) is not None:
            raise ArtifactError(f"{path}: {instead}")
        if not path.is_file():
            report = (
                "; its report.html says what was found" if (path.parent / "report.html").is_file() else ""
            )
            raise ArtifactError(
                f"{path.parent}: no artifact there (a folder with {MANIFEST} is expected){report}"
            )
        value = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=_no_constant
        )
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: not a JSON object")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
