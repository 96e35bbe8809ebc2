"""The trained master in the released models' on-disk format, with tokenizer and held-out text.

dsv4 itself reads the master, which transformers wrote under its own names; what it unpacks is
rounded to MXFP4 (experts) and FP8 (dense matrices), and written file by file as a release is.
"""

from __future__ import annotations

import json
import sysconfig
import tempfile
from pathlib import Path

import tiny_formats
import tiny_model
import torch
from tokenizers import Tokenizer
from torch import Tensor

import dsv4
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import Kind, Parameter
from dsv4.synthetic.flavours import Flavour
from dsv4.synthetic.tiny import write_tiny
from dsv4.synthetic.tokenizer import files_of
from dsv4.synthetic.weights import Encoder, scale_name

HELD_OUT_BYTES = 96 << 10  # of held-out text that travel with the checkpoint

_LICENSE = """\
The weights in this directory were trained by examples/train_tiny.py of dsv4 and are under dsv4's
MIT licence. The text they were trained on, of which heldout.txt and the tokenizer's merges are
derived, is the Python standard library, Copyright (c) 2001 Python Software Foundation; All Rights
Reserved. Its licence follows.

"""


def export(work: Path, out: Path) -> None:
    """`work/master` -> `out`, which must not be there or be empty."""
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "packed"
        dsv4.convert(work / "master", packed, recipe="native")
        write_tiny(out, tiny_model.CONFIG, flavour=Flavour(_encoder(dsv4.open(packed)), {}))
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    for name, text in files_of(tokenizer, tiny_model.CONFIG.max_position_embeddings).items():
        (out / name).write_text(text, encoding="utf-8")
    theirs = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    (out / "LICENSE").write_text(_LICENSE + theirs.read_text(), encoding="utf-8")
    held = (work / "heldout.txt").read_text(encoding="utf-8")
    (out / "heldout.txt").write_text(held[:HELD_OUT_BYTES], encoding="utf-8")
    report = json.loads((work / "report.json").read_text())
    report["text"] = json.loads((work / "text.json").read_text())
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def _encoder(packed: PackedCheckpoint) -> Encoder:
    def encode(parameter: Parameter, config: ModelConfig, seed: int) -> dict[str, Tensor]:
        name = parameter.name
        if parameter.kind is Kind.TABLE:
            return {name: packed.store.tensor(name).to(torch.int64).clone()}
        value = packed.dequantize(name)
        match parameter.kind:
            case Kind.EXPERT:
                codes, scales = tiny_formats.encode_mxfp4(value)
                return {name: codes, scale_name(name): scales}
            case Kind.LINEAR:
                codes, scales = tiny_formats.encode_fp8(value)
                return {name: codes, scale_name(name): scales}
            case Kind.FLOAT32:
                return {name: value.clone()}
            case _:
                return {name: value.to(torch.bfloat16)}

    return encode
