"""Where a chat is seen: answers on stdout, all else on stderr; lines edited on a terminal.

prompt_toolkit reads the lines: it knows a paste of several lines from typed ones and takes lines of
any length, whichever line editor this Python was built with (readline, libedit or none).
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from dsv4.runtime.text.generate import Timings
    from dsv4.runtime.text.pieces import Part

PROMPT, MORE = "> ", ". "
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def colourful(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that shows colours, and nobody has forbidden them."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Writer:
    """Writes an answer as it comes: on stdout the answer alone, its reasoning on stderr.

    Reasoning is dim on a terminal, and stands between marks elsewhere.
    """

    def __init__(self) -> None:
        self._dim = colourful(sys.stderr)
        self._reasoning = False
        self._line_open = False

    def show(self, part: Part) -> None:
        """One piece."""
        if part.reasoning != self._reasoning:
            self._change(part.reasoning)
        stream = sys.stderr if part.reasoning else sys.stdout
        text = part.text.replace("\x1b", "␛") if stream.isatty() else part.text
        if part.reasoning and self._dim:
            text = f"{_DIM}{text}{_PLAIN}"
        stream.write(text)
        stream.flush()
        self._line_open = not part.text.endswith("\n")

    def end(self) -> None:
        """The answer is over: the line it stands on, too."""
        if self._reasoning:
            self._change(False)
        if self._line_open:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._line_open = False

    def _change(self, reasoning: bool) -> None:
        if not self._dim:
            mark = "<think>\n" if reasoning else "</think>\n"
        else:
            mark = "" if reasoning else "\n"
        say(("\n" if self._line_open else "") + mark, end="")
        self._reasoning, self._line_open = reasoning, False


class PlainScreen:
    """Lines from stdin as they are; nothing but answers and notes is written.

    editing: whether a person sits there.
    """

    editing = False

    def __init__(self) -> None:
        self._writer = Writer()

    def read(self, more: bool) -> str:
        """The next line."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")

    def show(self, part: Part) -> None:
        """A piece of the answer."""
        self._writer.show(part)

    def end(self, timings: Timings | None) -> None:
        """A line's end."""
        self._writer.end()

    def note(self, sentence: str) -> None:
        """On stderr."""
        say(sentence)


class TerminalScreen(PlainScreen):
    """A person at a terminal: editing, history, colours, a blank line between turns, rates."""

    editing = True

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self._quiet = quiet
        self._dim = colourful(sys.stderr)
        self._session = _prompt_session()

    def read(self, more: bool) -> str:
        """A line that was edited, or several that were pasted."""
        shown = MORE if more else PROMPT
        return self._session.prompt([("class:prompt", shown)])

    def end(self, timings: Timings | None) -> None:
        """The rate, and a blank line."""
        super().end(timings)
        if timings is not None and not self._quiet:
            line = f"{timings.generated_tokens} tokens, {timings.tokens_per_second:.1f} tokens/s"
            drafts = "" if timings.drafts is None else timings.drafts.line()
            self._say_dim(f"{line}; {drafts}" if drafts else line)
        say("")

    def note(self, sentence: str) -> None:
        """Dim, so that it is not taken for an answer."""
        self._say_dim(sentence)

    def _say_dim(self, text: str) -> None:
        say(f"{_DIM}{text}{_PLAIN}" if self._dim else text)


def open_screen(*, quiet: bool) -> PlainScreen:
    """A terminal where stdin and stderr are one, else plain lines."""
    if sys.stdin.isatty() and sys.stderr.isatty():
        return TerminalScreen(quiet=quiet)
    return PlainScreen()


def say(text: str, end: str = "\n") -> None:
    """On stderr, at once."""
    sys.stderr.write(text + end)
    sys.stderr.flush()


def _prompt_session() -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import ColorDepth
    from prompt_toolkit.output.vt100 import Vt100_Output
    from prompt_toolkit.styles import Style

    output = Vt100_Output.from_pty(sys.stderr, os.environ.get("TERM"))
    output.enable_cpr = False  # nothing is drawn below the line: no need to ask where it is
    style = Style.from_dict({"prompt": "ansicyan bold"})
    depth = None if colourful(sys.stderr) else ColorDepth.MONOCHROME
    return PromptSession(output=output, style=style if depth is None else None, color_depth=depth)
