"""Structure without the source: does the store hold what it says, and can the values be right?

`integrity` knows files, checksums and the Merkle root. Here is what only the model knows: which
tensors must exist and in what shape, and which byte values no correct packer writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.config import ModelConfig
from dsv4.formats.errors import Dsv4Error
from dsv4.formats.inventory import detect_draft, parameters
from dsv4.formats.layouts import LAYOUTS, pack_nvfp4, unpack_nvfp4
from dsv4.formats.matrices import NVFP4_BLOCK, NVFP4_K_ALIGN, SF_ROWS, Matrix, Nvfp4Matrix
from dsv4.formats.store import integrity
from dsv4.formats.store.contents import QuantizedGroup
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.schema import ELEMENTS
from dsv4.validate.provenance import add_scales, describe, quantized_groups, said_exact
from dsv4.validate.report import Report

E4M3_NAN = 0x7F
E4M3_SIGN = 0x80
E8M0_NAN = 0xFF
HASH_BLOCK = 8 << 20


def check_metadata(packed: PackedCheckpoint, report: Report) -> None:
    """Merkle root, node documents, sizes, strangers, and the model's inventory of tensors."""
    store = packed.store
    try:
        report.root = integrity.check_root(store)
    except Dsv4Error as error:
        report.add("root", "manifest", str(error))
    report.count("Merkle root")
    faults = [
        *integrity.sizes(store.root, store.files_under(None)),
        *integrity.node_faults(store),
        *integrity.unlisted(store),
    ]
    for fault in faults:
        report.add("files", fault.key, fault.problem)
    report.count("files present at their size", len(store.files_under(None)))
    _check_inventory(packed, report)
    _check_layouts(store, report)
    describe(packed, report)


def check_content(packed: PackedCheckpoint, report: Report) -> None:
    """Every byte: chunk checksums, file hashes, and values that no correct packer writes."""
    store = packed.store
    damaged = set()
    for fault in integrity.damage(store):
        if fault.key not in store.records:
            continue  # `check_metadata` has said so
        if fault.key not in damaged:
            where = fault.key if fault.chunk is None else f"{fault.key}, chunk {fault.chunk}"
            report.add("checksums", where, fault.problem)
        damaged.add(fault.key)
    files = store.files_under(None)
    report.count("chunk checksums", sum(file.chunks for file in files))
    for file in files:
        if file.key not in damaged:
            report.bytes_read += file.nbytes
            if _sha256(store, file.key) != store.records[file.key].sha256:
                report.add("hashes", file.key, "its SHA-256 is not the manifest's")
    report.count("file hashes", len(files))
    if not damaged:
        _check_values(packed, report)


def _sha256(store: PackedStore, key: str) -> str:
    digest = hashlib.sha256()
    with (store.root / key).open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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


def _check_layouts(store: PackedStore, report: Report) -> None:
    """The manifest describes the layouts that are used, with the parameters they have."""
    used = {str(group.attributes["layout"]) for group in quantized_groups(store)}
    described = store.manifest["layouts"]
    report.count("layouts described", len(used))
    for layout in sorted(used):
        found = described.get(layout)
        if not isinstance(found, dict) or found.keys() != LAYOUTS[layout].parameters.keys():
            report.add("layouts", layout, "is used, but not described with its parameters")


