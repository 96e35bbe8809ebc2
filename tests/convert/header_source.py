"""A source that has headers only: real names, dtypes and shapes, no bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from dsv4.convert.sources.base import ByteStream, Source
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.safetensors_header import TensorEntry
from tests.formats.model.headers import Dialect, entry, official, stored_by


class HeaderSource(Source):
    """Every tensor a real release has, one file per layer, with running offsets."""

    def __init__(
        self, config: dict[str, Any], draft: DraftKind, dialect: Dialect = official
    ) -> None:
        self.config = config
        self.entries = self._entries(draft, dialect)
        ends: dict[str, int] = {}
        for found in self.entries.values():
            ends[found.file] = max(ends.get(found.file, 0), found.end)
        self.sizes = dict(sorted(ends.items()))

    def _entries(self, draft: DraftKind, dialect: Dialect) -> dict[str, TensorEntry]:
        entries: dict[str, TensorEntry] = {}
        ends: dict[str, int] = {}
        for tensor in stored_by(ModelConfig.from_hf(self.config), draft, dialect=dialect):
            parts = tensor.name.split(".")
            stem = "-".join(parts[:2]) if parts[0] in ("layers", "mtp") else "rest"
            file = f"model-{stem}.safetensors"
            entries[tensor.name] = entry(tensor, ends.get(file, 8), file)
            ends[file] = entries[tensor.name].end
        return entries

    def read_into(self, file: str, position: int, view: memoryview, what: str) -> None:
        raise AssertionError(f"planning read {what}")

    def stream(self, file: str) -> contextlib.AbstractContextManager[ByteStream]:
        raise AssertionError(f"planning read {file}")

    def fingerprint(self) -> str:
        raise AssertionError("planning took a fingerprint")

    def description(self, sha256: Mapping[str, str]) -> dict[str, Any]:
        raise AssertionError("planning hashed the source")

    def aux_files(self) -> Mapping[str, bytes]:
        return {}
