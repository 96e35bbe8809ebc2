"""A library whose kernels are the operations' references, on buffers in host memory.

So everything but the kernels themselves is what runs on a GPU: the order of launches, which buffer
each reads and writes, caches, positions, what the host puts in. What one kernel hands to the next
of the same operation is not emulated (an attention kernel's `sums`, an expert's list of tokens):
the last of them gets the inputs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.formats.model.config import AttentionKind, ModelConfig
from dsv4.formats.numeric.operands import SLABS
from dsv4.kernels.core.contract import Buffers
from dsv4.kernels.core.library import Library
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.ops.attention import reference as attention_rows
from dsv4.kernels.ops.experts import contract as experts
from dsv4.kernels.ops.experts import fetch_contract
from dsv4.kernels.ops.experts import reference as experts_reference
from dsv4.kernels.ops.gemv import contract as gemv
from dsv4.kernels.ops.hyper_connections import contract as mhc
from dsv4.kernels.ops.indexer import reference as indexer_reference
from dsv4.kernels.ops.kv_cache import contract as append
from dsv4.kernels.ops.kv_cache import q_rope_contract
from dsv4.kernels.ops.kv_cache import reference as append_reference
from dsv4.kernels.ops.prefill import experts_reference as prefill_reference
from dsv4.kernels.ops.prefill import gemm_contract, swiglu_contract
from dsv4.kernels.ops.router import contract as router
from dsv4.kernels.reference.sampling import Parameters, sample
from dsv4.runtime.gpu.plan import attention_shape


class Emulator(Library):
    """For models of one configuration."""

    def __init__(self, config: ModelConfig) -> None:
        self.location, self.config = Path(), config
        self.launched: list[str] = []
        self._attended: Buffers = {}
        self._routed: Buffers = {}

    def function(self, kernel: Kernel) -> Callable[..., None]:
        """The reference of `kernel`, on its arguments."""

        def run(*arguments: Any) -> None:
            compute = getattr(self, f"_{kernel.operation}")  # now: a test may have planted a fault
            self.launched.append(kernel.operation)
            leaves = [leaf for one in arguments for leaf in _flat(one)]
            names = [one.name for one in kernel.leaves()]
            buffers = dict(zip(names, leaves, strict=True))
            for name, value in compute(dict(kernel.config), buffers).items():
                written: Tensor = buffers[name]
                whole = value.round() if not written.is_floating_point() else value
                written.copy_(whole.to(written.dtype))

        return run

    def _gemv(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        found = {}
        for index, text in enumerate(str(given["weights"]).split("|")):
            kind, *sizes = text.split(":")
            weight = gemv.Weight(kind, *(int(size) for size in sizes))
            found[f"y{index}"] = gemv.expected(weight, buffers, str(index)).value
        return found

    def _gemm_arrange(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        return {"arranged": buffers["x"].clone()}

    def _gemm(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        fields = (given[name] for name in gemv.Weight._fields)
        return {"y": gemm_contract.expected(gemv.Weight(*fields), buffers).value}

    def _experts_route(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        self._routed = {name: buffers[name] for name in ("topk_idx", "topk_weights")}
        return {}

    def _experts_up(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        self._routed |= buffers
        return {}

    def _experts_down(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        self._routed |= buffers
        return {}

    def _experts_combine(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        shape = experts.Shape.of(self.config)
        return {"y": prefill_reference.expected(shape, self._routed | {"y": buffers["y"]}).value}

    def _swiglu(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        return {"h": swiglu_contract.expected(self.config, buffers).value}

    def _append(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        kinds = {0: AttentionKind.SLIDING, self.config.csa_ratio: AttentionKind.CSA}
        kind = kinds.get(given["ratio"], AttentionKind.HCA)
        return _values(append_reference.expect(append.Layer.of(self.config, kind), buffers))

    def _q_rope(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        case = q_rope_contract.case(self.config, "heads", "", range(len(buffers["position"])))
        return _values(case.expect(buffers))

    def _indexer(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        if "ctas" in given:  # the scores; the others choose
            blocks = torch.zeros(len(buffers["scores"]), self.config.index_topk)
            found = indexer_reference.expect(self.config, buffers | {"blocks": blocks})
            return {"scores": found["scores"].value}
        found_ = indexer_reference.chosen(self.config, buffers["scores"], buffers["position"])
        return {"blocks": found_.value}

    def _attention(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        self._attended = buffers
        return self._joined(given, buffers) if "o" in buffers else {}

    def _attention_join(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        return self._joined(given, self._attended | buffers)

    def _joined(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        layers = range(self.config.num_hidden_layers + self.config.num_draft_layers)
        shapes = {attention_shape(self.config, layer) for layer in layers}
        (shape,) = (s for s in shapes if (s.mode, s.ratio) == (given["mode"], given["ratio"]))
        shape = shape._replace(window=given["window"])  # a draft's block sees its own rows besides
        return {"o": attention_rows.expected(shape, buffers).value}

    def _mhc(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        return _values(mhc.expect(mhc.Shape.of(self.config), str(given["place"]), buffers))

    def _router(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        shape = router.Shape.of(self.config, bool(given["hashed"]), str(given["kind"]))
        return _values(router.expect(shape, buffers))

    def _experts(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        shape = experts.Shape.of(self.config, bool(given["shared"]))
        return _values(experts_reference.expected(shape, buffers, SLABS))

    def _experts_fetch(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        found = fetch_contract.run(int(given["experts"]), buffers)
        return {name: value for name, value in found.items() if name != "records"}

    def _sampling(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        drawn = sample(buffers["logits"], Parameters(*(buffers[n] for n in Parameters._fields)))
        counted = {name: buffers[name] + 1 for name in ("counter", "position")}
        return {"token": drawn, **counted}


def _flat(argument: Any) -> Iterator[Any]:
    if isinstance(argument, tuple):
        yield from argument
    else:
        yield argument


def _values(expected: dict[str, Any]) -> Buffers:
    return {name: one.value for name, one in expected.items()}
