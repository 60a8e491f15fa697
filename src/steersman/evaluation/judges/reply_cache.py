"""What a judge behind an endpoint has replied, kept on disk by the sha256 of the request."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steersman.steering import sha256_of


@dataclass(frozen=True)
class ReplyCache:
    """A folder of replies. A damaged file counts as not there, and one that cannot be written is left out."""

    folder: Path

    def get(self, request: Mapping[str, Any]) -> str | None:
        """The reply to a request."""
        try:
            kept = json.loads(self._file(request).read_bytes())
            return str(kept["reply"]) if kept["request"] == request else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def put(self, request: Mapping[str, Any], reply: str) -> None:
        """Keep a reply. Whole files only: another process may be reading."""
        file = self._file(request)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=file.parent, prefix=".new-")
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump({"request": request, "reply": reply}, stream)
            Path(draft).replace(file)
        except OSError:
            return

    def _file(self, request: Mapping[str, Any]) -> Path:
        key = sha256_of(request)
        return self.folder / key[:2] / f"{key}.json"
