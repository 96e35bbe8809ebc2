"""`dsv4 kernels`: compile the GPU kernels ahead of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsv4.commands.console import err, notice, show
from dsv4.commands.options import (
    OutDirectory,
    architectures_option,
    models_option,
    numbers,
    operations_option,
)
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.plain_text import counted, duration, size

if TYPE_CHECKING:
    from dsv4.kernels.core.signature import Kernel


@click.group()
def kernels() -> None:
    """Compile the GPU kernels; needs no GPU."""


@kernels.command("build")
@click.argument("stores", nargs=-1, metavar="[STORE]...", type=click.Path(path_type=Path))
@architectures_option
@operations_option
@models_option
@click.option(
    "--experts",
    "pruned",
    metavar="LIST",
    help="Of the released models also with so many experts a layer, such as 104,160.",
)
@click.option("--out", "location", type=click.Path(path_type=Path), help="Default: a cache folder.")
@click.option("--checks", "unusual", is_flag=True, help="Also for `bench kernels --checks`.")
@click.option("--workers", type=click.IntRange(min=1), help="Compilers at once.")
def build_kernels(
    stores: tuple[Path, ...],
    archs: tuple[str, ...],
    operations: tuple[str, ...],
    models: tuple[str, ...],
    pruned: str | None,
    location: Path | None,
    unusual: bool,
    workers: int | None,
) -> None:
    """Compile what these stores need, or else every kernel of the releases.

    --operations, --models, --experts and --checks are of the released models. Of a store only the
    metadata is read: zarr.json and dsv4.complete suffice.

    What is there and made from the same source, compiler, architecture and shapes is kept. The
    result needs no compiler: it can be copied to the GPU machine and named by DSV4_KERNELS.
    """
    from dsv4.kernels.core.build import Built, build
    from dsv4.kernels.core.library import default_location

    if stores:
        wanted = [kernel for store in stores for kernel in _of_store(store)]
    else:
        experts = [] if pruned is None else numbers(pruned)
        wanted = list(_of_releases(models, operations, unusual, experts))
    target = location or default_location()

    def tell(one: Built, number: int, total: int) -> None:
        if one.fresh:
            err.print(f"{number} of {total}: {one.arch} {one.name}, {duration(one.seconds)}")

    done = build(wanted, archs, target, workers=workers, progress=tell)
    fresh = sum(one.fresh for one in done)
    show(f"{counted(len(done), 'kernel')} in {target}, {fresh} compiled now")


@kernels.command("wheel")
@architectures_option
@click.option(
    "--from",
    "location",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder that `dsv4 kernels build` filled.  [default: the cache folder]",
)
@click.option(
    "--out",
    "target",
    type=OutDirectory(),
    default="dist",
    show_default=True,
    help="Where the wheels are written.",
)
def kernels_wheel(archs: tuple[str, ...], location: Path | None, target: Path) -> None:
    """Make a wheel of compiled kernels for each architecture.

    Installed beside this version of dsv4, it is found without any setting, and a GPU machine needs
    no compiler. It holds all kernels of the folder, and the launch library of nvidia-cutlass-dsl,
    whose licence is NVIDIA's.
    """
    from dsv4.kernels.core.library import default_location
    from dsv4.kernels.core.wheel import make_wheel

    for arch in archs:
        wheel = make_wheel(location or default_location(), arch, target)
        show(f"{wheel}: {size(wheel.stat().st_size)}")


def _of_store(place: Path) -> Iterator[Kernel]:
    """What `dsv4 run` of a store launches, whatever the length of its sequences."""
    from dsv4.formats.model.inventory import DraftKind
    from dsv4.formats.store.reader import PackedStore
    from dsv4.runtime.gpu.rehearsal import all_kernels, outlined_model

    # Files are not looked at: they may have stayed on another machine.
    store = PackedStore.open(place, check_files=False)
    try:
        return all_kernels(outlined_model(store, drafts=store.contents.draft is DraftKind.DSPARK))
    except RuntimeRefusal as error:
        if store.contents.draft is not DraftKind.DSPARK:
            raise
        plain = outlined_model(store)
        notice(f"kernels of the draft layers are left out: {error}")
        return all_kernels(plain)


def _of_releases(
    models: tuple[str, ...], operations: tuple[str, ...], unusual: bool, experts: list[int]
) -> Iterator[Kernel]:
    """What `dsv4 run` and `dsv4 bench kernels` launch for released models, whole and pruned."""
    from dsv4.formats.model.releases import DRAFTING
    from dsv4.kernels.ops import cases, checks
    from dsv4.runtime.gpu.rehearsal import all_kernels
    from dsv4.runtime.gpu.standard import standard_model

    for model in models:
        config = DRAFTING[model]
        for case in cases(config, model, (1, 8, 2048), operations):
            yield from case.kernels
        for case in checks(config, model, operations) if unusual else ():
            yield from case.kernels
        for count in (config.n_routed_experts, *experts):
            cut = dataclasses.replace(config, n_routed_experts=count)
            for kernel in all_kernels(standard_model(cut)):
                if kernel.operation.startswith(operations):  # "attention_join" is of "attention"
                    yield kernel
