"""The engine that runs a store, as the command line wants it."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import dsv4
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import DraftRefusal, RuntimeRefusal
from dsv4.formats.store.text_files import stored_text_files
from dsv4.runtime.text.drafting import Wish
from dsv4.runtime.text.tokenizer import Text
from dsv4.serve.engine import PREFIX_BYTES, Options, ServeEngine, backend_of
from dsv4.serve.prefix_files import PrefixFiles
from dsv4.serve.record import LOG
from dsv4.serve.remembering import MemoryOptions
from dsv4.serve.scheduler import Sharing

if TYPE_CHECKING:
    from dsv4.runtime.gpu.model import GpuModel
    from dsv4.runtime.model import Model
    from dsv4.runtime.startup_clock import Mark

CACHE_BYTES = 32 << 30
USER = "<｜User｜>"  # begins a user's turn in every prompt of the model


@dataclasses.dataclass(frozen=True)
class Wanted:
    """device: for `dsv4.load`. slots: sequences at a time. max_seq_len: tokens of one, None for
    the runtime's own. queue: most jobs that wait, None for four a slot. max_pause: seconds that an
    answer may stand still because of somebody's prompt. prefix_bytes: of host memory for beginnings
    of prompts. cache_dir: where they outlive the process, in at most `cache_bytes`. reproducible:
    whether a prompt gives the same bytes however much of it was known. experts, routes: for
    `dsv4.load`; count: whether what tokens chose is added to that file when the engine is closed.
    draft: tokens that are guessed ahead: as it pays, never, or so many.
    """

    device: str
    slots: int = 1
    max_seq_len: int | None = None
    queue: int | None = None
    max_pause: float = 0.2
    prefix_bytes: int = PREFIX_BYTES
    cache_dir: Path | None = None
    cache_bytes: int = CACHE_BYTES
    reproducible: bool = False
    experts: Literal["auto", "resident"] | int = "auto"
    routes: Path | None = None
    count: bool = True
    draft: Wish = "auto"


def make_engine(packed: PackedCheckpoint, wanted: Wanted, mark: Mark) -> ServeEngine:
    """Load the weights of `packed` and run them. mark: called with the name of each phase when it
    ends. Raises StoreError, RuntimeRefusal, KernelError or OutOfSpaceError.
    """
    files = None if wanted.cache_dir is None else _files(wanted.cache_dir, wanted.cache_bytes)
    try:
        model = _load(packed, wanted, mark)
        backend = backend_of(model, wanted.slots, wanted.max_seq_len)
    except BaseException:
        if files is not None:
            files.close()
        raise
    options = Options(
        queue=wanted.queue,
        prefix_bytes=wanted.prefix_bytes,
        root=bytes.fromhex(packed.store.manifest["root"]),
        draft=wanted.draft,
        sharing=Sharing(max_pause=wanted.max_pause),
        memory=MemoryOptions(wanted.reproducible, turn_id=_turn_id(packed), log=_log),
    )

    def ended() -> None:
        if wanted.count:
            model.write_routes(wanted.routes)

    return ServeEngine(backend, options, files, ended=ended)


def _load(packed: PackedCheckpoint, wanted: Wanted, mark: Mark) -> Model | GpuModel:
    """With draft layers on the CPU; the GPU's sequences are drafted for by prompt lookup."""
    load = functools.partial(
        dsv4.load,
        packed,
        device=wanted.device,
        experts=wanted.experts,
        routes=wanted.routes,
        max_seq_len=wanted.max_seq_len,
        slots=wanted.slots,
        mark=mark,
    )
    try:
        return load(drafts=wanted.device == "cpu" and wanted.draft not in ("off", 0))
    except DraftRefusal as error:
        if wanted.draft != "auto":
            raise
        LOG.warning(json.dumps({"event": "draft", "note": str(error)}))
        return load(drafts=False)


def _files(place: Path, limit: int) -> PrefixFiles:
    try:
        return PrefixFiles(place, limit, _log)
    except OSError as error:
        raise RuntimeRefusal(
            f"--cache-dir {place} cannot be used: {error.strerror or error}; give a directory that "
            "can be written to"
        ) from None


def _turn_id(packed: PackedCheckpoint) -> int | None:
    """The token that begins a user's turn; None where the tokenizer has no single one."""
    tokenizer = stored_text_files(packed).tokenizer
    ids = [] if tokenizer is None else Text(tokenizer).encode(USER)
    return ids[0] if len(ids) == 1 else None


def _log(line: str) -> None:
    LOG.info(json.dumps({"event": "prefix", "note": line}))
