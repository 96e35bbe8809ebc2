"""What transformers' save_pretrained writes converts as it is; transformers judges the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv4
from tests.formats.model.transformers_checkpoint import CONFIG, POSITIONS, save, tokens

TOLERANCE = 1e-4  # of the logits' standard deviation
FORMATS = [
    pytest.param((hybrid, dtype), id=f"{'hybrid' if hybrid else 'fused'}-{str(dtype)[6:]}")
    for hybrid in (True, False)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.fixture(scope="module", params=FORMATS)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tensor]:
    """A directory that transformers wrote, and transformers' logits."""
    hybrid, dtype = request.param
    out = tmp_path_factory.mktemp("saved") / "hf"
    return out, save(out, dtype, hybrid=hybrid)


def _distance(store: Path, theirs: Tensor) -> float:
    """Largest difference of the logits in units of their standard deviation."""
    ours = dsv4.load(store).session(POSITIONS).forward(tokens())
    return float((ours - theirs).abs().max() / theirs.std())


def test_native_gives_transformers_logits(saved: tuple[Path, Tensor], tmp_path: Path) -> None:
    source, logits = saved
    dsv4.convert(source, tmp_path / "packed", recipe="native")
    packed = dsv4.open(tmp_path / "packed")
    assert _distance(tmp_path / "packed", logits) <= TOLERANCE
    assert all(packed.provenance(name)["exact"] for name in packed.names())
    report = dsv4.validate(packed, source=source)
    assert report.ok, report.findings
    assert all(verdict.exact for verdict in report.tensors)


def test_standard_rounds_the_experts_says_so_and_runs(
    saved: tuple[Path, Tensor], tmp_path: Path
) -> None:
    source, logits = saved
    summary = dsv4.convert(source, tmp_path / "packed", recipe="standard")
    stacks = {
        f"layers.{layer}.ffn.experts.{{e}}.{stack}"
        for layer in range(CONFIG.num_hidden_layers)
        for stack in ("w13", "w2")
    }
    assert stacks < summary.losses.keys()
    assert all(1e-3 < (summary.losses[stack]["rel_mse"] or 0) < 9e-3 for stack in stacks)
    report = dsv4.validate(tmp_path / "packed", source=source)
    assert report.ok, report.findings
    packed = dsv4.open(tmp_path / "packed")
    provenance = packed.provenance("layers.1.ffn.experts.3.w1.weight")
    assert provenance["exact"] is False
    assert provenance["rounded_blocks"] > 0
    assert TOLERANCE < _distance(tmp_path / "packed", logits) < 10


def test_both_namespaces_are_the_same_checkpoint(tmp_path: Path) -> None:
    stores = []
    for hybrid in (True, False):
        save(tmp_path / f"hf{hybrid}", torch.float32, hybrid=hybrid)
        dsv4.convert(tmp_path / f"hf{hybrid}", tmp_path / f"packed{hybrid}", recipe="native")
        stores.append(dsv4.open(tmp_path / f"packed{hybrid}"))
    one, other = stores
    assert one.names() == other.names()
    assert one.config == other.config
    assert all(torch.equal(one.dequantize(n), other.dequantize(n)) for n in one.names())


def test_keeping_leaves_stacks_as_they_are(tmp_path: Path) -> None:
    logits = save(tmp_path / "hf", torch.bfloat16, hybrid=False)
    kept = ("layers.*.experts.*", "*gate.weight", "head.weight")
    summary = dsv4.convert(tmp_path / "hf", tmp_path / "packed", recipe="standard", keep=kept)
    assert summary.losses == {}
    assert _distance(tmp_path / "packed", logits) <= TOLERANCE
    with pytest.raises(dsv4.Dsv4Error, match=r"matches some experts of layers\.0"):
        dsv4.convert(tmp_path / "hf", tmp_path / "other", keep=("*.experts.1.w1.weight",))


def test_gate_and_up_swapped_in_a_fused_tensor_are_noticed(tmp_path: Path) -> None:
    """The order inside gate_up_proj is a convention no header tells; the logits do."""
    logits = save(tmp_path / "hf", torch.float32, hybrid=False)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("gate_up_proj"):
            tensors[name] = torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1).contiguous()
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    dsv4.convert(tmp_path / "hf", tmp_path / "packed", recipe="native")
    assert _distance(tmp_path / "packed", logits) > 100 * TOLERANCE


def test_a_source_whose_projections_were_swapped_after_packing_fails_validation(
    tmp_path: Path,
) -> None:
    save(tmp_path / "hf", torch.float32, hybrid=False)
    dsv4.convert(tmp_path / "hf", tmp_path / "packed", recipe="native")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[name] = torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    report = dsv4.validate(tmp_path / "packed", source=tmp_path / "hf")
    named = {finding.where for finding in report.findings}
    assert not report.ok
    assert "layers.1.ffn.experts.0.w1.weight" in named
    assert "layers.1.ffn.experts.0.w2.weight" not in named
