"""Hashes of the kernels' machine code, to be compared before and after a change of their source.

    python -m tests.kernels.machine_code_hashes before.json --operations router
    (change the source)
    python -m tests.kernels.machine_code_hashes after.json --operations router --against before.json

`--sample` takes a few kernels of each operation, which is what `goldens/machine_code.json` holds: a
change that is meant to move machine code writes it again, in a commit that says what moved and why.
The hash is of the instructions alone, so that names and debug information may change.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from dsv4.formats.model.releases import DRAFTING, MODELS
from dsv4.kernels.core.build import compiler_version
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.names import ARCHITECTURES, OPERATIONS
from dsv4.kernels.ops import cases
from dsv4.runtime.gpu.rehearsal import all_kernels
from dsv4.runtime.gpu.standard import standard_model
from tests.support.machine_code import machine_code

GOLDEN = Path(__file__).parent / "goldens" / "machine_code.json"
ROWS = (1, 4, 8, 2048)  # of the timed cases: a token, steps, a chunk of a prompt

Hashes = dict[str, str]
"""Identity of a kernel, the architecture first -> its hash."""


def identity(kernel: Kernel, arch: str) -> str:
    """What a kernel is, whichever file it lies in: class, configuration and argument types."""
    name = kernel.implementation.rpartition(":")[2]
    config = " ".join(f"{key}={value}" for key, value in kernel.config)
    arguments = ", ".join(
        f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}" for one in kernel.leaves()
    ).replace("'", "")
    return f"{arch} {kernel.operation} {name} {config} ({arguments})"


def unstable(kernel: Kernel) -> bool:
    """Whether ptxas makes other code of the same PTX from run to run: it does of one attention."""
    return {("mode", "list"), ("splits", 10), ("stages", 2), ("cuts", 2)} <= set(kernel.config)


def digest(kernel: Kernel, arch: str) -> str:
    """The hash that is compared: of the instructions, of an unstable kernel that of its PTX."""
    code = machine_code(kernel, arch)
    return f"ptx {code.ptx_digest}" if unstable(kernel) else code.digest


def kernels(models: Sequence[str]) -> list[Kernel]:
    """What the timed cases and the engine's programs launch, each once."""
    made: dict[Kernel, None] = {}
    for model in models:
        made |= dict.fromkeys(_timed(model)) | dict.fromkeys(_launched(model))
    return list(made)


def sample() -> list[tuple[Kernel, str]]:
    """Of Flash, each class's first and last kernel and the unstable one; on Blackwell the first."""
    by_class: dict[str, list[Kernel]] = {}
    for kernel in _timed("flash"):
        by_class.setdefault(kernel.implementation, []).append(kernel)
    chosen = []
    for group in by_class.values():
        some = dict.fromkeys([group[0], group[-1], *filter(unstable, group)])
        chosen += [(kernel, "sm_90a") for kernel in some if "sm_90a" in kernel.architectures]
        chosen.append((group[0], "sm_100a"))
    return chosen


def _timed(model: str) -> Iterator[Kernel]:
    """Those of the timed cases, some more than once."""
    for case in cases(MODELS[model], model, ROWS):
        yield from case.kernels


def _launched(model: str) -> Iterator[Kernel]:
    """Those of the engine's programs, likewise."""
    return all_kernels(standard_model(DRAFTING[model]))


def hashes(wanted: Sequence[tuple[Kernel, str]], workers: int = 1) -> Iterator[tuple[str, str]]:
    """Compile all of `wanted`; -> (identity, hash) of each as it is done."""
    if workers == 1:
        yield from ((identity(*one), digest(*one)) for one in wanted)
        return
    spawn = multiprocessing.get_context("spawn")  # the compiler's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        waiting = {pool.submit(digest, *one): identity(*one) for one in wanted}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def differences(before: Hashes, after: Hashes) -> list[str]:
    """One line for each kernel whose code changed, vanished or is new."""
    changed = [name for name in before if name in after and before[name] != after[name]]
    gone, new = sorted(before.keys() - after), sorted(after.keys() - before)
    return (
        [f"changed: {name}" for name in changed]
        + [f"gone: {name}" for name in gone]
        + [f"new: {name}" for name in new]
    )


def read(file: Path) -> tuple[str, Hashes]:
    """-> (the compiler that made the code, its hashes)."""
    document = json.loads(file.read_text())
    return document["compiler"], document["hashes"]


def write(file: Path, found: Hashes) -> None:
    """Keep `found`, with the compiler's version, which the code depends on."""
    document = {"compiler": compiler_version(), "hashes": dict(sorted(found.items()))}
    file.write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    """The command in the module's docstring; -> 1 where machine code differs from `--against`."""
    parser = argparse.ArgumentParser(description="Hash the machine code of kernels.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="sm_90a", choices=ARCHITECTURES)
    parser.add_argument("--models", default="flash", help=f"some of {','.join(MODELS)}")
    parser.add_argument("--operations", default=",".join(OPERATIONS), help="how their names begin")
    parser.add_argument("--sample", action="store_true", help="the kernels of the golden file")
    parser.add_argument("--against", type=Path, help="hashes to compare with")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    if given.sample:
        wanted = sample()
    else:
        wanted = [(kernel, given.arch) for kernel in kernels(given.models.split(","))]
    operations = tuple(given.operations.split(","))
    wanted = [
        (kernel, arch)
        for kernel, arch in wanted
        if arch in kernel.architectures and kernel.operation.startswith(operations)
    ]
    done: Hashes = {}
    for name, value in hashes(wanted, given.workers):
        done[name] = value
        print(f"{len(done)} of {len(wanted)}  {name[:100]}", flush=True)
        write(given.out, done)
    if given.against is None:
        return 0
    compiler, before = read(given.against)
    if compiler != compiler_version():
        print(f"{given.against} was made by {compiler}, here is {compiler_version()}")
        return 1
    found_differences = differences(before, done)
    print("\n".join(found_differences) or f"all {len(done)} are identical")
    return int(bool(found_differences))


if __name__ == "__main__":
    sys.exit(main())
