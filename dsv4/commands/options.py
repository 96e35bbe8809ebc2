"""Options that several commands share, and how sizes are written on the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from dsv4.formats.model.recipes import DEFAULT_RECIPE, RECIPE_NAMES
from dsv4.formats.model.releases import MODELS
from dsv4.kernels.core.sizes import STEP_ROWS
from dsv4.kernels.names import ARCHITECTURES, OPERATIONS

STDOUT = Path("-")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_UNITS |= {f"{unit}iB": size for unit, size in _UNITS.items() if unit}
_UNITS |= {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Size(click.ParamType[int]):
    """A number of bytes: 2GiB, 1.5G, 900MB, 1073741824. G is GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes meant; refuses what is no size."""
        match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kKMGT]?(?:i?B)?)", str(value))
        if match is None or match[2] not in _UNITS:
            self.fail(f"{value!r} is not a size, expected such as 2GiB or 500kB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class ExpertsPlace(Size):
    """auto, resident, or a size."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The word or the bytes meant; refuses all else."""
        return value if value in ("auto", "resident") else super().convert(value, param, ctx)


class DraftLength(click.ParamType[Any]):
    """auto, off, or how many tokens."""

    name = "draft"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The word or the number meant; refuses all else, and more than a step has room for."""
        text = str(value)
        wish = int(text) if text in map(str, range(STEP_ROWS)) else text
        if wish not in ("auto", "off", *range(STEP_ROWS)):
            self.fail(
                f"{text!r} is not auto, off or 0 to {STEP_ROWS - 1}: a step has {STEP_ROWS} rows, "
                "and one is the token before the drafts",
                param,
                ctx,
            )
        return wish


class OutDirectory(click.ParamType[Path]):
    """A directory that is there or can be made; refused now if something else lies there."""

    name = "directory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; refuses the empty one, which would be the current directory."""
        path = Path(value)
        if not str(value):
            self.fail("the directory's name is empty; give . for the current one", param, ctx)
        if path.is_symlink() and not path.exists():
            self.fail(f"{path} is a link to nothing; remove it or choose another", param, ctx)
        if path.exists() and not path.is_dir():
            self.fail(f"{path} is not a directory; choose another one", param, ctx)
        return path


class Device(click.ParamType[str]):
    """Where to compute: cpu, cuda, or one of several GPUs as cuda:1."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The device meant; refuses what is not one, without asking torch."""
        if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", str(value)) is None:
            self.fail(f"{value!r} is not one of cuda, cuda:1 (and so on), cpu", param, ctx)
        return str(value)


class Target(click.ParamType[Path]):
    """A file to be written when the work is done; refused now if that cannot be."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; refuses an option's name, a directory, and what cannot be written."""
        path, text = Path(value), str(value)
        if text.startswith("--"):
            self.fail(f"expected a file name before {text}, or ./{text} if it is one", param, ctx)
        if not text:
            self.fail("the file name is empty", param, ctx)
        if path.is_dir():
            self.fail(f"{path} is a directory, expected a file name", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"there is no directory {path.parent} to write {path.name} into", param, ctx)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            self.fail(f"{path} cannot be written; choose another place", param, ctx)
        return path


