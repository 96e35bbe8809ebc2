"""`dsv4 bench convert`: throughput of a conversion beside a plain copy and beside today's path.

A checkpoint with layers of the real shapes is written first. Then, round by round and in turn, a
process each: a plain copy of its bytes, dsv4 with `native` and with `standard`, and what a user
does without dsv4 (see `lanes`). Rates are of source bytes; fractions are taken round by round, so
that both sides met the same disk and neighbours. The copy is the bound: dsv4 reads and writes as
much, and computes a SHA-256 of the source and a BLAKE3 of the output besides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import dsv4
from dsv4.bench.lanes import LANES, Run, swizzle
from dsv4.convert.sources.local import LocalSource
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import ConfigError, StoreError
from dsv4.formats.model.releases import MODELS
from dsv4.formats.numeric.codecs import dequantize_fp8, dequantize_mxfp4, e4m3_decode
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from dsv4.synthetic import real_shapes
from dsv4.synthetic.disk_space import require_space

COPIES = 2.25  # the checkpoint, one output at a time, and room for what goes with it
E8M0_BIAS = 127
EXPERTS = "layers.0.ffn.experts"


@dataclasses.dataclass(frozen=True)
class Line:
    """One lane over all rounds; rates in GB/s of source bytes, `of_copy` the median fraction."""

    lane: str
    rate: float
    slowest: float
    fastest: float
    of_copy: float
    cpu_seconds_per_gb: float
    start_up: float  # seconds until everything is imported, not part of the rate
    base_rss: int  # bytes, once everything is imported
    peak_rss: int  # bytes, the most of any round
    correct: bool


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What one model's layers gave."""

    model: str
    layers: int
    experts: int
    nbytes: int
    rounds: int
    workers: int
    lines: tuple[Line, ...]


@dataclasses.dataclass(frozen=True)
class _Measured:
    run: Run
    start_up: float
    correct: bool


def throughput(
    model: str, directory: Path, *, layers: int, experts: int, workers: int, rounds: int
) -> Throughput:
    """Measure all lanes on `layers` layers of `model` with `experts` experts (0: all of them).

    Works in a temporary directory below `directory`. Raises OutOfSpaceError when the disk cannot
    hold it, StoreError when a lane fails.
    """
    if min(layers, workers, rounds) < 1 or experts < 0:
        raise ConfigError("layers, workers and rounds have to be at least 1, experts 0 or more")
    whole = MODELS[model]
    experts = experts or whole.n_routed_experts
    config = real_shapes.fresh_layers(whole, layers, experts, real_shapes.SMALL_VOCABULARY)
    require_space(directory, int(COPIES * real_shapes.checkpoint_bytes(config)))
    measured: dict[str, list[_Measured]] = {lane: [] for lane in LANES}
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-", dir=directory) as scratch:
        source, out = Path(scratch, "source"), Path(scratch, "out")
        nbytes = real_shapes.write_checkpoint(source, config)
        os.sync()  # writing it back is no lane's business
        judge = Judge(source)
        for _ in range(rounds):
            for lane in LANES:
                measured[lane].append(_measure(lane, source, out, workers, judge))
    lines = tuple(_line(lane, measured, nbytes) for lane in LANES)
    return Throughput(model, layers, experts, nbytes, rounds, workers, lines)


def _measure(lane: str, source: Path, out: Path, workers: int, judge: Judge) -> _Measured:
    """One run in its own process; its output is checked and removed."""
    command = [sys.executable, "-m", "dsv4.bench.lanes", lane, str(source), str(out), str(workers)]
    try:
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        elapsed = time.perf_counter() - begin
        if done.returncode:
            raise StoreError(f"{lane} failed: {done.stderr.strip().splitlines()[-1]}")
        run = Run(**json.loads(done.stdout))
        start_up = elapsed - run.seconds - run.warm_up_seconds
        return _Measured(run, start_up, judge.correct(lane, out))
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(out)


