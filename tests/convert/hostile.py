"""Hostile checkpoints: a catalogue of what a download can do to whoever converts it.

Each entry damages a valid small checkpoint (HF_TINY, four shards, an index) in place. The rows of
the published fuzz list for safetensors are all here, as whole checkpoints instead of headers.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dsv4.convert.sources.base import CONFIG_FILE, INDEX_FILE
from dsv4.convert.sources.local import LocalSource

Damage = Callable[[Path], object]
Header = dict[str, Any]

SHARD = "model-00002-of-00004.safetensors"  # layer 0
HEAD_SHARD = "model-00004-of-00004.safetensors"
FIRST, SECOND = "layers.0.attn.attn_sink", "layers.0.attn.compressor.ape"  # by offset
EXPERT = "layers.0.ffn.experts.2.w1"
FP8 = "layers.0.attn.wkv"
OUTSIDE = "outside"  # a directory beside the checkpoint, with a file `secret`
TERABYTE = 1 << 40
BF16_NAN, BF16_INFINITY = b"\xc0\x7f", b"\x80\x7f"


class Hostile(NamedTuple):
    """damage: what is done to the checkpoint. says: all of it stands in the one sentence."""

    damage: Damage
    says: tuple[str, ...]


def read_shard(path: Path) -> tuple[Header, bytes]:
    """-> (header, data) of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def write_shard(path: Path, header: Header | bytes, data: bytes) -> None:
    """A safetensors file of a header given as an object or as its very text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _header(change: Callable[[Header], object], file: str = SHARD) -> Damage:
    def damage(hub: Path) -> None:
        header, data = read_shard(hub / file)
        change(header)
        write_shard(hub / file, header, data)

    return damage


def _text(change: Callable[[bytes], bytes]) -> Damage:
    def damage(hub: Path) -> None:
        header, data = read_shard(hub / SHARD)
        write_shard(hub / SHARD, change(json.dumps(header).encode()), data)

    return damage


def _set(name: str, **fields: object) -> Damage:
    return _header(lambda header: header[name].update(fields))


def _rename(name: str, other: str) -> Damage:
    return _header(lambda header: header.update({other: header.pop(name)}))


def _twice(**fields: object) -> Damage:
    """The first tensor's name a second time, where the library lets the last one win."""

    def damage(hub: Path) -> None:
        header, data = read_shard(hub / SHARD)
        again = json.dumps({FIRST: header[FIRST] | fields}).encode()
        write_shard(hub / SHARD, json.dumps(header).encode()[:-1] + b"," + again[1:], data)

    return damage


def _raw(change: Callable[[bytes], bytes], file: str = SHARD) -> Damage:
    return lambda hub: (hub / file).write_bytes(change((hub / file).read_bytes()))


def _length(value: int) -> Damage:
    return _raw(lambda raw: struct.pack("<Q", value) + raw[8:])


def _index(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(hub: Path) -> None:
        index = json.loads((hub / INDEX_FILE).read_text())
        change(index["weight_map"])
        (hub / INDEX_FILE).write_text(json.dumps(index))

    return damage


def _index_file(file: object) -> Damage:
    return _index(lambda weight_map: weight_map.update({"head.weight": file}))


def config(**changes: object) -> Damage:
    """Fields of config.json set to other values."""

    def damage(hub: Path) -> None:
        path = hub / CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _config_text(field: str, text: str) -> Damage:
    """A field of config.json set to something that no JSON writer would write."""

    def damage(hub: Path) -> None:
        path = hub / CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: 0}))
        path.write_text(path.read_text().replace(f'"{field}": 0', f'"{field}": {text}'))

    return damage


def _document(name: str, text: str) -> Damage:
    return lambda hub: (hub / name).write_text(text)


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    """The file `name` replaced by what `make` makes in its place."""

    def damage(hub: Path) -> None:
        (hub / name).unlink(missing_ok=True)
        make(hub / name)

    return damage


def _link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def _sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def poke(name: str, value: bytes, offset: int = 0) -> Damage:
    """Other bytes in the data of the tensor `name`."""

    def damage(hub: Path) -> None:
        entry = LocalSource(hub).entries[name]
        with (hub / entry.file).open("r+b") as file:
            file.seek(entry.begin + offset)
            file.write(value)

    return damage


def _without(name: str, *, file: str = SHARD) -> Damage:
    """A tensor taken out of its shard and of the index, without a trace."""

    def damage(hub: Path) -> None:
        header, data = read_shard(hub / file)
        begin, end = header.pop(name)["data_offsets"]
        for key, entry in header.items():
            if key != "__metadata__" and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]
        write_shard(hub / file, header, data[:begin] + data[end:])
        _index(lambda weight_map: weight_map.pop(name))(hub)

    return damage


