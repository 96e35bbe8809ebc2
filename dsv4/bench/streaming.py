"""`dsv4 bench decode STORE`: a whole model on one GPU, its experts in two places, measured.

Tokens are drawn at random from the model's own logits, so that no two steps choose alike. With
`skew`, biases of the routers make experts as popular as those of the released model are: 150 of
256 count in effect, the first 64 take 63 %, the first 128 86 %. The text that is counted and the
one that is measured have different biases, as two texts have.

Beside each figure stands the arithmetic: a step without misses, measured, and the bytes of the
misses at the rate of the bus, measured. Correctness: logits of a prompt and of steps are the same
bytes for every placement, launched one by one and as graphs.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dsv4
from dsv4.bench.decode import MeasuredStep
from dsv4.bench.kernels import graph_seconds
from dsv4.bench.logits import random_ids
from dsv4.formats.errors import RuntimeRefusal
from dsv4.kernels.ops.experts.fetch_contract import fetch
from dsv4.runtime.gpu.expert_memory import ExpertMemory
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.load.placement import Counts, Experts
from dsv4.runtime.text.sampling import Sampler

CONTEXT = 8192  # tokens of the session, and of the prompt that is timed
COMPARED = (2048, 64)  # tokens of a prompt, and steps after it
COUNTED = 512  # tokens of decode that a placement goes by
EFFECTIVE = 150 / 256  # of a layer's experts: exp of the entropy of their shares
OTHER_TEXT = 0.6  # of a bias's deviation, what another text adds to it
WARM = 16  # tokens before the clock starts
TURNS = 5


@dataclasses.dataclass(frozen=True)
class Line:
    """One text on one placement. experts: as asked for; counts: whether it was placed by them.

    seconds: of a token; still: of a step without misses; expected: still and the misses' bytes at
    the bus's rate; misses: a token; hits: of the routes; bus: bytes a second of the misses in the
    time that the steps took longer; prompt: tokens a second, of CONTEXT of them.
    """

    experts: str
    text: str
    counts: bool
    hot: int
    cold: int
    spare: int
    seconds: float
    still: float
    expected: float
    misses: float
    hits: float
    bus: float
    prompt: float
    effective: float
    same: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """fetch, copy: bytes a second of host memory, by the kernel and by the copy engine. starts:
    what each load took, by phase.
    """

    device: str
    store: str
    record_nbytes: int
    fetch: float
    copy: float
    lines: tuple[Line, ...]
    starts: tuple[dict[str, float], ...]

    @property
    def right(self) -> bool:
        """Whether every placement gave the same bytes."""
        return all(line.same for line in self.lines)


def measure(
    store: Path,
    placements: Sequence[Experts],
    *,
    skew: bool,
    tokens: int,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Every placement in turn; the first without counts, all by counts of another text.

    Raises RuntimeRefusal where nothing of the first placement is cold, and as `dsv4.load`.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _Run(store, Path(folder, "routes.json"), skew, tokens, say).all(placements)


class _Run:
    def __init__(
        self, store: Path, routes: Path, skew: bool, tokens: int, say: Callable[[str], None]
    ) -> None:
        self.store, self.routes, self.skew, self.tokens, self.say = store, routes, skew, tokens, say
        self.deviation, self.wanted = 0.0, torch.empty(0)
        self.rates, self.record_nbytes = (0.0, 0.0), 0
        self.starts: list[dict[str, float]] = []

    def all(self, placements: Sequence[Experts]) -> Report:
        """See `measure`."""
        lines, plain = self._first(placements[0])
        for experts in placements:
            _free()
            model = self._load(experts)
            text = "skewed" if self.skew else "as it is"
            lines.append(self._line(model, experts, True, plain, text))
            del model
        _free()
        device, starts = torch.cuda.get_device_name(), tuple(self.starts)
        return Report(
            device, str(self.store), self.record_nbytes, *self.rates, tuple(lines), starts
        )

    def _first(self, experts: Experts) -> tuple[list[Line], list[Tensor]]:
        """Placed by nothing; then count. -> lines, and the store's biases."""
        model = self._load(experts)
        memory = _memory(model)
        if not memory.placement.cold:
            raise RuntimeRefusal(
                f"{self.store}: all experts are on the GPU; --experts SIZE keeps less of them there"
            )
        self.record_nbytes = memory.records.shape[1]
        self.rates = fetch_rate(model, memory), copy_rate(memory)
        plain = [
            one.gate.bias.clone() for one in model.operands.layers if one.gate.bias is not None
        ]
        lines = [self._line(model, experts, False, plain, "as it is")]
        if self.skew:
            self.deviation = calibrate(_session(model))
            self.say(f"routers' biases deviate by {self.deviation:.3f}")
            self.wanted = torch.empty(0)
            lines.append(self._line(model, experts, False, plain, "skewed"))
        memory.counted()
        self._bias(model, plain, "counted")
        count(_session(model))
        model.write_routes(self.routes)
        return lines, plain

    def _load(self, experts: Experts) -> GpuModel:
        phases: dict[str, float] = {}
        begin = time.perf_counter()

        def mark(phase: str) -> None:
            phases[phase] = time.perf_counter() - begin

        model = dsv4.load(
            self.store, "cuda", experts=experts, routes=self.routes, max_seq_len=CONTEXT, mark=mark
        )
        assert isinstance(model, GpuModel)
        self.starts.append(phases | {"pinning": model.pinning})
        for line in model.load_lines():
            self.say(line)
        return model

    def _bias(self, model: GpuModel, plain: Sequence[Tensor], text: str) -> None:
        """The routers' biases for a text: the store's, or skewed ones."""
        if text == "as it is" or not self.skew:
            gates = [one.gate for one in model.operands.layers if one.gate.bias is not None]
            for gate, bias in zip(gates, plain, strict=True):
                assert gate.bias is not None
                gate.bias.copy_(bias)
        else:
            skew_routers(model, self.deviation, 0 if text == "counted" else 1)

    def _line(
        self, model: GpuModel, experts: Experts, counts: bool, plain: Sequence[Tensor], text: str
    ) -> Line:
        memory = _memory(model)
        self._bias(model, plain, text)
        same = self._same(model)
        session = _session(model)
        still = graph_seconds([MeasuredStep(session, CONTEXT // 2, 1).whole.launch])
        session.reset()
        prompt = prompt_rate(session)
        memory.counted()
        seconds, misses = decode(session, self.tokens, seed=5)
        shares, _ = memory.counted()
        self.say(f"{experts}, {text}: {1 / seconds:.1f} tokens/s, {misses:.2f} misses a token")
        placed, routes = memory.placement, shares.shape[0] * model.config.num_experts_per_tok
        return Line(
            str(experts),
            text,
            counts,
            int(placed.hot.sum()),
            placed.cold,
            placed.spare,
            seconds,
            still,
            still + misses * self.record_nbytes / self.rates[0],
            misses,
            1 - misses / routes,
            misses * self.record_nbytes / max(seconds - still, 1e-9),
            prompt,
            effective(shares),
            same,
        )

    def _same(self, model: GpuModel) -> bool:
        """Whether logits are those of the first placement that saw this text, bit by bit."""
        found = [logits(model, graphs) for graphs in (True, False)]
        if not len(self.wanted):
            self.wanted = found[0]
        return all(torch.equal(one, self.wanted) for one in found)


def count(session: GpuSession) -> None:
    """A text to place by: tokens drawn, and a prompt."""
    decode(session, COUNTED, seed=11)
    session.reset()
    session.forward(random_ids(session.model.config.vocab_size, COMPARED[0], 12), "last")


def decode(session: GpuSession, tokens: int, seed: int) -> tuple[float, float]:
    """Draw `tokens` tokens at random. -> seconds and misses of one, after WARM others."""
    memory, sampler = _memory(session.model), Sampler(temperature=1.0, seed=seed)
    session.reset()
    ids = random_ids(session.model.config.vocab_size, 8, seed)
    ids = session.append_and_draw(ids, sampler)
    for _ in range(WARM):
        ids = session.append_and_draw(ids, sampler)
    before = int(memory.fetched.sum())
    begin = time.perf_counter()
    for _ in range(tokens):
        ids = session.append_and_draw(ids, sampler)
    misses = int(memory.fetched.sum()) - before  # waits for the device
    return (time.perf_counter() - begin) / tokens, misses / tokens


def logits(model: GpuModel, graphs: bool) -> Tensor:
    """Of a prompt's last token and of steps after it."""
    prompt, steps = COMPARED
    session = _session(model, graphs)
    ids = random_ids(model.config.vocab_size, prompt + steps, 3)
    found = [session.forward(ids[:prompt], "last").cpu()]
    found += [session.forward(ids[n : n + 1]).cpu() for n in range(prompt, prompt + steps)]
    return torch.cat(found)


def prompt_rate(session: GpuSession) -> float:
    """Tokens a second of a prompt, the second time."""
    ids = random_ids(session.model.config.vocab_size, CONTEXT, 4)
    session.forward(ids, "last").cpu()
    session.reset()
    begin = time.perf_counter()
    session.forward(ids, "last").cpu()
    return CONTEXT / (time.perf_counter() - begin)


def skew_routers(model: GpuModel, deviation: float, text: int) -> None:
    """Biases by which some experts are popular; text 0 and others differ in part."""
    for layer in model.operands.layers:
        if layer.gate.bias is not None:
            same, own = (
                torch.randn(len(layer.gate.bias), generator=torch.Generator().manual_seed(seed))
                for seed in (layer.index, 1000 * text + layer.index)
            )
            bias = deviation * (same + (OTHER_TEXT * own if text else 0))
            layer.gate.bias.copy_(bias)


def calibrate(session: GpuSession) -> float:
    """The deviation of biases with which as many experts count as in the released model."""
    memory, low, high = _memory(session.model), 0.0, 4.0
    ids = random_ids(session.model.config.vocab_size, COMPARED[0], 2)
    for _ in range(12):
        middle = (low + high) / 2
        skew_routers(session.model, middle, 0)
        memory.counted()
        session.reset()
        session.forward(ids, "last")
        _, counts = memory.counted()
        if effective(counts[session.model.config.num_hash_layers :]) > EFFECTIVE * counts.shape[1]:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def effective(counts: Counts) -> float:
    """Experts of a layer that count: exp of the entropy of their shares, mean over layers."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    logs = np.log(np.where(shares > 0, shares, 1))
    return float(np.exp(-(shares * logs).sum(1)).mean())


def fetch_rate(model: GpuModel, memory: ExpertMemory) -> float:
    """Bytes a second of the kernel that fetches, a step's cold experts at a time."""
    placed, top_k = memory.placement, model.config.num_experts_per_tok
    layer = int((~placed.hot).sum(1).argmax())
    cold = (~placed.hot[layer]).nonzero()[0][:top_k]
    device = memory.records.device
    topk_idx = torch.from_numpy(cold.astype(np.int32))[None].to(device)
    kernel = fetch(memory.records.shape[1], model.config.n_routed_experts)
    times = []
    for _ in range(TURNS):
        memory.forget()
        times.append(
            _elapsed(
                lambda: model.functions.launch(
                    kernel, topk_idx=topk_idx, layer=layer, **memory.arguments()
                )
            )
        )
    memory.forget()
    return len(cold) * memory.records.shape[1] / min(times)


def copy_rate(memory: ExpertMemory) -> float:
    """Bytes a second of the copy engine, a layer's cold experts at once."""
    _, row, count, place = next(memory.placement.staged())
    source, target = memory.host[row : row + count], memory.records[place : place + count]
    times = [_elapsed(lambda: target.copy_(source, non_blocking=True)) for _ in range(TURNS)]
    memory.forget()
    return source.nbytes / min(times)


def _elapsed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _memory(model: GpuModel) -> ExpertMemory:
    memory = model.operands.memory
    assert memory is not None
    return memory


def _session(model: GpuModel, graphs: bool = True) -> GpuSession:
    """The only one: there is no room for two."""
    _free()
    return model.engine(CONTEXT, graphs=graphs).session()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
