"""The verdict agrees with a reader that shares no code with us.

zarr-python reads the arrays, torchao undoes the tiling of scales, ModelOpt decodes NVFP4, ml_dtypes
FP8; the source is decoded by safetensors and ml_dtypes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

import dsv4
from tests.formats.model.dequantisers import modelopt_decode
from tests.support.oracles import source_values
from tests.validate.test_validate import SELF_CONSISTENT, _tampered_source

Values = NDArray[np.float64]
MEMBERS = ("codes", "scales", "global_scale")


def _untile(tiles: NDArray[np.uint8], rows: int, cols: int) -> torch.Tensor:
    """Scale bytes `[rows, cols]` from tiles `[R, C, 512]`, by torchao's inverse."""
    from torchao.prototype.mx_formats.utils import from_blocked

    padded = (tiles.shape[0] * 128, tiles.shape[1] * 4)
    whole: torch.Tensor = from_blocked(torch.from_numpy(tiles.copy()).flatten(), *padded)
    return whole[:rows, :cols].contiguous()


def _nvfp4(codes: Any, tiles: Any, scales: Any, interleave: int, shape: list[int]) -> list[Values]:
    """The projections of one matrix whose rows alternate by `interleave`."""
    rows, cols = codes.shape[0], shape[1]
    blocks = -(-cols // 16)
    raw = _untile(tiles, rows, -(-cols // 64) * 4)[:, :blocks]
    packed = torch.from_numpy(codes.copy())[:, : blocks * 8]
    number = torch.arange(rows) // interleave % 2 if interleave else torch.zeros(rows)
    found = []
    for projection, scale in enumerate(scales.reshape(-1)):
        members = {
            "weight": packed[number == projection].contiguous(),
            "weight_scale": raw[number == projection].contiguous().view(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(float(scale)),
        }
        found.append(modelopt_decode(members)[:, :cols].double().numpy())
    return found


def _fp8(codes: Any, scales: Any) -> Values:
    exponents = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    elements = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    rows, cols = elements.shape
    grid = np.repeat(np.repeat(exponents, 128, axis=0), 128, axis=1)[:rows, :cols]
    return np.asarray(elements * grid)


def outside_values(store: Path) -> Iterator[tuple[str, Values]]:
    """Every logical tensor of a store in float64, by others' readers and decoders."""
    members = dict(zarr.open_group(store, mode="r").members(max_depth=None))
    for path, node in members.items():
        own: Any = node.attrs.asdict().get("dsv4", {})
        names = own.get("names")
        if not names:
            continue
        if isinstance(node, zarr.Array):
            raw = np.asarray(node[...])
            is_bfloat16 = own["element"] == "bfloat16"
            yield names[0], (raw.view(ml_dtypes.bfloat16) if is_bfloat16 else raw).astype(float)
            continue
        arrays = {
            role: np.asarray(member[...])
            for role in MEMBERS
            if isinstance(member := members.get(f"{path}/{role}"), zarr.Array)
        }
        if own["format"] == "fp8":
            assert len(names) == 1
            yield names[0], _fp8(arrays["codes"], arrays["scales"])
            continue
        stacked = "{e}" in names[0]
        for e in range(len(arrays["codes"]) if stacked else 1):
            codes, tiles, scales = (arrays[m][e] if stacked else arrays[m] for m in MEMBERS)
            decoded = _nvfp4(codes, tiles, scales, own["parameters"]["interleave"], own["shape"])
            for name, values in zip(names, decoded, strict=True):
                yield name.replace("{e}", str(e)), values


def _disagreements(store: Path, source: Path) -> dict[str, float]:
    """Name -> relative MSE, of every tensor whose outside values are not the source's."""
    expected = source_values(source)
    found = dict(outside_values(store))
    assert found.keys() == expected.keys()
    return {
        name: float(((found[name] - value) ** 2).sum() / (value**2).sum())
        for name, value in expected.items()
        if not np.array_equal(found[name], value)
    }


def test_a_native_store_is_the_source_to_everyone(tiny_source: Path, native_store: Path) -> None:
    assert _disagreements(native_store, tiny_source) == {}
    assert dsv4.validate(native_store, source=tiny_source).ok


def test_losses_are_what_others_measure(tiny_source: Path, standard_store: Path) -> None:
    """In the report, in the store itself, and by the outside reader: one number."""
    measured = _disagreements(standard_store, tiny_source)
    report = dsv4.validate(standard_store, source=tiny_source)
    ours = {v.name: v.loss["rel_mse"] for v in report.tensors if v.loss is not None}
    assert len(measured) == 8
    assert ours == pytest.approx(measured, rel=1e-9)
    assert report.recorded == pytest.approx(measured, rel=1e-9)


FAULTS = ("experts swapped", "scale rows shifted", "gate and up swapped", "one FP8 byte")


@pytest.mark.parametrize("fault", FAULTS)
def test_findings_are_where_others_disagree(tiny_source: Path, tmp_path: Path, fault: str) -> None:
    """A store of wrong bytes, every checksum true: both readers name the same tensors."""
    edit: Callable[[Path, bytearray], None] = SELF_CONSISTENT[fault]
    wrong = _tampered_source(tiny_source, tmp_path, lambda raw: edit(tiny_source, raw))
    dsv4.convert(wrong, tmp_path / "packed", recipe="native", accept_rounding=True)
    report = dsv4.validate(tmp_path / "packed", source=tiny_source)
    disagreements = _disagreements(tmp_path / "packed", tiny_source)
    assert disagreements
    of_values = {"inversion", "optimum", "bound"}
    named = {finding.where for finding in report.findings if finding.check in of_values}
    assert named == disagreements.keys()
    assert json.loads(json.dumps(report.to_dict()))["ok"] is False
