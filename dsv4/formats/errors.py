"""Every error dsv4 raises on purpose. Each message is one sentence a user can act on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Dsv4Error(Exception):
    """Base of all errors of dsv4. The command line prints the message without a traceback."""

    exit_code = 2


class ConfigError(Dsv4Error):
    """The model configuration is missing a field, contradicts itself, or is not DeepSeek-V4."""


class MissingExtraError(Dsv4Error):
    """What was asked for needs an extra of dsv4 that is not installed."""


class SourceError(Dsv4Error):
    """The source checkpoint is malformed, incomplete, or holds something unexplained."""


class NetworkError(SourceError):
    """The hub, or the way to it, does not answer: worth trying again, unlike a wrong name."""

    exit_code = 4


class ChangedSourceError(SourceError):
    """What was read of the source is not what it is, or was: output made from it is dropped."""

    def __init__(self, file: str, message: str) -> None:
        super().__init__(message)
        self.file = file

    def __reduce__(self) -> tuple[type[ChangedSourceError], tuple[str, str]]:
        return type(self), (self.file, str(self))


class FormatError(Dsv4Error):
    """Values cannot be represented as asked: non-finite input, wrong dtype, wrong shape."""


class ExactnessError(Dsv4Error):
    """A tensor that the recipe carries exactly cannot be, and nobody accepted that."""


class StoreError(Dsv4Error):
    """A packed store is unfinished, damaged, or of another format version."""


class NoStoreError(StoreError):
    """What was given is not a packed store at all: no directory, a file, or a checkpoint."""


class ConflictError(Dsv4Error):
    """The output directory belongs to another conversion, or another process holds it."""


class OtherConversionError(ConflictError):
    """The directory holds an unfinished conversion of another source, recipe or tool.

    begun, now: the identity in its journal and the one that was asked for, JSON objects.
    """

    def __init__(self, message: str, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.begun = begun
        self.now = now


class RuntimeRefusal(Dsv4Error):
    """The runtime cannot do what was asked: device, capacity, or token id out of range."""


class DraftRefusal(RuntimeRefusal):
    """A store's draft layers cannot be used; without them the model gives the same text."""


class QueueFull(Dsv4Error):
    """An engine has as many waiting sequences as it takes; worth trying again later."""


class KernelError(Dsv4Error):
    """A GPU kernel is missing, stale, made for another device, or cannot be compiled."""


class ClusterError(Dsv4Error):
    """The cluster of `--scheduler` does not answer, has no workers, or keeps losing them."""


class OutOfSpaceError(Dsv4Error):
    """Disk or memory cannot hold what the plan needs, or ran out while writing."""

    exit_code = 3