class Judge:
    """Whether what a lane left behind is what it ought to be.

    It keeps what our store has for the first expert, to compare today's stacks with.
    """

    def __init__(self, source: Path) -> None:
        self._source = source
        self._ours: dict[str, NVFP4Tensor] = {}

    def correct(self, lane: str, out: Path) -> bool:
        """Judge the output of a lane; `native` comes before `today`."""
        if lane == "copy":
            return LocalSource(out).fingerprint() == LocalSource(self._source).fingerprint()
        if lane == "today":
            return self._stacks_equal(out)
        try:
            return dsv4.validate(out, quick=True).ok and self._store_equals(dsv4.open(out))
        except StoreError:
            return False

    def _store_equals(self, packed: PackedCheckpoint) -> bool:
        """A sample of the store, dequantised, against the source as safetensors reads it."""
        for name in _first_expert():
            stored = packed.stored(name)
            assert isinstance(stored, NVFP4Tensor)
            codes, scales = stored.codes.clone(), stored.scales.clone()
            self._ours[name] = dataclasses.replace(stored, codes=codes, scales=scales)
        return all(
            torch.equal(packed.dequantize(name), _values(self._source, name))
            for name in _sample(self._source)
        )

    def _stacks_equal(self, out: Path) -> bool:
        """Today's codes and swizzled scales of the first expert are the bytes of our store."""
        with safe_open(_file(out), framework="pt") as tensors:
            for stack, projections in (("w13", (1, 3)), ("w2", (2,))):
                ours = [self._ours[_expert(0, projection)] for projection in projections]
                codes = torch.cat([part.codes for part in ours])
                scales = swizzle(torch.cat([_exponents(part) for part in ours]))
                theirs = tensors.get_slice(f"{EXPERTS}.{stack}.weight")[0]
                if not torch.equal(theirs.view(torch.uint8), codes):
                    return False
                if not torch.equal(tensors.get_slice(f"{EXPERTS}.{stack}.scale")[0], scales):
                    return False
        return True


def _exponents(part: NVFP4Tensor) -> Tensor:
    """The E8M0 bytes `[N, K/32]` that say what a part's pairs of equal block scales say."""
    left, right = (e4m3_decode(part.scales[:, half::2]) * part.global_scale for half in (0, 1))
    if not torch.equal(left, right):
        raise StoreError("block scales that came from one differ")
    return (left.log2() + E8M0_BIAS).to(torch.uint8)


def _expert(index: int, projection: int) -> str:
    return f"{EXPERTS}.{index}.w{projection}.weight"


def _first_expert() -> list[str]:
    return [_expert(0, projection) for projection in (1, 2, 3)]


def _file(directory: Path) -> Path:
    """The file that holds layer 0."""
    return directory / "layer-0.safetensors"


def _sample(source: Path) -> tuple[str, ...]:
    """Tensors to compare: the first and the last expert, an FP8 matrix and a plain vector."""
    names = LocalSource(source).entries
    last = max(int(name.split(".")[4]) for name in names if name.startswith(f"{EXPERTS}."))
    experts = [_expert(last, projection) for projection in (1, 2, 3)]
    return (*_first_expert(), *experts, "layers.0.attn.wq_a.weight", "layers.0.attn_norm.weight")


def _values(source: Path, name: str) -> Tensor:
    with safe_open(_file(source), framework="pt") as tensors:
        weight: Tensor = tensors.get_tensor(name)
        if weight.dtype is torch.bfloat16:
            return weight.to(torch.float32)
        scale = tensors.get_tensor(name.removesuffix("weight") + "scale")
        if weight.dtype is torch.int8:
            return dequantize_mxfp4(weight.view(torch.uint8), scale.view(torch.uint8))
        return dequantize_fp8(weight, scale)


def _line(lane: str, measured: dict[str, list[_Measured]], nbytes: int) -> Line:
    runs = [m.run for m in measured[lane]]
    seconds = [run.seconds for run in runs]
    of_copy = [m.run.seconds / s for m, s in zip(measured["copy"], seconds, strict=True)]
    gb = nbytes / 1e9
    return Line(
        lane,
        gb / statistics.median(seconds),
        gb / max(seconds),
        gb / min(seconds),
        statistics.median(of_copy),
        statistics.median(run.cpu_seconds for run in runs) / gb,
        statistics.median(m.start_up for m in measured[lane]),
        max(run.base_rss for run in runs),
        max(run.peak_rss for run in runs),
        all(m.correct for m in measured[lane]),
    )
