"""A source that has headers only: real names, dtypes and shapes, no bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dsv4.formats.config import ModelConfig
from dsv4.formats.inventory import DraftKind
from dsv4.formats.safetensors_header import TensorEntry
from tests.dialects.headers import Dialect, entry, official, stored_by


class HeaderSource:
    """Every tensor a real release has, one file per layer, with running offsets."""

    def __init__(
        self, config: dict[str, Any], draft: DraftKind, dialect: Dialect = official
    ) -> None:
        self.config = config
        self.entries: Mapping[str, TensorEntry] = self._entries(draft, dialect)

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

    def read(self, entry: TensorEntry) -> Tensor:
        raise AssertionError(f"planning read {entry.name}")

    def read_rows(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        raise AssertionError(f"planning read {entry.name}")

    def fingerprint(self) -> str:
        raise AssertionError("planning took a fingerprint")

    def description(self) -> dict[str, Any]:
        raise AssertionError("planning hashed the source")

    def aux_files(self) -> Mapping[str, Path]:
        return {}
