"""The reference of `append`, on the same buffers: what every cache has to hold afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4.kernels.core import error_intervals
from dsv4.kernels.core.contract import Buffers, Expected
from dsv4.kernels.core.error_intervals import UNIT, Codes, Range

if TYPE_CHECKING:
    from dsv4.kernels.ops.kv_cache.contract import Layer


def expect(layer: Layer, buffers: Buffers) -> dict[str, Expected]:
    """Outputs and caches after the step, from the buffers before it."""
    position, slot = buffers["position"].to(torch.int64), buffers["slot"].to(torch.int64)
    here = (position >= 0).nonzero()[:, 0]
    qr = error_intervals.normed(Range.exactly(buffers["latent"]), buffers["q_norm"], layer.eps)
    out = {"qr": error_intervals.expected(qr)}
    kv = error_intervals.normed(Range.exactly(buffers["kv"][here]), buffers["kv_norm"], layer.eps)
    row = _kv_row(layer, kv, buffers, position[here])
    ring = buffers["window_kv"].shape[1]
    place = (slot[here], position[here] % ring)
    out |= _stored(buffers, "window_kv", "window_scales", place, row)
    for prefix in layer.widths():
        out |= _compressed(layer, prefix, buffers, position, slot, here)
    return out


def _kv_row(layer: Layer, kv: Range, buffers: Buffers, position: Tensor) -> Codes:
    """Bytes of cache rows of normed key/value vectors at `position`."""
    turned = error_intervals.rotated(kv, buffers["cos"][position], buffers["sin"][position])
    nope = layer.width - layer.rope
    codes, scales = error_intervals.fp8_row(turned.part(0, nope))
    tail = error_intervals.bf16_bytes(turned.part(nope))
    zero = torch.zeros_like(scales.low[..., :1])
    return Codes(
        Range(*(torch.cat(ends, -1) for ends in zip(codes, tail, strict=True))),
        Range(*(torch.cat((end, zero), -1) for end in scales)),
    )


def _key_row(key: Range, buffers: Buffers, position: Tensor) -> Codes:
    turned = error_intervals.rotated(key, buffers["cos"][position], buffers["sin"][position])
    return error_intervals.fp4_row(error_intervals.spread(turned))


def _stored(
    buffers: Buffers, codes: str, scales: str, place: tuple[Tensor, Tensor], row: Codes
) -> dict[str, Expected]:
    """Both caches with the rows in their places, and everything else as it was."""
    found = {}
    for name, part in ((codes, row.codes), (scales, row.scales)):
        ends = []
        for end in part:
            whole = buffers[name].to(torch.int32)
            whole[place] = end.to(torch.int32)
            ends.append(whole)
        found[name] = error_intervals.expected(Range(*ends))
    return found


def _compressed(
    layer: Layer, prefix: str, buffers: Buffers, position: Tensor, slot: Tensor, here: Tensor
) -> dict[str, Expected]:
    """The rings of one compressor, and the entries of the blocks that end in this step."""
    kv, gate, ape, norm, ring_kv, ring_gate = (
        buffers[f"{prefix}_{name}"]
        for name in ("kv", "gate", "ape", "norm", "ring_kv", "ring_gate")
    )
    ratio, length = layer.ratio, ring_kv.shape[1]
    gate = gate + ape[position % ratio]
    ends = [int(row) for row in here if int(position[row]) % ratio == ratio - 1]
    slots = _slots(layer, ends, position.tolist(), slot.tolist(), length).to(kv.device)
    values = _halves(layer, torch.cat((kv, ring_kv.flatten(0, 1)))[slots])
    gates = _halves(layer, torch.cat((gate, ring_gate.flatten(0, 1)))[slots])
    absent = slots[..., None] < 0
    values, gates = values.masked_fill(absent, 0.0), gates.masked_fill(absent, float("-inf"))
    new_kv, new_gate = ring_kv.clone(), ring_gate.clone()
    new_kv[slot[here], position[here] % length] = kv[here]
    new_gate[slot[here], position[here] % length] = gate[here]
    out = {
        f"{prefix}_ring_kv": Expected(new_kv),
        f"{prefix}_ring_gate": Expected(new_gate),
    }
    last = torch.tensor(ends, dtype=torch.int64, device=kv.device)
    entries = error_intervals.normed(pooled(values, gates).to(torch.bfloat16), norm, layer.eps)
    first = position[last] - (ratio - 1)
    row_bytes = (
        _key_row(entries, buffers, first)
        if prefix == "i"
        else _kv_row(layer, entries, buffers, first)
    )
    place = (slot[last], position[last] // ratio)
    return out | _stored(buffers, f"{prefix}_entries", f"{prefix}_scales", place, row_bytes)


def _slots(
    layer: Layer, ends: list[int], position: list[int], slot: list[int], length: int
) -> Tensor:
    """Per block that ends in row `ends[n]`, its slots: rows of the inputs, then of all rings, -1.

    A token is read from the step's rows if it is one of them, else from its ring; -1 stands for
    one before the sequence's first.
    """
    count = layer.ratio * (2 if layer.overlap else 1)
    rows = {(s, p): row for row, (s, p) in enumerate(zip(slot, position, strict=True))}
    found = torch.full((len(ends), count), -1, dtype=torch.int64)
    for entry, row in enumerate(ends):
        for index in range(count):
            token = position[row] - (count - 1) + index
            if token >= 0:
                ring = len(position) + slot[row] * length + token % length
                found[entry, index] = rows.get((slot[row], token), ring)
    return found


def _halves(layer: Layer, tokens: Tensor) -> Tensor:
    """With overlap, the first half of channels of the block before, the second of its own."""
    if not layer.overlap:
        return tokens
    width = tokens.shape[-1] // 2
    own = tokens[:, layer.ratio :, width:]
    return torch.cat((tokens[:, : layer.ratio, :width], own), 1)


def pooled(values: Tensor, gates: Tensor) -> Range:
    """Softmax-weighted sums over slots of float32 `[n, slots, d]`, as float32 may make them.

    A weight is `2^((gate - largest) · log2 e)`: with x the distance of the gates, the exponent is
    off by three roundings of it, hence the weight by 3 x units, and by 4 for the approximate
    power. A running softmax rescales it at most once for each batch of 4 slots and once at the end,
    5 units each. Sums add a unit for each slot, the quotient two.
    """
    slots = values.shape[1]
    wide, distance = gates.to(torch.float64), gates.to(torch.float64)
    weights = wide.softmax(1)
    distance = (wide.amax(1, keepdim=True) - wide).nan_to_num(posinf=0.0)
    rescaled = 5 * (slots // 4 + 1) if slots > 8 else 0
    units = weights * (3 * distance + 5 + rescaled + slots)
    exact = (weights * values.to(torch.float64)).sum(1)
    error = (units * values.to(torch.float64).abs()).sum(1) + exact.abs() * (units.sum(1) + 2)
    return Range(exact - UNIT * error, exact + UNIT * error).to(torch.float32)