def _appended(name: str, dtype: str, shape: list[int], size: int) -> Damage:
    """One more tensor of `size` zero bytes at the end of a shard, which becomes sparse."""

    def damage(hub: Path) -> None:
        header, data = read_shard(hub / SHARD)
        end = len(data) + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), end]}
        write_shard(hub / SHARD, header, data)
        os.truncate(hub / SHARD, (hub / SHARD).stat().st_size + size)
        _index(lambda weight_map: weight_map.update({name: SHARD}))(hub)

    return damage


def _both(*damages: Damage) -> Damage:
    def damage(hub: Path) -> None:
        for one in damages:
            one(hub)

    return damage


def _copy_of_a_shard(hub: Path) -> None:
    (hub / INDEX_FILE).unlink()
    shutil.copy(hub / SHARD, hub / "other.safetensors")


HEADERS: dict[str, Hostile] = {
    "1 byte short": Hostile(_raw(lambda raw: raw[:-1]), (SHARD, "truncated", "download it again")),
    "1 byte trailing": Hostile(_raw(lambda raw: raw + b"x"), (SHARD, "1 bytes that belong to no")),
    "hole": Hostile(_set(SECOND, data_offsets=[17, 16401]), (SHARD, SECOND, "hole of 1 bytes")),
    "overlap": Hostile(_set(SECOND, data_offsets=[15, 16399]), (SHARD, SECOND, "inside")),
    "end before begin": Hostile(_set(FIRST, data_offsets=[16, 0]), (SHARD, FIRST, "[16, 0]")),
    "negative offset": Hostile(_set(FIRST, data_offsets=[-16, 0]), (SHARD, FIRST, "[-16, 0]")),
    "size mismatch": Hostile(_set(FIRST, shape=[5]), (SHARD, FIRST, "16 bytes, expected 20")),
    "shape overflow": Hostile(_set(FIRST, shape=[1 << 40] * 2), (SHARD, FIRST, "overflows")),
    "header length 2^63": Hostile(_length(1 << 63), (SHARD, str(1 << 63), "100000000")),
    "header length 100 MB + 1": Hostile(_length(10**8 + 1), (SHARD, "100000001", "100000000")),
    "header length 100 MB": Hostile(_length(10**8), (SHARD, "truncated", "100000008")),
    "metadata of numbers": Hostile(
        _header(lambda header: header.update(__metadata__={"n": 1})), (SHARD, "__metadata__")
    ),
    "metadata null": Hostile(
        _header(lambda header: header.update(__metadata__=None)), (SHARD, "__metadata__")
    ),
    "extra field": Hostile(_set(FIRST, strides=[1]), (SHARD, FIRST, "strides", "expected")),
    "a megabyte of fields": Hostile(
        _set(FIRST, **{f"field{n}": 0 for n in range(100_000)}), (SHARD, FIRST, "expected")
    ),
    "unknown dtype": Hostile(_set(FIRST, dtype="F7"), (SHARD, FIRST, "'F7'")),
    "odd F4": Hostile(_set(FIRST, dtype="F4", shape=[31]), (SHARD, FIRST, "expected 124 bits")),
    "deep nesting": Hostile(_text(lambda _: b'{"a":' * 100_000), (SHARD, "not valid JSON")),
    "not UTF-8": Hostile(
        _text(lambda text: text.replace(b"attn_sink", b"attn_\xff\xfe")), (SHARD, "utf-8")
    ),
    "a huge number": Hostile(
        _text(lambda text: text.replace(b"[0, 16]", b"[0, " + b"9" * 9999 + b"]")),
        (SHARD, "no 64-bit integer"),
    ),
    "empty file": Hostile(_raw(lambda _: b""), (SHARD, "is empty, expected a safetensors file")),
    "a pickle instead": Hostile(
        _raw(lambda _: pickle.dumps({"a": 1})), (SHARD, "a pickle, which is never opened")
    ),
    "name twice": Hostile(_twice(), (SHARD, FIRST, "twice")),
    "name twice, other dtype": Hostile(_twice(dtype="I32"), (SHARD, FIRST, "twice")),
    "name is a path": Hostile(_rename(FIRST, "../../etc/x"), (SHARD, "'../../etc/x'")),
    "name is an absolute path": Hostile(_rename(FIRST, "/etc/x"), (SHARD, "'/etc/x'")),
    "name with NUL": Hostile(_rename(FIRST, "a\0b"), (SHARD, r"'a\x00b'")),
    "name moves the cursor": Hostile(_rename(FIRST, "a\x1b[2J"), (SHARD, r"'a\x1b[2J'")),
}

