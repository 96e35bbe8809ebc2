"""How a command ends: every error of ours, and of the machine, becomes one sentence and a code.

Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input, 3 out of space or memory,
4 the network failed, 130 interrupted (resumable), 143 terminated.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import click

from dsv4.commands.console import err
from dsv4.extras import missing_ones_named
from dsv4.formats.errors import Dsv4Error
from dsv4.formats.plain_text import printable

MAX_SENTENCE = 2000
EXIT_FAILED, EXIT_USAGE, EXIT_SPACE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 3, 130, 143


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Terminated(BaseException):
    """SIGTERM, where a command ends in order."""


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """For `signal.signal`."""
    raise Terminated


@contextlib.contextmanager
def endings() -> Iterator[None]:
    """Leave the process as the module says."""
    try:
        with missing_ones_named():
            yield
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except (KeyboardInterrupt, click.Abort):
        err.print("dsv4: interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except Terminated:
        err.print("dsv4: terminated")
        sys.exit(EXIT_TERMINATED)
    except Dsv4Error as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except MemoryError:
        _say("out of memory")
        sys.exit(EXIT_SPACE)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported
            raise
        _say(f"out of device memory: {str(error).split('. ')[0]}")
        sys.exit(EXIT_SPACE)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_FAILED)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        _say(f"{where}{error.strerror or error}")
        sys.exit(EXIT_SPACE if error.errno in _NO_SPACE else EXIT_USAGE)


def _say(sentence: str) -> None:
    err.print(printable(f"dsv4: {sentence}", MAX_SENTENCE))
