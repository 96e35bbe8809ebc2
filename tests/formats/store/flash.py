"""A store of V4-Flash's real plan, array for array, whose data files are sparse."""

from __future__ import annotations

import base64
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv4.convert.outputs.base import Output
from dsv4.convert.outputs.plain import PlainOutput
from dsv4.convert.outputs.results import Outcome, Result
from dsv4.convert.plan import Plan, make_plan
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.store.manifest import FileRecord
from dsv4.formats.store.specs import ArraySpec, FileSpec
from dsv4.formats.store.writer import StoreWriter
from tests.convert.header_source import HeaderSource
from tests.formats.store import packing
from tests.support.real_configs import FLASH

_MEASURED = Outcome(
    blocks=1 << 20,
    recoded_blocks=12345,
    loss={"rel_mse": 0.0071234567891234, "cosine": 0.9964567891234567, "amax": 0.1328125},
)


def plan() -> Plan:
    """The plan of the standard recipe for the preview release, with its MTP layer."""
    return make_plan(HeaderSource(FLASH, DraftKind.MTP), make_recipe("standard"))


def write_sparse(out: Path, flash: Plan) -> list[FileSpec]:
    """Write the store without data: every file a hole of its real size. -> its files.

    Checksums in the manifest are as long as real ones and mean nothing.
    """
    groups, arrays = _nodes(flash)
    files = [file for spec in arrays for file in spec.files()]
    with StoreWriter(out, packing.IDENTITY) as writer:
        _pretend_written(writer, files)
        writer.finish(groups, arrays, packing.manifest() | {"config": flash.config.to_dict()})
    return files


def _nodes(flash: Plan) -> tuple[dict[str, dict[str, Any]], list[ArraySpec]]:
    sources = {name: index for index, name in enumerate(flash.source_files)}
    groups: dict[str, dict[str, Any]] = {}
    arrays: list[ArraySpec] = []
    for output in flash.outputs:
        own = {"dsv4": output.attributes(_measured(output), sources)}
        if isinstance(output, PlainOutput):
            arrays += [dataclasses.replace(spec, attributes=own) for spec in output.arrays()]
        else:
            groups[output.path] = own
            arrays += output.arrays()
    return groups, arrays


def _measured(output: Output) -> list[Result]:
    return [Result((_MEASURED,) * len(unit.inputs)) for unit in output.units()]


def _pretend_written(writer: StoreWriter, files: Iterable[FileSpec]) -> None:
    journal = writer._journal
    assert journal is not None
    for file in files:
        path = writer.out / file.key
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            os.truncate(stream.fileno(), file.nbytes)
        digests = base64.b64encode(os.urandom(8 * file.chunks)).decode()
        journal.records[file.key] = FileRecord(
            file.nbytes, os.urandom(32).hex(), file.chunk_nbytes, digests
        )