INDEXES: dict[str, Hostile] = {
    "index points upwards": Hostile(_index_file("../outside/x.safetensors"), (INDEX_FILE, "'../")),
    "index points to the root": Hostile(_index_file("/etc/x.safetensors"), (INDEX_FILE, "'/etc")),
    "index with NUL": Hostile(_index_file("a\0.safetensors"), (INDEX_FILE, r"'a\x00.safe")),
    "index names a number": Hostile(_index_file(7), (INDEX_FILE, "head.weight", "7")),
    "index names a missing file": Hostile(_index_file("x.safetensors"), ("x.safetensors", "1 of")),
    "index names a file of 10 MB": Hostile(
        _index_file("x" * 10**7 + ".safetensors"), (INDEX_FILE, "head.weight")
    ),
    "index has a tensor no file has": Hostile(
        _index(lambda m: m.update(ghost=SHARD)), (INDEX_FILE, "'ghost'", SHARD, "no file has it")
    ),
    "index lacks a tensor": Hostile(
        _index(lambda m: m.pop("head.weight")), (INDEX_FILE, "head.weight")
    ),
    "index has a key twice": Hostile(
        lambda hub: (hub / INDEX_FILE).write_text(
            (hub / INDEX_FILE).read_text().replace('"layers.0.', '"layers.1.', 1)
        ),
        (INDEX_FILE, "'layers.1.attn.attn_sink'", "twice"),
    ),
    "index is a dangling link": Hostile(
        replaced(INDEX_FILE, _link("../outside/nowhere")),
        (INDEX_FILE, "is a link to a file that does not exist"),
    ),
    "index is a pipe": Hostile(replaced(INDEX_FILE, os.mkfifo), (INDEX_FILE, "regular file")),
}

CONFIGS: dict[str, Hostile] = {
    "config missing": Hostile(lambda hub: (hub / CONFIG_FILE).unlink(), (CONFIG_FILE,)),
    "config is no JSON": Hostile(_document(CONFIG_FILE, "{model"), (CONFIG_FILE, "not valid JSON")),
    "config is a list": Hostile(_document(CONFIG_FILE, "[1]"), (CONFIG_FILE, "list")),
    "config nests deeply": Hostile(
        _document(CONFIG_FILE, '{"a":' + "[" * 500_000), (CONFIG_FILE, "not valid JSON")
    ),
    "config holds NaN": Hostile(_config_text("hc_eps", "NaN"), (CONFIG_FILE, "NaN")),
    "unused NaN": Hostile(_config_text("initializer_range", "-Infinity"), (CONFIG_FILE, "-Inf")),
    "config overflows a float": Hostile(_config_text("hc_eps", "1e999"), ("hc_eps", "inf")),
    "huge integer": Hostile(_config_text("hidden_size", "9" * 400), (CONFIG_FILE, "999")),
    "huge integer for a float": Hostile(_config_text("hc_eps", "9" * 400), (CONFIG_FILE, "999")),
    "integer of 5,000 digits": Hostile(_config_text("hc_eps", "9" * 5000), (CONFIG_FILE, "999")),
    "integer of 64 bits": Hostile(config(hidden_size=1 << 63), ("hidden_size", str(1 << 63))),
    "billions of experts": Hostile(config(n_routed_experts=1 << 31), ("of 2147483648 experts",)),
    "millions of layers": Hostile(
        config(num_hidden_layers=2_000_000, compress_ratios=[0] * 2_000_000),
        ("2000000 layers",),
    ),
    "negative layers": Hostile(config(num_hidden_layers=-1), ("num_hidden_layers is -1",)),
    "bool for an integer": Hostile(config(hidden_size=True), ("hidden_size is True", "integer")),
    "bool for a number": Hostile(config(hc_eps=True), ("hc_eps is True", "finite number")),
    "bool for one": Hostile(config(num_key_value_heads=True), ("num_key_value_heads is True",)),
    "text of 10 MB": Hostile(config(hidden_size="9" * 10**7), ("hidden_size is '999", "integer")),
    "model_type of 10 MB": Hostile(config(model_type="x" * 10**7), ("model_type is 'xxx",)),
    "model_type moves the cursor": Hostile(
        config(model_type="\x1b[2J\u202e"), (r"'\x1b[2J\u202e'",)
    ),
    "ratios are lists": Hostile(config(compress_ratios=[[128], 4]), ("compress_ratios",)),
    "layer types are lists": Hostile(
        config(compress_ratios=None, layer_types=[["sliding_attention"], 4]), ("layer_types",)
    ),
    "rotary factor overflows": Hostile(
        config(qk_rope_head_dim=None, partial_rotary_factor=1e308), ("partial_rotary_factor",)
    ),
    "YaRN divides by zero": Hostile(
        config(
            rope_scaling={
                "type": "yarn",
                "factor": 0,
                "original_max_position_embeddings": 65536,
            }
        ),
        ("factor of YaRN is 0",),
    ),
    "YaRN of no positions": Hostile(
        config(rope_scaling={"type": "yarn", "factor": 4, "original_max_position_embeddings": -1}),
        ("original_max_position_embeddings of YaRN is -1",),
    ),
}

