"""What every release of transformers writes converts with the right values, or is refused by name.

The goldens are what the releases' own wheels write; the long test derives them again from there.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dsv4
from benchmarks.transformers_peer import its_name
from tests.formats.model.release_names import RELEASES, describe, goldens, parts

GOLDENS = goldens()
DAMAGED = "transformers-5.8.0-default"
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
EXPERTS = 4


def _their_values(golden: dict[str, Any]) -> dict[str, Tensor]:
    """Made-up values of every tensor of the release's own format, and of the experts in it."""
    own = next(
        other
        for other in GOLDENS.values()
        if other["format"] == "own" and golden["releases"][0] in other["releases"]
    )
    values: dict[str, Tensor] = {}
    for name, (dtype, shape, _) in own["tensors"].items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if dtype == "I64":
            made = torch.rand(shape[0], EXPERTS, generator=generator).argsort(1)[:, : shape[1]]
        else:
            made = torch.randn(shape, generator=generator).to(DTYPES[dtype])
        values |= {origin: part.contiguous() for origin, part in parts(name, made.contiguous())}
    return values


def _write(golden: dict[str, Any], values: dict[str, Tensor], out: Path) -> None:
    """The checkpoint as the release writes it; what is no whole tensor becomes ones."""
    out.mkdir()
    (out / "config.json").write_text(json.dumps(golden["config"]))
    stored = {
        name: values[origin].clone() if origin else torch.ones(shape, dtype=DTYPES[dtype])
        for name, (dtype, shape, origin) in golden["tensors"].items()
    }
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})


def _origin(name: str) -> str:
    """Where a hub tensor lies in transformers' own format, by the parity tests' table of names."""
    prefix, _, rest = name.partition(".ffn.experts.")
    if rest:
        expert, projection, _ = rest.split(".")
        stack = f"model.{prefix}.mlp.experts"
        halves = {"w1": f"gate_up_proj[{expert},0]", "w3": f"gate_up_proj[{expert},1]"}
        return f"{stack}.{halves.get(projection, f'down_proj[{expert}]')}"
    return its_name(name)


@pytest.mark.parametrize("name", [name for name in GOLDENS if name != DAMAGED])
def test_what_a_release_writes_converts_with_the_right_values(name: str, tmp_path: Path) -> None:
    values = _their_values(GOLDENS[name])
    _write(GOLDENS[name], values, tmp_path / "hub")
    dsv4.convert(tmp_path / "hub", tmp_path / "packed", recipe="native")
    packed = dsv4.open(tmp_path / "packed")
    by_origin = {
        origin.replace(".indexer.weights_proj.", ".indexer.scorer.weights_proj."): tensor
        for origin, tensor in values.items()
    }
    wrong = [
        ours
        for ours in packed.names()
        if not torch.equal(packed.dequantize(ours), by_origin[_origin(ours)].to(torch.float32))
    ]
    assert wrong == []
    whole = sum(math.prod(v.shape) for origin, v in values.items() if "[" not in origin)
    assert sum(math.prod(packed.shape(ours)) for ours in packed.names()) == whole
    report = dsv4.validate(packed, source=tmp_path / "hub")
    assert report.ok, report.findings


def test_the_format_that_cuts_shared_experts_to_rows_is_refused_by_name(tmp_path: Path) -> None:
    golden = GOLDENS[DAMAGED]
    _write(golden, _their_values(golden), tmp_path / "hub")
    with pytest.raises(dsv4.Dsv4Error, match=r"as transformers 5\.8\.0 writes it by default; "):
        dsv4.convert(tmp_path / "hub", tmp_path / "packed")


def test_every_release_has_both_formats() -> None:
    for kind in ("own", "default"):
        named = [r for one in GOLDENS.values() if one["format"] == kind for r in one["releases"]]
        assert sorted(named) == sorted(RELEASES), kind


def _wheel(release: str, directory: Path) -> Path:
    """The wheel of a release, unpacked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run(
        [*command, str(directory), f"transformers=={release}"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"transformers {release} cannot be downloaded: {done.stderr.strip()[-300:]}")
    (wheel,) = directory.glob("transformers-*.whl")
    zipfile.ZipFile(wheel).extractall(directory / "unpacked")
    wheel.unlink()
    return directory / "unpacked"


@pytest.mark.long
@pytest.mark.parametrize("release", RELEASES)
def test_a_release_still_writes_what_its_goldens_hold(release: str, tmp_path: Path) -> None:
    wheel = _wheel(release, tmp_path)
    module = "tests.formats.model.transformers_writer"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, str(wheel), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == release
    for kind in ("own", "default"):
        (golden,) = (
            one for one in GOLDENS.values() if one["format"] == kind and release in one["releases"]
        )
        written = describe(tmp_path / "out" / "own", tmp_path / "out" / kind)
        assert written == {key: golden[key] for key in ("config", "tensors")}