class TargetOrStdout(Target):
    """A `Target`, or - for stdout."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """As `Target.convert`; - is what it is."""
        return STDOUT if str(value) == "-" else super().convert(value, param, ctx)


store_argument = click.argument(
    "directory", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="DIR"
)
recipe_option = click.option(
    "--recipe",
    type=click.Choice(RECIPE_NAMES),
    default=DEFAULT_RECIPE,
    show_default=True,
    help="native: nothing is rounded, every value is the source's. standard: router gates, lm_head "
    "and experts of 8 bits or more are rounded to NVFP4; smaller, and answers can differ a little. "
    "nvfp4: attention and shared experts too; the smallest, and what differs most. In each, MXFP4 "
    "and NVFP4 experts are carried exactly, as NVFP4.",
)
keep_option = click.option(
    "--keep",
    multiple=True,
    metavar="GLOB",
    help="Leave matching tensors as they are in the source, such as '*.gate.weight'; names of the "
    "hub or of transformers. May be given several times.",
)
accept_option = click.option(
    "--accept-rounding",
    is_flag=True,
    help="Round what cannot be held exactly of a tensor that is to be carried.",
)


revision_option = click.option(
    "--revision", help="Branch, tag or commit of a hub id.  [default: main]"
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Units worked on at once.  [default: one a core, as many as --memory allows]",
)
memory_option = click.option(
    "--memory",
    type=Size(),
    default="2GiB",
    show_default=True,
    help="Ceiling of RAM, such as 900MB or 4GiB, whatever the size of the model.",
)


def _words(
    allowed: Sequence[str],
) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """A list separated by commas, each word one of `allowed`."""

    def parse(ctx: click.Context, param: click.Parameter, text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(text.split(",")))
        for word in words:
            if word not in allowed:
                raise click.BadParameter(f"{word!r}, expected some of {','.join(allowed)}")
        return words

    return parse


def numbers(text: str, least: int = 1, most: int | None = None) -> list[int]:
    """A list separated by commas. Raises BadParameter for anything but numbers of this range."""
    words = text.split(",")
    if not all(re.fullmatch(r"[0-9]{1,9}", word) for word in words):
        raise click.BadParameter(f"{text!r}, expected numbers such as 1,8")
    found = [int(word) for word in words]
    for number in found:
        if number < least or (most is not None and number > most):
            limit = "" if most is None else f" and at most {most}"
            raise click.BadParameter(f"{number} in {text!r}, expected at least {least}{limit}")
    return found


_Command = TypeVar("_Command", bound=Callable[..., Any])


def words_option(
    name: str, field: str, allowed: Sequence[str], text: str
) -> Callable[[_Command], _Command]:
    """Some of `allowed`, by default all, with commas between."""
    return click.option(
        name,
        field,
        default=",".join(allowed),
        show_default=True,
        callback=_words(allowed),
        help=text,
    )


architectures_option = words_option("--arch", "archs", ARCHITECTURES, "Of the GPUs to run on.")
operations_option = words_option("--operations", "operations", OPERATIONS, "Which of them.")
models_option = words_option("--models", "models", tuple(MODELS), "Whose shapes.")


def shape_options(command: _Command) -> _Command:
    """How large a model of real shapes is to be."""
    for option in (
        click.option("--vocabulary", type=click.IntRange(min=0), default=0, help="0: all of it."),
        click.option("--experts", type=click.IntRange(min=0), default=0, help="A layer; 0: all."),
        click.option("--layers", type=click.IntRange(min=1), default=2, show_default=True),
        click.option("--model", type=click.Choice(tuple(MODELS)), default="flash"),
    ):
        command = option(command)
    return command


def validate_options(command: _Command) -> _Command:
    """What `dsv4 validate` can be told."""
    for option in (
        click.option(
            "--html",
            "html_file",
            type=Target(),
            metavar="FILE",
            help="Write the report as one page for a browser.",
        ),
        click.option(
            "--json",
            "json_file",
            type=TargetOrStdout(),
            metavar="FILE",
            help="Write the report as JSON; - is stdout, and the tables then go to stderr.",
        ),
        click.option("--workers", type=click.IntRange(min=1), help="Cores to use.  [default: all]"),
        click.option(
            "--optimum",
            type=click.Choice(("sample", "full")),
            default="sample",
            show_default=True,
            help="With --source: round large tensors again in part, or in full, to show that no "
            "scales would have lost less.",
        ),
        click.option(
            "--checksums",
            type=click.Choice(("blake3", "xxh3")),
            default="blake3",
            show_default=True,
            help="xxh3 is faster than most disks, and no proof against forgery.",
        ),
        click.option("--quick", is_flag=True, help="Sizes and metadata only."),
        click.option(
            "--source",
            metavar="SRC",
            help="What DIR was made from, a hub id or a directory: undo every step from the bytes "
            "of DIR and compare tensor by tensor.",
        ),
    ):
        command = option(command)
    return command


experts_option = click.option(
    "--experts",
    type=ExpertsPlace(),
    default="auto",
    show_default=True,
    metavar="auto|resident|SIZE",
    help="On the GPU: as many as fit, all, or SIZE of them; the others in pinned host memory.",
)
draft_option = click.option(
    "--draft",
    type=DraftLength(),
    default="auto",
    show_default=True,
    metavar="auto|off|N",
    help="Guess tokens ahead and check them in one step: as long as that is faster, never, or N a "
    "step (0 to 7, and no more than draft layers propose). By the store's draft layers, else by "
    "what followed the last words before (prompt lookup). The text is the same.",
)
routes_option = click.option(
    "--routes",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Counts of experts to place by, and to add to; default: in the user's cache folder.",
)
