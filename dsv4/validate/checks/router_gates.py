"""What rounding a router's gate does to its choice of experts, on random inputs.

The router takes the experts of highest sqrt(softplus(logit)) + bias. Inputs are Gaussian vectors
scaled to a root mean square of 1, which is what the norm before the router hands over; real inputs
are not random, so the figure compares gates, not answers. Layers that choose by token id have no
bias and no such choice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dsv4.convert.outputs.decode import read_values
from dsv4.convert.sources.base import Source
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.model.recipes import Role, role_of
from dsv4.formats.model.source_tensor import SourceTensor
from dsv4.validate.report import GateAgreement, Report

INPUTS = 1024
SEED = 0


def compare_gates(
    packed: PackedCheckpoint,
    source: Source,
    tensors: Mapping[str, SourceTensor],
    report: Report,
) -> None:
    """Compare the choices of every rounded gate that scores; results go into `report.gates`."""
    inputs: Tensor | None = None
    for verdict in report.tensors:
        bias = tensors.get(verdict.name.removesuffix("weight") + "bias")
        if verdict.loss is None or role_of(verdict.name) is not Role.ROUTER_GATE:
            continue
        report.gate_bytes += tensors[verdict.name].nbytes - packed.nbytes(verdict.name)
        if bias is None:
            continue
        gate, values = read_values(source, tensors[verdict.name]), read_values(source, bias)
        if inputs is None:
            inputs = unit_inputs(gate.shape[1])
        emitted = packed.dequantize(verdict.name)
        same, overlap = agreement(gate, emitted, values, inputs, packed.config.num_experts_per_tok)
        report.gates.append(GateAgreement(verdict.name, len(inputs), same, overlap))
        packed.store.forget()


def unit_inputs(width: int) -> Tensor:
    """`INPUTS` Gaussian vectors of root mean square 1, float32 `[INPUTS, width]`, always equal."""
    x = torch.randn(INPUTS, width, generator=torch.Generator().manual_seed(SEED))
    return x / x.square().mean(dim=1, keepdim=True).sqrt()


def agreement(
    gate: Tensor, emitted: Tensor, bias: Tensor, inputs: Tensor, top_k: int
) -> tuple[float, float]:
    """-> (share of inputs for which both gates choose the same set, mean share of common experts).

    gate, emitted: float32 `[E, D]`. bias: float32 `[E]`. inputs: float32 `[T, D]`.
    """
    first, second = (_chosen(weights, bias, inputs, top_k) for weights in (gate, emitted))
    common = (first & second).sum(dim=1)
    return float((common == top_k).double().mean()), float(common.double().mean()) / top_k


def _chosen(gate: Tensor, bias: Tensor, inputs: Tensor, top_k: int) -> Tensor:
    """Bool `[T, E]`: the experts each input goes to; equal scores in order of their number."""
    scores = softplus(inputs @ gate.t()).sqrt() + bias
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, order, True)
