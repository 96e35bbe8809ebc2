"""Faults with every checksum, the Merkle root and the marker made to fit: a wrong packer's work."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dsv4.convert.sources.local import LocalSource
from dsv4.formats.numeric.layouts import dequantize, pack_nvfp4, unpack_nvfp4
from dsv4.formats.numeric.loss import Loss
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from dsv4.formats.store.specs import NODE_DOCUMENT
from tests.validate.mutations import Mutation
from tests.validate.scratch import Edit, Json, Scratch

W13, W2 = "layers/0/ffn/experts/w13", "layers/1/ffn/experts/w2"
E1 = "layers.0.ffn.experts.1.w1.weight"
DOWN = "layers.1.ffn.experts.2.w2.weight"
WQ_B, NORM, GATE = "layers/1/attn/wq_b", "layers/0/ffn_norm/weight", "layers/0/ffn/gate"
SOURCE = "the source's"


def sealed_faults(scratch: Scratch, source: Path) -> Iterator[Mutation]:
    """The catalogue; what needs a rounded matrix only where the store has one."""
    yield from _experts()
    yield from _bytes(scratch)
    yield from _claims(scratch)
    yield from _metadata()
    yield from _seen_without_the_source(scratch)
    if "head.weight" in scratch.store.contents.matrices:
        yield from _rounded(source)


def _sealed(
    name: str,
    named: str,
    plant: Callable[[Scratch], object] = lambda scratch: None,
    edit: Edit | None = None,
    check: str | None = None,
    seen: bool = False,
) -> Mutation:
    def apply(scratch: Scratch) -> None:
        plant(scratch)
        scratch.seal(edit)

    return Mutation(f"sealed: {name}", named, apply, check, seen)


Change = Callable[[NVFP4Tensor], NVFP4Tensor]


def _part(codes: Callable[[torch.Tensor], object], field: str = "codes") -> Change:
    """Changes one member of a part in place."""

    def change(part: NVFP4Tensor) -> NVFP4Tensor:
        codes(getattr(part, field))
        return part

    return change


def _swap_nibbles(x: torch.Tensor) -> None:
    x.copy_((x >> 4) | (x << 4))


def _negate_a_zero(codes: torch.Tensor) -> None:
    flat = codes.view(-1)
    at = int(((flat & 0xF) == 0).nonzero()[0])
    flat[at] |= 0x8


PARTS: dict[str, tuple[Change, str | None]] = {
    "nibble order": (_part(_swap_nibbles), None),
    "one code": (_part(lambda x: x[3, 3].bitwise_xor_(2)), None),
    "sign of a zero": (_part(_negate_a_zero), "inversion"),
    "rows of codes shifted": (_part(lambda x: x.copy_(x.roll(1, 0))), None),
    "columns of codes shifted": (_part(lambda x: x.copy_(x.roll(1, 1))), None),
    "scale rows shifted": (_part(lambda x: x.copy_(x.roll(1, 0)), "scales"), None),
    "scale columns shifted": (_part(lambda x: x.copy_(x.roll(1, 1)), "scales"), None),
    "one scale": (_part(lambda x: x[5, 2].bitwise_xor_(2), "scales"), None),
    "global scale doubled": (_part(lambda x: x.mul_(2), "global_scale"), None),
}


def _experts() -> Iterator[Mutation]:
    for (path, expert, name), (what, (change, check)) in (
        (place, item) for place in ((W13, 1, E1), (W2, 2, DOWN)) for item in PARTS.items()
    ):

        def plant(
            s: Scratch, path: str = path, expert: int = expert, change: Change = change
        ) -> None:
            s.repack(path, expert, lambda parts: [change(parts[0]), *parts[1:]])

        yield _sealed(f"{what} in {name}", name, plant, check=check)

    def swap_experts(s: Scratch) -> None:
        s.repack(W13, 1, list, source_expert=2)
        s.repack(W13, 2, list, source_expert=1)

    def unswizzle(s: Scratch) -> None:
        part = unpack_nvfp4(s.matrix(W2, 2))[0]
        raw = part.scales.contiguous().numpy().tobytes()
        s.poke(s.key(f"{W2}/scales"), 2 * len(raw), raw)

    yield _sealed("experts swapped", E1, swap_experts)
    yield _sealed("gate and up swapped", E1, lambda s: s.repack(W13, 1, lambda p: [p[1], p[0]]))
    yield _sealed("scales not swizzled", DOWN, unswizzle)


def _bytes(scratch: Scratch) -> Iterator[Mutation]:
    """Bytes of what is carried as it is, and of what travels along."""
    codes, scales = scratch.key(f"{WQ_B}/codes"), scratch.key(f"{WQ_B}/scales")
    name = "layers.1.attn.wq_b.weight"

    def shift(s: Scratch) -> None:
        raw = bytes(s.read(codes))
        s.poke(codes, 0, raw[64:8192] + raw[:64])

    def valid_expert(s: Scratch) -> None:
        key = s.key(f"{GATE}/tid2eid")
        s.poke(key, 0, bytes([(s.read(key)[0] + 1) % 4]))

    yield _sealed("FP8 code", name, lambda s: s.poke(codes, 70, b"\x11"), check="inversion")
    yield _sealed(
        "FP8 scale", name, lambda s: s.poke(scales, 0, bytes([s.read(scales)[0] + 1])), None
    )
    yield _sealed("FP8 rows shifted", name, shift)
    norm = scratch.key(NORM)
    yield _sealed("norm", "layers.0.ffn_norm", lambda s: s.poke(norm, 2, b"\x11\x3f"))
    yield _sealed("hash routing", "tid2eid", valid_expert)
    for asset in ("tokenizer.json", "LICENSE"):
        key = f"assets/{asset}"
        yield _sealed(asset, key, lambda s, k=key: s.poke(k, 0, b"{  "), check="assets")  # type: ignore[misc]


def _of(path: str, change: Callable[[Json], object]) -> Edit:
    """Edits the `dsv4` attribute of a node."""
    return lambda manifest, nodes: change(nodes[path]["attributes"]["dsv4"])


def _section(change: Callable[[Json], object]) -> Edit:
    """Edits the manifest."""
    return lambda manifest, nodes: change(manifest)


def _claims(scratch: Scratch) -> Iterator[Mutation]:
    """What is said of bytes that are right."""
    lineage = scratch.key(f"{W13}/lineage")

    def origin(s: Scratch) -> None:
        begin = struct.unpack_from("<q", s.read(lineage), 8)[0]
        s.poke(lineage, 8, struct.pack("<q", begin + 64))

    path = f"{WQ_B}"
    yield _sealed("lineage", "layers.0.ffn.experts.0.w1", origin, check="origin")
    edits: dict[str, tuple[str, str, Callable[[Json], object]]] = {
        "origin": (path, "origin", lambda own: own["sources"]["scale"].__setitem__(1, 8)),
        "no origin": (NORM, "origin", lambda own: own.pop("sources")),
        "zero": (path, "loss", lambda own: own.update(zero=True)),
        "exactness denied": (path, "loss", lambda own: own.update(exact=False)),
        "loss of a stack": (W2, "loss", lambda own: own.update(rel_mse=1e-9)),
    }
    for name, (node, check, change) in edits.items():
        named = node.replace("/", ".") if node != W2 else node
        yield _sealed(f"{name} of {node}", named, edit=_of(node, change), check=check)


def _metadata() -> Iterator[Mutation]:
    def shard(**entry: object) -> Edit:
        return _section(lambda m: m["source"]["files"][1].update(entry))

    def names(own: Json) -> None:
        own["names"].reverse()

    other = {"standard": "native", "native": "standard"}

    def recipe(manifest: Json) -> None:
        manifest["recipe"]["name"] = other[manifest["recipe"]["name"]]

    second = "model-00002-of-00004.safetensors"
    yield _sealed("hash of a source file", second, edit=shard(sha256="0" * 64), check="source")
    yield _sealed("size of a source file", second, edit=shard(bytes=7_000_000))
    yield _sealed("recipe", "head/codes", edit=_section(recipe), check="recipe")
    more = _section(lambda m: m["recipe"].update(name="nvfp4"))
    yield _sealed("recipe that rounds more", "wq_b/codes", edit=more)
    yield _sealed(
        "config", "config", edit=_section(lambda m: m["config"].update(rms_norm_eps=1e-3)),
        check="config",
    )  # fmt: skip
    yield _sealed("names of gate and up", E1, edit=_of(W13, names))
    yield _sealed(
        "interleave", E1, edit=_of(W13, lambda own: own["parameters"].update(interleave=4))
    )


def _seen_without_the_source(scratch: Scratch) -> Iterator[Mutation]:
    """What contradicts itself, or what no correct packer writes."""
    codes = scratch.key(f"{W13}/codes")
    scales, globals_ = scratch.key(f"{W13}/scales"), scratch.key(f"{W13}/global_scale")

    def seen(
        name: str,
        named: str,
        plant: Callable[[Scratch], object] = lambda scratch: None,
        edit: Edit | None = None,
        check: str | None = None,
    ) -> Mutation:
        return _sealed(name, named, plant, edit, check, seen=True)

    def drop(manifest: Json, nodes: Json) -> None:
        nodes.pop(NORM)
        manifest["files"].pop(scratch.key(NORM))

    def unsealed(s: Scratch) -> None:
        import json

        document = json.loads(s.read(NODE_DOCUMENT))
        document["attributes"]["dsv4"]["tool"] = "another"
        s.put(document, root=False)

    def file(**entry: object) -> Edit:
        return _section(lambda m: m["files"][codes].update(entry))

    digests = "A" * (len(scratch.store.records[codes].xxh3) - 1) + "="
    nan = struct.pack("<f", float("nan"))
    yield seen("NaN block scale", W13, lambda s: s.poke(scales, 9, b"\x7f"), check="values")
    yield seen("negative block scale", W13, lambda s: s.poke(scales, 9, b"\x84"))
    yield seen("NaN global scale", W13, lambda s: s.poke(globals_, 0, nan))
    yield seen("zero global scale", W13, lambda s: s.poke(globals_, 0, bytes(4)))
    fp8 = scratch.key(f"{WQ_B}/codes"), scratch.key(f"{WQ_B}/scales")
    yield seen("NaN FP8 code", WQ_B, lambda s: s.poke(fp8[0], 9, b"\xff"))
    yield seen("NaN FP8 scale", WQ_B, lambda s: s.poke(fp8[1], 1, b"\xff"))
    norm, table = scratch.key(NORM), scratch.key(f"{GATE}/tid2eid")
    yield seen("infinite norm", "ffn_norm", lambda s: s.poke(norm, 0, b"\x80\x7f"))
    yield seen("no such expert", "tid2eid", lambda s: s.poke(table, 0, b"\x63"))
    yield seen("counts", W13, edit=_of(W13, lambda own: own.update(blocks=5)), check="counts")
    accepted = _section(lambda m: m["recipe"].update(accepted_rounding=True))
    yield seen("rounding accepted for nothing", "manifest", edit=accepted, check="exact")
    zero = {"rounded_blocks": 0, "rel_mse": 0.0, "max_abs_error": 0.0}
    admitted = {E1: zero | {"rounded_blocks": 3}}
    yield seen(
        "rounding that did not happen", E1, edit=_of(W13, lambda o: o.update(inexact=admitted))
    )
    nobody = _of(W13, lambda own: own.update(inexact={"layers.0.ffn.experts.9.w1.weight": zero}))
    yield seen("rounding of nobody", W13, edit=nobody)
    yield seen("malformed admission", W13, edit=_of(W13, lambda own: own.update(inexact=[E1])))
    yield seen("recoded", W13, edit=_of(W13, lambda own: own.update(recoded_blocks=999)))
    yield seen("BLAKE3", codes, edit=file(blake3="0" * 64), check="hashes")
    yield seen("XXH3", codes, edit=file(xxh3=digests), check="checksums")
    yield seen("size", codes, edit=file(bytes=5))
    yield seen("layout id", W13, edit=_of(W13, lambda own: own.update(layout="fp8.block128")))
    yield seen("unknown layout", W13, edit=_of(W13, lambda own: own.update(layout="other")))
    yield seen("slabs", W13, edit=_of(W13, lambda own: own["parameters"].update(slabs=2)))
    yield seen(
        "layouts", "nvfp4", edit=_section(lambda m: m["layouts"].pop("nvfp4.kmajor.sf32x4x4")),
        check="layouts",
    )  # fmt: skip
    yield seen(
        "tensor removed", "layers.0.ffn_norm.weight", lambda s: s.remove(norm), drop, "inventory"
    )
    renamed = _of(NORM, lambda own: own.update(names=["layers.0.other.weight"]))
    yield seen("tensor renamed", "layers.0.other.weight", edit=renamed)
    yield Mutation("manifest without its root", "manifest", unsealed, "root")


def _rounded(source: Path) -> Iterator[Mutation]:
    def worse(s: Scratch) -> NVFP4Tensor:
        part = unpack_nvfp4(s.matrix("head", None))[0]
        part.codes[7, 7] = 0
        return part

    def honest(s: Scratch) -> None:
        """The loss that is recorded is that of the worse rounding."""
        packed = pack_nvfp4([worse(s)])
        s.place("head", None, packed)
        opened = LocalSource(source)
        loss = Loss()
        original = opened.read(opened.entries["head.weight"]).float()
        loss.add(original, dequantize(packed))
        s.seal(_of("head", lambda own: own.update(loss=loss.to_dict())))

    padding = f"{GATE}/scales"
    yield Mutation("sealed: worse rounding, admitted", "head.weight", honest, "optimum", False)
    yield _sealed(
        "worse rounding", "head.weight", lambda s: s.place("head", None, pack_nvfp4([worse(s)]))
    )
    for figure in ("rel_mse", "cosine", "amax"):
        change = _of("head", lambda own, f=figure: own["loss"].update({f: 0.5}))  # type: ignore[misc]
        yield _sealed(f"recorded {figure}", "head.weight", edit=change, check="loss")
    yield _sealed("no recorded loss", "head.weight", edit=_of("head", lambda own: own.pop("loss")))
    yield _sealed(
        "padding", GATE, lambda s: s.poke(s.key(padding), 16 * 20, b"\x38"), check="values",
        seen=True,
    )  # fmt: skip
