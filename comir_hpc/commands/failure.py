"""How a command ends: every way has a line and an exit code, and no traceback is lost or thrown at the user.

0 is done, 1 a refusal or a failure, 2 a command that cannot be understood, 85 stopped on request, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from comir_hpc import __version__
from comir_hpc.commands.interrupt import EXIT_INTERRUPTED, INTERRUPTED, Interrupt
from comir_hpc.commands.terminal import Terminal
from comir_hpc.errors import ComirError, StopRequested, UnsavedResult
from comir_hpc.host.files import write_text

EXIT_REFUSED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 85

# A command that cannot be understood. Typer exports this class's child only; newer ones have a click of their own.
UsageError: Any = typer.BadParameter.__base__
_LONGEST_CAUSE = 250  # characters of an unexpected error, so that the place of the traceback is never cut


def carry_out(action: Callable[[], Any], terminal: Terminal, interrupt: Interrupt) -> int:
    """Run a command to its end, say how it ended, and return the exit code.

    Parameters
    ----------
    action : callable
        Runs the command; a returned number is the exit code.
    terminal : Terminal
        Terminal on which the failure is reported.
    interrupt : Interrupt
        Knows of Ctrl-C. After it every error is taken for its consequence.
    """
    try:
        code = action()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  (the last place where anything can be caught, and it is all said)
        _record_traceback(error, terminal)
        code = EXIT_INTERRUPTED if interrupt.requested else _said(error, terminal)
    if code == EXIT_INTERRUPTED:
        terminal.stopped(INTERRUPTED)
    return code if isinstance(code, int) else 0


def _said(error: Exception, terminal: Terminal) -> int:
    """Say what went wrong, as one line; return the exit code."""
    if isinstance(error, StopRequested):
        terminal.stopped(str(error))
        return EXIT_STOPPED
    if isinstance(error, UsageError):
        command = error.ctx.command_path if error.ctx else "comir-hpc"
        terminal.refused(f"{error.format_message()} See `{command} --help`.")
        return EXIT_USAGE
    if isinstance(error, UnsavedResult):
        terminal.result(error.content)  # minutes of search, which no file could take
    terminal.refused(str(error) if isinstance(error, ComirError) else _unexpected(error, terminal))
    return EXIT_REFUSED


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _record_traceback(error: Exception, terminal: Terminal) -> None:
    """Write the traceback to the log file, and to stderr if COMIR_TRACEBACK=1."""
    terminal.record("traceback", _traceback(error))
    if os.environ.get("COMIR_TRACEBACK") == "1":
        typer.echo(_traceback(error), err=True)


def _unexpected(error: Exception, terminal: Terminal) -> str:
    """Keep the traceback of a mistake of ours in a file, and say what happened and where that file is."""
    text = _traceback(error)
    cause = " ".join(str(error).split()) or "no message"
    said = f"unexpected {type(error).__name__}: {cause[:_LONGEST_CAUSE]}"
    record = (
        f"comir-hpc {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"command: {sys.argv!r}\nfolder: {Path.cwd()}\n\n{text}"
    )
    name = f"comir-hpc-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in _places(terminal):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / name, record)
        except OSError:
            continue
        return f"{said}; the traceback is in {folder / name}, please report it with that file"
    typer.echo(text, err=True)
    return f"{said}; please report it with the traceback above, which could be written nowhere"


def _places(terminal: Terminal) -> Iterator[Path]:
    """Yield the folders that may take the traceback: where the command writes, the user's cache, the machine's."""
    if terminal.output is not None:
        place = terminal.output
        inside = place.is_dir() and place.suffix != ".zarr"  # a store holds nothing but voxels
        folder = place if inside else place.parent
        if folder.is_dir():
            yield folder
    cache = os.environ.get("XDG_CACHE_HOME") or (
        Path("~/.cache").expanduser() if "HOME" in os.environ else None
    )
    if cache:
        yield Path(cache) / "comir-hpc"
    yield Path(tempfile.gettempdir())