FILES: dict[str, Hostile] = {
    "shard is a pipe": Hostile(replaced(SHARD, os.mkfifo), (SHARD, "regular file")),
    "shard links to a pipe": Hostile(
        _both(
            lambda hub: os.mkfifo(hub.parent / OUTSIDE / "pipe"),
            replaced(SHARD, _link("../outside/pipe")),
        ),
        (SHARD, "regular file"),
    ),
    "shard links to a directory": Hostile(replaced(SHARD, _link(".")), (SHARD, "regular file")),
    "shard links to /dev/zero": Hostile(
        replaced(SHARD, _link("/dev/zero")), (SHARD, "regular file")
    ),
    "shard links to itself": Hostile(replaced(SHARD, _link(SHARD)), (SHARD,)),
    "config links to /dev/zero": Hostile(
        replaced(CONFIG_FILE, _link("/dev/zero")), (CONFIG_FILE, "regular file")
    ),
    "same tensor in two shards": Hostile(_copy_of_a_shard, (SHARD, "other.safetensors", FIRST)),
    "tokenizer is a directory": Hostile(
        replaced("tokenizer.json", Path.mkdir), ("tokenizer.json", "regular file")
    ),
    "tokenizer is a dangling link": Hostile(
        replaced("tokenizer.json", _link("../outside/blob")),
        ("tokenizer.json", "is a link to a file that does not exist"),
    ),
    "licence is a pipe": Hostile(replaced("LICENSE", os.mkfifo), ("LICENSE", "regular file")),
    "licence of a terabyte": Hostile(
        replaced("LICENSE", _sparse(TERABYTE)), ("LICENSE", "larger than")
    ),
    "config of a terabyte": Hostile(
        replaced(CONFIG_FILE, _sparse(TERABYTE)), (CONFIG_FILE, "larger than")
    ),
    "shard of a terabyte of zeros": Hostile(
        replaced(SHARD, _sparse(TERABYTE)),
        (SHARD, "begins with zeros, expected a safetensors file"),
    ),
}

TENSORS: dict[str, Hostile] = {
    "other shape than the config's": Hostile(
        _set("layers.0.attn.q_norm.weight", shape=[4, 8]),
        ("layers.0.attn.q_norm.weight", "[4, 8]", "expected", "[32]"),
    ),
    "expert missing": Hostile(
        _both(_without(f"{EXPERT}.weight"), _without(f"{EXPERT}.scale")),
        ("1 missing", f"{EXPERT}.weight"),
    ),
    "scale missing": Hostile(
        _without(f"{EXPERT}.scale"), (SHARD, f"{EXPERT}.weight", "expected scale")
    ),
    "a tensor nobody expects": Hostile(
        _appended("backdoor", "U8", [3], 3), ("1 unexplained", "backdoor")
    ),
    "a float tensor nobody expects": Hostile(
        _appended("backdoor", "F32", [3], 12), ("1 unexplained", "backdoor")
    ),
    "a tensor of a terabyte": Hostile(
        _appended("backdoor.weight", "BF16", [1 << 20, 1 << 19], TERABYTE),
        ("1 unexplained", "backdoor.weight"),
    ),
    "a billion fused experts": Hostile(
        _appended("model.layers.1.mlp.experts.down_proj", "BF16", [1 << 30, 1, 1], 1 << 31),
        ("model.layers.1.mlp.experts.down_proj", str(1 << 30), "experts"),
    ),
    "gap in the draft stages": Hostile(
        _both(
            _appended("mtp.0.e_proj.weight", "BF16", [2, 2], 8),
            _appended("mtp.9999.e_proj.weight", "BF16", [2, 2], 8),
        ),
        ("mtp.[0, 9999]", "expected a gapless run"),
    ),
}

AT_OPEN = HEADERS | INDEXES | CONFIGS | FILES | TENSORS
"""Refused from headers and documents alone: by `plan`, and by `convert` before it writes."""

