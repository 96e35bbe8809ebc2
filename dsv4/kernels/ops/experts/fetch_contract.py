"""Absent experts of a step brought from host memory: what changes, and what it is compared with.

    table[layer, e] >= 0 afterwards, and records[table[layer, e]] = host[cold[layer, e]],
    for every expert e that a token chose

Which record is replaced is part of the contract: that of the longest unused, the lowest number
among equal ones; so a reference on the host follows the device step by step.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.core.sizes import STEP_ROWS
from dsv4.kernels.ops.experts.contract import Shape, random_choices

IMPLEMENTATION = "dsv4.kernels.ops.experts.fetch:Fetch"
CTAS = 16  # eight saturate the bus (H200)
MAX_SPARE = 4096  # whose ages fit shared memory; a placement has at most twice a layer's experts
NEVER = 0x7FFFFFFF  # the age of a record that nothing lies in
WRITTEN = ("table", "owners", "used", "state", "counts", "fetched", "records")


def fetch(record_nbytes: int, experts: int, ctas: int = CTAS) -> Kernel:
    """topk_idx int32 `[T, k]`, of layer `layer` -> its experts on the GPU.

    table: int32 `[L E]`, places of all layers' records, -1 for none; cold: int32 `[L E]`, which of
    the host's records is an expert's, -1 for none; host: int64 `[1]`, the address of these. Spare
    records are those of `records` from `first_spare` on, one for each of owners (int32, whose it
    is: layer times E plus expert, or -1) and used (int32, when it was last chosen); at least as
    many as a step has choices. state: int32 `[2]`, the clock, and 0 before and after. counts: int32
    `[L E]`, how often an expert was chosen; fetched: int32 `[L]`, how many were.
    """
    every, spare = ("every",), ("spare",)

    def number(name: str, shape: tuple[int | str, ...], role: str = "inout") -> Argument:
        return Argument(name, torch.int32, shape, role, align=4)  # type: ignore[arg-type]

    return kernel(
        "experts_fetch",
        IMPLEMENTATION,
        {"record_nbytes": record_nbytes, "experts": experts, "ctas": ctas, "pdl": True},
        (
            number("topk_idx", ("rows", "top_k"), "in"),
            number("table", every),
            number("cold", every, "in"),
            Argument("host", torch.int64, (1,), align=8),
            number("owners", spare),
            number("used", spare),
            number("state", (2,)),
            number("counts", every),
            number("fetched", ("layers",)),
            Argument("records", torch.uint8, ("records", record_nbytes), "inout"),
            Argument("layer", int),
            Argument("first_spare", int),
        ),
    )


def host_bytes(address: int, nbytes: int) -> Tensor:
    """What lies at an address of this process, uint8 `[nbytes]`, nothing copied."""
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


def run(experts: int, given: Buffers) -> Buffers:
    """What `given` is afterwards, by the names of WRITTEN; only `records` is changed itself."""
    found = {name: given[name].clone() for name in WRITTEN if name != "records"}
    records = given["records"]
    table, owners, used = found["table"], found["owners"], found["used"]
    clock, layer, first_spare = (
        int(found["state"][0]),
        int(given["layer"]),
        int(given["first_spare"]),
    )
    chosen = [e for e in given["topk_idx"].flatten().tolist() if 0 <= e < experts]
    flat = list(dict.fromkeys(layer * experts + e for e in chosen))
    for e in chosen:
        found["counts"][layer * experts + e] += 1
    present = [int(table[e]) - first_spare for e in flat if int(table[e]) >= first_spare]
    for slot in present:
        used[slot] = clock
    ages = (clock - given["used"].to(torch.int64).cpu()).clamp(0)
    ages[owners.cpu() < 0] = NEVER
    ages[present] = -1
    missing = [e for e in flat if int(table[e]) < 0]
    for expert in missing:
        slot = int(ages.argmax())
        if int(ages[slot]) < 0:
            raise ValueError(f"{len(ages)} spare records, the step wants more")
        ages[slot] = -1
        if (before := int(owners[slot])) >= 0:
            table[before] = -1
        owners[slot], used[slot], table[expert] = expert, clock, first_spare + slot
        nbytes = records.shape[1]
        at = int(given["host"][0]) + int(given["cold"][expert]) * nbytes
        records[first_spare + slot].copy_(host_bytes(at, nbytes))
    found["state"][0] = clock + 1
    found["fetched"][layer] += len(missing)
    return {**found, "records": records}


def expect(experts: int, buffers: Buffers) -> dict[str, Expected]:
    """Every buffer that is written, to the bit."""
    found = run(experts, buffers | {"records": buffers["records"].clone()})
    return {name: Expected(found[name]) for name in WRITTEN}


@dataclasses.dataclass(frozen=True)
class Placed:
    """A case: layers, of which the last is fetched for; experts `hot` of each on the GPU."""

    layers: int
    experts: int
    hot: int
    spare: int


def case(
    shape: Shape, model: str, placed: Placed, choices: Tensor, name: str, *, cached: int = 0
) -> Case:
    """Tokens that chose `choices`. cached: spare records that hold other experts already."""
    nbytes, rows = shape.record.nbytes, len(choices)
    every = placed.layers * placed.experts

    def make(rng: torch.Generator) -> Buffers:
        device = rng.device
        host = torch.empty(every, nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        host.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8)[None])
        host[:, :8] = torch.arange(every)[:, None].view(torch.uint8)  # no two alike
        host[:, -8:] = host[:, :8]
        hot = torch.arange(every) % placed.experts < placed.hot
        table = torch.full((every,), -1, dtype=torch.int32)
        table[hot] = torch.arange(int(hot.sum()), dtype=torch.int32)
        cold = torch.full((every,), -1, dtype=torch.int32)
        cold[~hot] = torch.randperm(int((~hot).sum())).to(torch.int32)
        owners = torch.full((placed.spare,), -1, dtype=torch.int32)
        used = torch.zeros(placed.spare, dtype=torch.int32)
        others = (~hot).nonzero()[-cached:, 0] if cached else (~hot).nonzero()[:0, 0]
        owners[: len(others)] = others.to(torch.int32)
        used[: len(others)] = (torch.arange(len(others)) * 7 % 11).to(torch.int32)
        table[others] = int(hot.sum()) + torch.arange(len(others), dtype=torch.int32)
        count = int(hot.sum()) + placed.spare
        return {
            "topk_idx": choices.to(device, torch.int32).contiguous(),
            "table": table.to(device),
            "cold": cold.to(device),
            "host": torch.tensor([host.data_ptr()], device=device),
            "host_records": host,
            "owners": owners.to(device),
            "used": used.to(device),
            "state": torch.tensor([20, 0], dtype=torch.int32, device=device),
            "counts": torch.arange(every, dtype=torch.int32, device=device),
            "fetched": torch.arange(placed.layers, dtype=torch.int32, device=device),
            "records": torch.zeros(count, nbytes, dtype=torch.uint8, device=device),
            "layer": placed.layers - 1,
            "first_spare": int(hot.sum()),
        }

    absent = len({e for e in choices.flatten().tolist() if placed.hot <= e < placed.experts})
    return Case(
        "experts_fetch",
        name,
        model,
        rows,
        (Launch(fetch(nbytes, placed.experts)),),
        max(absent - cached, 0) * nbytes,
        make,
        lambda buffers: expect(placed.experts, buffers),
        note=f"{absent} of them cold, over the bus",
        joint=True,
    )


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Nothing absent: what every layer of a step costs. Repeated, what was absent is so no more."""
    shape = Shape.of(config)
    for count in rows:
        choices = random_choices(config, count)
        yield case(shape, model, Placed(1, shape.experts, shape.experts, 1), choices, "none absent")


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """One absent, all absent, and spare records that are full."""
    experts, top_k = 64, config.num_experts_per_tok
    shape = dataclasses.replace(Shape.of(config), experts=experts)
    choices = torch.arange(STEP_ROWS * top_k).view(STEP_ROWS, top_k)
    last = choices[:1] + experts - top_k
    spare = STEP_ROWS * top_k
    yield case(shape, model, Placed(3, experts, experts - 1, spare), last, "one absent")
    yield case(shape, model, Placed(2, experts, 0, spare), choices, "all absent")
    full = Placed(2, experts, 0, 2 * top_k)
    yield case(shape, model, full, choices[:1], "nothing left", cached=2 * top_k)
