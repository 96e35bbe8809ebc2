"""Ctrl-C counts at every moment, also while modules are imported.

Importing torch imports numpy from C++, which takes any exception to mean that numpy is not there: a
KeyboardInterrupt raised meanwhile is dropped and the program goes on. So a SIGINT that arrives
during an import ends the process at once, and so does one that Python itself drops, in a destructor
or a callback of the garbage collector. Nothing is lost: everything that is written to disk is
written so that the process may be killed at any moment.

Imports nothing but the standard library: `__main__` comes here before all else.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

EXIT_INTERRUPTED = 130
SENTENCE = b"dsv4: interrupted\n"
_CLEAR = b"\r\x1b[K\x1b[?25h"  # a spinner's line, and the cursor that it hides
_IMPORT = "<frozen importlib._bootstrap>"


def install() -> None:
    """From now on a SIGINT ends an import, and raises KeyboardInterrupt elsewhere."""
    # Whoever starts a program in the background has SIGINT ignored: that is kept.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = _dropped


def interrupt(number: int, frame: FrameType | None) -> None:
    """For `signal.signal`. Raises KeyboardInterrupt unless a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            _leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _dropped(what: sys.UnraisableHookArgs, /) -> None:
    """For `sys.unraisablehook`: an exception that nobody can catch."""
    if what.exc_type is KeyboardInterrupt:
        _leave()
    sys.__unraisablehook__(what)


def _leave() -> None:
    error = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
    os.write(error, _CLEAR + SENTENCE if os.isatty(error) else SENTENCE)
    os._exit(EXIT_INTERRUPTED)