IN_VALUES: dict[str, Hostile] = {
    "NaN scale in an expert": Hostile(
        poke(f"{EXPERT}.scale", b"\xff", 3), (f"{EXPERT}.weight", "row 1, block 1", "255 (NaN)")
    ),
    "NaN in the router": Hostile(
        poke("layers.0.ffn.gate.weight", BF16_NAN, 6), ("layers.0.ffn.gate.weight", "nan")
    ),
    "infinity in lm_head": Hostile(
        poke("head.weight", BF16_INFINITY, 2), ("head.weight", "inf", "finite")
    ),
}
"""Refused by `convert` when the value is read; headers cannot tell."""

IN_ROUNDED_FP8: dict[str, Hostile] = {
    "NaN scale of FP8": Hostile(poke(f"{FP8}.scale", b"\xff"), (f"{FP8}.weight", "nan")),
    "NaN in FP8": Hostile(poke(f"{FP8}.weight", b"\x7f", 5), (f"{FP8}.weight", "nan")),
}
"""The same where the recipe rounds FP8; where it is carried, see IN_CARRIED."""

IN_NVFP4: dict[str, Hostile] = {
    "NaN block scale": Hostile(
        poke(f"{EXPERT}.weight_scale", b"\x7f"), (f"{EXPERT}.weight", "row 0, block 0", "0x7f")
    ),
    "negative block scale": Hostile(
        poke(f"{EXPERT}.weight_scale", b"\xb8"), (f"{EXPERT}.weight", "0xb8", "positive")
    ),
}
"""For a source whose experts are NVFP4 already (ModelOpt's dialect)."""

GLOBAL_SCALES: dict[str, Hostile] = {
    "global scale NaN": Hostile(
        poke(f"{EXPERT}.weight_scale_2", struct.pack("<f", float("nan"))),
        (f"{EXPERT}.weight_scale_2", "nan", "expected a number"),
    ),
    "global scale zero": Hostile(
        poke(f"{EXPERT}.weight_scale_2", struct.pack("<f", 0.0)),
        (f"{EXPERT}.weight_scale_2", "0 times its block scale", "codes are not zero"),
    ),
    "global scale infinite": Hostile(
        poke(f"{EXPERT}.weight_scale_2", struct.pack("<f", float("inf"))),
        (f"{EXPERT}.weight_scale_2", "inf", "expected a number"),
    ),
}
"""The same, refused by `plan` too where the files are here: a few bytes tell."""

IN_CARRIED: dict[str, Hostile] = {
    "NaN in a norm": Hostile(poke("norm.weight", BF16_NAN), ("norm.weight", "[0]", "nan")),
    "NaN scale of carried FP8": Hostile(poke(f"{FP8}.scale", b"\xff"), (f"{FP8}.scale", "nan")),
    "NaN in carried FP8": Hostile(poke(f"{FP8}.weight", b"\x7f"), (f"{FP8}.weight", "nan")),
}
"""In tensors that are carried byte for byte."""


def _file_of_nothing(hub: Path) -> None:
    (hub / INDEX_FILE).unlink()
    write_shard(hub / "none.safetensors", {}, b"")


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def _bombs(hub: Path) -> None:
    for name in ("pytorch_model.bin", "model-00001-of-00004.pt", "amax.pkl"):
        (hub / name).write_bytes(pickle.dumps(Bomb(hub.parent / OUTSIDE / "exploded")))


def _code(hub: Path) -> None:
    code = f"open({str(hub.parent / OUTSIDE / 'exploded')!r}, 'w').close()\n"
    for name in ("modeling.py", "configuration.py", "sitecustomize.py", "torch.py"):
        (hub / name).write_text(code)
    config(
        auto_map={"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"},
        trust_remote_code=True,
    )(hub)


def _licence_outside(hub: Path) -> None:
    (hub / "LICENSE").unlink(missing_ok=True)
    (hub / "LICENSE").symlink_to("../outside/secret")


HARMLESS: dict[str, Damage] = {
    "metadata empty": _header(lambda header: header.update(__metadata__={})),
    "no metadata": _header(lambda header: header.pop("__metadata__")),
    "header padded with spaces": _text(lambda text: text + b" " * 4096),
    "no index": lambda hub: (hub / INDEX_FILE).unlink(),
    "a file of no tensors": _file_of_nothing,
    "pickles beside the shards": _bombs,
    "code and auto_map": _code,
    "licence links outside": _licence_outside,
    "licence is empty": _document("LICENSE", ""),
}
"""Accepted, and nothing but the known files is opened, let alone run."""
