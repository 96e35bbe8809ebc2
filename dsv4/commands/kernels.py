"""`dsv4 kernels`: compile the GPU kernels ahead of time."""

from __future__ import annotations

from pathlib import Path

import click

from dsv4.commands.console import err, show
from dsv4.commands.options import architectures_option, models_option, operations_option
from dsv4.formats.plain_text import counted, duration


@click.group()
def kernels() -> None:
    """Compile the GPU kernels; needs no GPU."""


@kernels.command("build")
@architectures_option
@operations_option
@models_option
@click.option("--out", "location", type=click.Path(path_type=Path), help="Default: a cache folder.")
@click.option("--checks", "unusual", is_flag=True, help="Also for `bench kernels --checks`.")
@click.option("--workers", type=click.IntRange(min=1), help="Compilers at once.")
def build_kernels(
    archs: tuple[str, ...],
    operations: tuple[str, ...],
    models: tuple[str, ...],
    location: Path | None,
    unusual: bool,
    workers: int | None,
) -> None:
    """Compile every kernel of the real models' shapes into shared objects.

    What is there and made from the same source, compiler, architecture and shapes is kept. The
    result needs no compiler: it can be copied to the GPU machine and named by DSV4_KERNELS.
    """
    from dsv4.formats.model.releases import MODELS
    from dsv4.kernels.core.build import Built, build
    from dsv4.kernels.core.library import default_location
    from dsv4.kernels.ops import cases, checks
    from dsv4.runtime.gpu import plan, prefill_plan

    wanted = [
        kernel
        for model in models
        for case in (
            *cases(MODELS[model], model, (1, 8, 2048), operations),
            *(checks(MODELS[model], model, operations) if unusual else ()),
        )
        for kernel in case.kernels
    ]
    wanted += [
        kernel
        for model in models
        for planned in (plan.kernels, prefill_plan.kernels)
        for kernel in planned(MODELS[model])
        if kernel.operation.startswith(operations)  # "attention_join" is of "attention"
    ]
    target = location or default_location()

    def tell(one: Built, number: int, total: int) -> None:
        if one.fresh:
            err.print(f"{number} of {total}: {one.arch} {one.name}, {duration(one.seconds)}")

    done = build(wanted, archs, target, workers=workers, progress=tell)
    fresh = sum(one.fresh for one in done)
    show(f"{counted(len(done), 'kernel')} in {target}, {fresh} compiled now")
