"""Many generations of random lengths and settings: memory stays flat, results repeat."""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.parity_logits import Proof
from dsv4.bench.logits import random_ids
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler

MOST_SESSIONS = 3
PROMPT, NEW = 64, 16  # tokens at most
CAPACITY = (160, 1024)  # of sessions
HOST_GROWTH = DEVICE_GROWTH = 32 << 20  # bytes that are taken for noise, of 2,000 generations
REPEATED = 40
PAGE = 4096


@dataclasses.dataclass(frozen=True)
class Job:
    """One generation. abandoned: after how many tokens the reader goes away, 0 for never."""

    prompt: int
    new: int
    temperature: float
    top_p: float
    top_k: int | None
    seed: int
    abandoned: int

    @classmethod
    def random(cls, rng: random.Random) -> Job:
        """Any; greedy every third time."""
        new = rng.randint(1, NEW)
        return cls(
            rng.randint(1, PROMPT),
            new,
            rng.choice((0.0, 0.7, 1.3)),
            rng.choice((1.0, 0.9, 0.3)),
            rng.choice((None, 1, 40)),
            rng.randrange(1 << 30),
            rng.randint(1, new) if rng.random() < 0.1 else 0,
        )

    def run(self, session: GpuSession) -> list[int]:
        """The tokens, from an emptied session."""
        session.reset()
        ids = random_ids(session.model.config.vocab_size, self.prompt, self.seed)
        sampler = Sampler(self.temperature, self.top_p, self.seed, top_k=self.top_k)
        tokens = []
        for token in generate(session, ids, self.new, sampler):
            tokens.append(token)
            if len(tokens) == self.abandoned:
                break
        return tokens


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes in use, with no session open. device: of all on it; tensors: of torch's."""

    host: int
    device: int
    tensors: int

    @classmethod
    def now(cls, device: torch.device) -> Memory:
        """After a collection, so that what is counted cannot be garbage."""
        gc.collect()
        host = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        if device.type != "cuda":
            return cls(host, 0, 0)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return cls(host, total - free, torch.cuda.memory_allocated(device))


def soak(gpu: GpuModel, count: int, seed: int = 1) -> Iterator[Proof]:
    """`count` generations in up to three sessions at once, opened and closed on the way.

    Memory is compared from a tenth of them on, when everything has been used once.
    """
    rng = random.Random(seed)
    jobs = [Job.random(rng) for _ in range(count)]
    early = max(count // 10, 1)
    results, opened = _run(gpu, jobs[:early], rng)
    before, begin = Memory.now(gpu.device), time.perf_counter()
    rest, more = _run(gpu, jobs[early:], rng)
    seconds = time.perf_counter() - begin
    after = Memory.now(gpu.device)
    results += rest
    tokens = sum(len(one) for one in rest)
    yield Proof(
        f"{count} generations in {opened + more} sessions",
        f"{(count - early) / seconds:.1f} a second, {tokens / seconds:.0f} tokens a second",
        "",
        True,
    )
    yield flat("device memory", before.device, after.device, DEVICE_GROWTH)
    yield flat("device memory of torch", before.tensors, after.tensors, 0)
    yield flat("host memory", before.host, after.host, HOST_GROWTH)
    chosen = rng.sample(range(count), min(REPEATED, count))
    again, _ = _run(gpu, [jobs[n] for n in chosen], rng)
    same = sum(results[n] == one for n, one in zip(chosen, again, strict=True))
    what = f"{len(chosen)} of them again, in other sessions"
    yield Proof(what, f"{same} equal", "all", same == len(chosen))


def _run(gpu: GpuModel, jobs: list[Job], rng: random.Random) -> tuple[list[list[int]], int]:
    """-> (tokens of each job, sessions opened)."""
    pool: list[GpuSession] = []
    opened, results = 0, []
    for job in jobs:
        if pool and rng.random() < 0.1:
            pool.pop(rng.randrange(len(pool)))
        if len(pool) < MOST_SESSIONS and (not pool or rng.random() < 0.5):
            pool.append(gpu.session(rng.randint(*CAPACITY)))
            opened += 1
        results.append(job.run(rng.choice(pool)))
    return results, opened


def flat(what: str, before: int, after: int, growth: int) -> Proof:
    """Whether `after` exceeds `before` by no more than `growth` bytes."""
    grown = after - before
    found = f"{before / 1e6:.1f} MB, then {after / 1e6:.1f} ({grown / 1e6:+.1f})"
    return Proof(what, found, f"{growth / 1e6:+.1f} MB", grown <= growth)
