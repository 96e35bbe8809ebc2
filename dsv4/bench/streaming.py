"""`dsv4 bench decode STORE`: a whole model on one GPU, its experts in two places, measured.

A store of random bytes routes every token to the same few experts, so routes are drawn instead:
before each step the routers' biases become the logarithm of every expert's popularity and Gumbel
noise, whose largest are a draw without replacement. Uniform, or with `skew` as popular as those of
the released model were counted to be: 150 of 256 in effect, the first 64 take 63 %, the first 128
86 %, and a placement by another text hits as often as published (a test holds it to the table).
Steps are independent: a real text repeats itself more. Layers that route by token are as they are.
Prompts are routed by the store itself.

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
COUNTED = 2048  # tokens of decode that a placement goes by
DEVIATIONS = (0.95, 1.6)  # of popularities' logarithms, above and below the middle
OUTWEIGHS = 1e3  # every score of a router
DRAWS = 1024  # of all routers' noise, in turn
OTHER_TEXT = 0.4  # of the deviation that two texts share, what each has besides
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
        self.wanted = torch.empty(0)
        self.rates, self.record_nbytes = (0.0, 0.0), 0
        self.starts: list[dict[str, float]] = []

    def all(self, placements: Sequence[Experts]) -> Report:
        """See `measure`."""
        lines = self._first(placements[0])
        for experts in placements:
            _free()
            model = self._load(experts)
            lines.append(self._line(model, experts, True, "skewed" if self.skew else "uniform"))
            del model
        _free()
        device, starts = torch.cuda.get_device_name(), tuple(self.starts)
        return Report(
            device, str(self.store), self.record_nbytes, *self.rates, tuple(lines), starts
        )

    def _first(self, experts: Experts) -> list[Line]:
        """Placed by nothing; then count."""
        model = self._load(experts)
        memory = _memory(model)
        if not memory.placement.cold:
            raise RuntimeRefusal(
                f"{self.store}: all experts are on the GPU; --experts SIZE keeps less of them there"
            )
        self.record_nbytes = memory.records.shape[1]
        self.rates = fetch_rate(model, memory), copy_rate(memory)
        texts = ("uniform", "skewed") if self.skew else ("uniform",)
        lines = [self._line(model, experts, False, text) for text in texts]
        memory.counted()
        count(_session(model), DrawnRoutes.of(model, texts[-1], 0))
        model.write_routes(self.routes)
        return lines

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

    def _line(self, model: GpuModel, experts: Experts, counts: bool, text: str) -> Line:
        memory = _memory(model)
        same = self._same(model)
        session = _session(model)
        still = graph_seconds([MeasuredStep(session, CONTEXT // 2, 1).whole.launch])
        session.reset()
        prompt = prompt_rate(session)
        memory.counted()
        routes = DrawnRoutes.of(model, text, 1)
        seconds, misses = decode(session, self.tokens, 5, routes)
        shares, _ = memory.counted()
        still += routes.seconds()
        self.say(f"{experts}, {text}: {1 / seconds:.1f} tokens/s, {misses:.2f} misses a token")
        placed, routed = memory.placement, shares.shape[0] * model.config.num_experts_per_tok
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
            1 - misses / routed,
            misses * self.record_nbytes / max(seconds - still, 1e-9),
            prompt,
            effective(shares[model.config.num_hash_layers :]),
            same,
        )

    def _same(self, model: GpuModel) -> bool:
        """Whether logits are those of the first placement that saw this text, bit by bit."""
        found = [logits(model, graphs) for graphs in (True, False)]
        if not len(self.wanted):
            self.wanted = found[0]
        return all(torch.equal(one, self.wanted) for one in found)


def log_popularity(experts: int, layer: int, text: int) -> Tensor:
    """Logarithms of how often a text's tokens choose each of a layer's experts, float32
    `[experts]`; texts share a part of it.
    """
    same, own = (
        torch.randn(experts, generator=torch.Generator().manual_seed(seed))
        for seed in (layer, 1000 * (text + 1) + layer)
    )
    drawn = (same + OTHER_TEXT * own) / (1 + OTHER_TEXT**2) ** 0.5
    above, below = DEVIATIONS
    return torch.where(drawn > 0, above * drawn, below * drawn)


class DrawnRoutes:
    """Routers' biases for one step after the other. Closed, the store's own are back."""

    def __init__(self, biases: Sequence[Tensor], popularity: Sequence[Tensor], seed: int) -> None:
        self._biases = list(biases)
        self._own = [bias.clone() for bias in biases]
        made = torch.Generator().manual_seed(seed)
        stacked = torch.stack(list(popularity))
        noise = torch.rand((DRAWS, *stacked.shape), generator=made).clamp_min(1e-30)
        drawn = OUTWEIGHS * (stacked - noise.log().neg().log())
        self._draws = [list(one.to(self._own[0].device).unbind()) for one in drawn]
        self._taken = 0

    @classmethod
    def of(cls, model: GpuModel, text: str, number: int) -> DrawnRoutes:
        """For a text, uniform or skewed; `number` tells one text from another."""
        gates = [(one.index, one.gate.bias) for one in model.operands.layers]
        biases = [(index, bias) for index, bias in gates if bias is not None]
        popularity = [
            log_popularity(len(bias), index, number) if text == "skewed" else torch.zeros(len(bias))
            for index, bias in biases
        ]
        return cls([bias for _, bias in biases], popularity, 17 + number)

    def next(self) -> None:
        """Those of the next step, on the stream of the steps."""
        torch._foreach_copy_(self._biases, self._draws[self._taken % DRAWS])
        self._taken += 1

    def close(self) -> None:
        """Put the store's back."""
        torch._foreach_copy_(self._biases, self._own)

    def seconds(self) -> float:
        """What `next` takes on the device, in the middle of many."""

        def many() -> None:
            for _ in range(DRAWS):
                self.next()

        found = _elapsed(many) / DRAWS
        self.close()
        return found


def count(session: GpuSession, routes: DrawnRoutes) -> None:
    """A text to place by: tokens drawn, and a prompt."""
    decode(session, COUNTED, 11, routes)
    session.reset()
    session.forward(random_ids(session.model.config.vocab_size, COMPARED[0], 12), "last")


def decode(session: GpuSession, tokens: int, seed: int, routes: DrawnRoutes) -> tuple[float, float]:
    """Draw `tokens` tokens at random. -> seconds and misses of one, after WARM others."""
    memory, sampler = _memory(session.model), Sampler(temperature=1.0, seed=seed)
    session.reset()
    ids = random_ids(session.model.config.vocab_size, 8, seed)
    ids = session.append_and_draw(ids, sampler)

    def drawn(count: int) -> None:
        nonlocal ids
        for _ in range(count):
            routes.next()
            ids = session.append_and_draw(ids, sampler)

    drawn(WARM)
    before = int(memory.fetched.sum())
    begin = time.perf_counter()
    drawn(tokens)
    misses = int(memory.fetched.sum()) - before  # waits for the device
    seconds = (time.perf_counter() - begin) / tokens
    routes.close()
    return seconds, misses / tokens


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
