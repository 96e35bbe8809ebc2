"""Structure from the metadata alone: is it what was packed, and is it the model's?

`integrity` knows files and the Merkle root. Here is what only the model knows: which tensors must
exist and in what shape. `content` reads the bytes.
"""

from __future__ import annotations

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import Dsv4Error, StoreError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import detect_draft, parameters
from dsv4.formats.store import integrity
from dsv4.formats.store.damage import sizes
from dsv4.formats.store.text_files import stored_text_files
from dsv4.validate.checks.coherence import check_layouts
from dsv4.validate.provenance import describe
from dsv4.validate.report import Report


def check_metadata(packed: PackedCheckpoint, report: Report) -> None:
    """Merkle root, node documents, sizes, strangers, and the model's inventory of tensors."""
    store = packed.store
    if store.absent is not None:
        sentence = store.absent.sentence(store.root)
        report.notices.append(f"{sentence}; the verdict is on what is here")
    try:
        report.root = integrity.check_root(store)
    except Dsv4Error as error:
        report.add("root", "manifest", str(error))
    report.count("Merkle root")
    faults = [
        *sizes(store.root, store.files_under(None)),
        *integrity.node_faults(store),
        *integrity.unlisted(store),
    ]
    for fault in faults:
        report.add("files", fault.key, fault.problem)
        report.damaged |= fault.repairable
    if foreign := integrity.foreign(store):
        first = ", ".join(sorted(foreign)[:3]) + (", ..." if len(foreign) > 3 else "")
        count = "1 file is" if len(foreign) == 1 else f"{len(foreign)} files are"
        report.notices.append(f"{count} not the store's and no part of the verdict: {first}")
    report.count("files present at their size", len(store.files_under(None)))
    _check_inventory(packed, report)
    _check_text_files(packed, report)
    check_layouts(store, report)
    describe(packed, report)


def _check_text_files(packed: PackedCheckpoint, report: Report) -> None:
    """The tokenizer and the generation settings are what `run` can use."""
    try:
        stored_text_files(packed)
    except StoreError as error:
        report.add("text", "assets", str(error))
    report.count("text files read")


def _check_inventory(packed: PackedCheckpoint, report: Report) -> None:
    """Nothing missing, nothing extra, every shape as the model config implies."""
    names = packed.names()
    config: ModelConfig = packed.config
    try:
        draft, stages = detect_draft(names)
        expected = {
            parameter.name: parameter.shape for parameter in parameters(config, draft, stages)
        }
    except Dsv4Error as error:
        report.add("inventory", "tensors", str(error))
        return
    for name in sorted(expected.keys() - set(names)):
        report.add("inventory", name, "the model config implies this tensor, it is missing")
    for name in sorted(set(names) - expected.keys()):
        report.add("inventory", name, "the model config does not explain this tensor")
    for name in sorted(expected.keys() & set(names)):
        found = packed.shape(name)
        if found != expected[name]:
            report.add("inventory", name, f"has shape {found}, expected {expected[name]}")
    report.count("tensors of the model's inventory", len(expected))
