"""What `dsv4 run` can be told. Everything is checked here, before a model is looked for."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from dsv4.commands.options import draft_option, experts_option, routes_option

MAX_SEED = (1 << 63) - 1
MAX_TOKEN_ID = (1 << 31) - 1
TEXT_HELP = "`@FILE` takes it from a file, `-` from stdin, `@@` begins a text with @."

Effort = Literal["low", "high", "max"]


class Number(click.ParamType[float]):
    """A finite number, from `low` (or above it) up to `high`."""

    name = "float"

    def __init__(self, low: float, high: float = math.inf, *, above: bool = False) -> None:
        self.low, self.high, self.above = low, high, above

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number meant; refuses all others."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        inside = self.low <= number <= self.high and not (self.above and number == self.low)
        if not (inside and math.isfinite(number)):
            most = "up" if self.high == math.inf else f"to {self.high:g}"
            least = f"above {self.low:g}, " if self.above else f"from {self.low:g} "
            self.fail(f"{number} is not a finite number {least}{most}", param, ctx)
        return number


class TokenIds(click.ParamType[list[int]]):
    """1,2,3"""

    name = "ids"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        """The ids; refuses what is not one."""
        if isinstance(value, list):
            return value
        ids = []
        for part in map(str.strip, str(value).split(",")):
            if not (part.isascii() and part.isdecimal()) or int(part) > MAX_TOKEN_ID:
                self.fail(f"{part!r}, expected token ids separated by commas", param, ctx)
            ids.append(int(part))
        return ids


class Prose(click.ParamType[str]):
    """Text, or where it stands: `@FILE`, or `-` for stdin."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text; refuses one that is empty, missing or not UTF-8."""
        spelling, where = str(value), "the text"
        try:
            if spelling == "-":
                where = "stdin"
                text = sys.stdin.buffer.read().decode()
            elif spelling.startswith("@") and not spelling.startswith("@@"):
                where = spelling[1:]
                text = Path(where).read_bytes().decode()
            else:
                text = spelling.removeprefix("@") if spelling.startswith("@@") else spelling
        except UnicodeDecodeError as error:
            self.fail(f"{where} is not UTF-8 at byte {error.start}", param, ctx)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            self.fail(f"{where!r} cannot be read: {reason}", param, ctx)
        if not text.strip():
            self.fail(f"{where} is empty", param, ctx)
        return text


@dataclasses.dataclass(frozen=True)
class Wish:
    """A call of `dsv4 run`. The names are those of its options."""

    prompt: str | None
    tokens: list[int] | None
    system: str | None
    think: bool
    effort: Effort
    max_new_tokens: int | None
    max_seq_len: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    device: Literal["auto", "cpu", "cuda"]
    experts: Literal["auto", "resident"] | int
    routes: Path | None
    draft: Literal["auto", "off"] | int
    raw: bool
    as_json: bool
    quiet: bool
    verbose: bool

    def __post_init__(self) -> None:
        """Raises click.UsageError for options that contradict each other."""
        if self.prompt is not None and self.tokens is not None:
            raise click.UsageError("--prompt and --tokens exclude each other")
        if self.is_chat and (self.raw or self.as_json):
            raise click.UsageError("--raw and --json need --prompt or --tokens")
        if (self.raw or self.tokens is not None) and (self.system or self.think):
            raise click.UsageError("--system and --think need the chat template of a --prompt")
        if self.quiet and self.verbose:
            raise click.UsageError("--quiet and --verbose exclude each other")
        if "" in self.stop:
            raise click.BadParameter("the text is empty", param_hint="'--stop'")

    @property
    def is_chat(self) -> bool:
        """Whether there is neither a prompt nor token ids."""
        return self.prompt is None and self.tokens is None


_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--prompt",
        type=Prose(),
        help=f"Answer TEXT and leave; without it, an interactive chat. {TEXT_HELP}",
    ),
    click.option("--tokens", type=TokenIds(), metavar="1,2,3", help="Continue these ids."),
    click.option("--system", type=Prose(), help="The system prompt; @FILE as in --prompt."),
    click.option("--think", is_flag=True, help="Reason first; shown apart, on stderr."),
    click.option(
        "--effort",
        type=click.Choice(("low", "high", "max")),
        default="low",
        show_default=True,
        help="How long --think reasons.",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="Bound on an answer, reasoning included; default: the checkpoint's, or the room.",
    ),
    click.option(
        "--max-seq-len",
        type=click.IntRange(min=1),
        metavar="N",
        help="Room for prompts and answers together; default: 8192, or the model's if less.",
    ),
    click.option("--temperature", type=Number(0), help="0 is greedy; default: the checkpoint's."),
    click.option(
        "--top-p", type=Number(0, 1, above=True), help="Nucleus; default: the checkpoint's."
    ),
    click.option(
        "--top-k", type=click.IntRange(min=0), help="0 is all tokens; default: the checkpoint's."
    ),
    click.option(
        "--min-p",
        type=Number(0, 1),
        help="Least share of the likeliest token's chance; default: the checkpoint's.",
    ),
    click.option(
        "--seed", type=click.IntRange(0, MAX_SEED), help="Equal seeds give equal answers."
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="End the answer before this text; may be given several times.",
    ),
    click.option(
        "--device",
        type=click.Choice(("auto", "cpu", "cuda")),
        default="auto",
        show_default=True,
        help="auto: the GPU where it can be used, else the CPU.",
    ),
    experts_option,
    routes_option,
    draft_option,
    click.option("--raw", is_flag=True, help="Skip the chat template."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end."),
    click.option("--quiet", is_flag=True, help="No lines on timing."),
    click.option("--verbose", is_flag=True, help="Also what starting and loading took."),
)


def run_options(command: _Command) -> _Command:
    """All of them; the command takes them as keywords, for `Wish`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