def _check_counts(store: PackedStore, group: QuantizedGroup, report: Report) -> None:
    """A stack's counts are the sums of its experts'."""
    lineage = store.array(f"{group.path}/lineage").tensor()
    recoded, rounded = (int(lineage[..., column].sum()) for column in (6, 7))
    blocks = group.packed_rows * -(-group.cols // NVFP4_BLOCK) * (group.experts or 0)
    expected = {
        "blocks": blocks if group.format == "nvfp4" else 0,
        "recoded_blocks": recoded,
        "rounded_blocks": rounded,
        "exact": rounded == 0,
    }
    report.count("stacks whose counts add up")
    for what, value in expected.items():
        if (said := group.attributes.get(what)) != value:
            report.add("counts", group.path, f"{what} is said to be {said}, its experts: {value}")


def _check_values(packed: PackedCheckpoint, report: Report) -> None:
    store = packed.store
    report.said_exact = said_exact(store)
    for group in quantized_groups(store):
        for what, ok in _group_values(store, group):
            report.count("value ranges")
            if not ok:
                report.add("values", group.path, what)
        if group.format == "nvfp4":
            add_scales(store, group, report)
        if group.experts and f"{group.path}/lineage" in store.hierarchy.arrays:
            _check_counts(store, group, report)
    for name, path in store.contents.plain.items():
        tensor = store.array(path).tensor()
        report.count("value ranges")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            report.add("values", name, "holds NaN or infinity")
        if name.endswith(".tid2eid") and not _in_range(tensor, packed.config.n_routed_experts):
            report.add("values", name, "names an expert that does not exist")


def _group_values(store: PackedStore, group: QuantizedGroup) -> Iterator[tuple[str, bool]]:
    """-> (what would be wrong, whether all is right) for each check of one group."""
    if group.format == "plain":
        stack = store.stack(group)
        whole = all(bool(stack.weights.row(e).isfinite().all()) for e in range(group.experts or 0))
        yield "its weights hold NaN or infinity", whole
        return
    if group.format == "fp8":
        codes = _raw(store, f"{group.path}/codes")
        yield "its codes hold E4M3 NaN", not bool(((codes & E4M3_NAN) == E4M3_NAN).any())
        spec = store.hierarchy.arrays[f"{group.path}/scales"]
        if spec.element == "e8m0":
            scales = _raw(store, spec.path)
            yield "its scales hold E8M0 NaN", not bool((scales == E8M0_NAN).any())
        else:
            values = store.array(spec.path).tensor().to(torch.float32)
            yield "its scales are not finite and positive", _positive(values)
        return
    scales = _raw(store, f"{group.path}/scales")
    nan = (scales & E4M3_NAN) == E4M3_NAN
    yield "its block scales hold NaN", not bool(nan.any())
    yield "its block scales hold a negative value", not bool((scales & E4M3_SIGN).any())
    global_scale = store.array(f"{group.path}/global_scale").tensor()
    yield "its global scales are not finite and positive", _positive(global_scale)
    if group.packed_rows % SF_ROWS or group.cols % NVFP4_K_ALIGN:
        yield "its padding is not zero", all(map(_is_padded, _matrices(store, group)))


def _matrices(store: PackedStore, group: QuantizedGroup) -> Iterator[Matrix]:
    if group.experts is None:
        yield store.matrix(group.names[0])
    else:
        stack = store.stack(group)
        yield from (stack.matrix(expert) for expert in range(group.experts))


def _is_padded(matrix: Matrix) -> bool:
    """Whether what the layout adds to an NVFP4 matrix is zero."""
    assert isinstance(matrix, Nvfp4Matrix)
    slabs = matrix.codes.shape[0]
    packed = pack_nvfp4(unpack_nvfp4(matrix), slabs=slabs, interleave=matrix.interleave)
    return torch.equal(packed.codes, matrix.codes) and torch.equal(packed.scales, matrix.scales)


def _raw(store: PackedStore, path: str) -> Tensor:
    """All bytes of a one-byte array, in whatever order."""
    assert ELEMENTS[store.hierarchy.arrays[path].element].nbytes == 1
    files = store.array(path).spec.files()
    views = [store.map_file(file).view(0, file.payload_nbytes) for file in files]
    return views[0] if len(views) == 1 else torch.cat(views)


def _positive(values: Tensor) -> bool:
    return bool((values.isfinite() & (values > 0)).all())


def _in_range(tensor: Tensor, experts: int) -> bool:
    return bool(((tensor >= 0) & (tensor < experts)).all())
