"""What a command says, and where: results on stdout, everything else on stderr, all of it in the log file if asked.

This is the one place where text is made fit for a terminal. Control characters are shown as escapes, as in every
error: a file's name or header may hold some. Messages are folded to one line and cut; the log file keeps them whole.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import typer

from comir_hpc.errors import ComirError, ConfigError, printable

LONGEST_MESSAGE = 600
"""Characters of a message that are printed: a dozen lines of a terminal at most."""
_END = 180  # characters of it that are kept from the message's end, where the remedy stands


class Terminal:
    """Where a command's words go.

    Standard output gets results only, so that they can be piped. Everything else goes to standard error.

    Attributes
    ----------
    quiet : bool
        Whether progress and notes are left out.
    output : Path or None
        File, store or folder that the command writes; a traceback is kept beside it or in it.
    """

    def __init__(self) -> None:
        self.quiet = False
        self.output: Path | None = None
        self._log: TextIO | None = None

    def listen(self, *, quiet: bool, log: Path | None) -> None:
        """Take the options that every verb has.

        Raises
        ------
        ConfigError
            If the log file cannot be written.
        """
        self.quiet = quiet
        if log is None:
            return
        try:
            self._log = log.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--log {log} cannot be written ({error.strerror}); name another file"
            ) from error
        self.record("command", shlex.join(sys.argv))

    def result(self, text: str) -> None:
        """Print what was asked for, on stdout, line by line."""
        for line in text.splitlines():
            self.record("result", line)
            _print(printable(line), sys.stdout)

    def note(self, text: str) -> None:
        """Say something that the user should know and need not act on."""
        self.record("note", text)
        if not self.quiet:
            _print(f"note: {shortened(text)}", sys.stderr)

    def progress(self, text: str) -> None:
        """Say how far the work is, on a terminal that shows no bars."""
        self.record("progress", text)
        if not self.quiet:
            _print(printable(text), sys.stderr)

    def stopped(self, text: str) -> None:
        """Say that the work ended early and how it goes on."""
        self.record("stopped", text)
        _print(shortened(text), sys.stderr, typer.colors.YELLOW)

    def refused(self, text: str) -> None:
        """Say why the work was not done, as one red line."""
        self.record("error", text)
        _print(shortened(text), sys.stderr, typer.colors.RED)

    def record(self, kind: str, text: str) -> None:
        """Write a line to the log file, if there is one; a log that fails is given up with a note."""
        if self._log is None:
            return
        try:
            lines = "\n".join(map(printable, text.splitlines()))
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {kind}: {lines}\n")
            self._log.flush()
        except OSError as error:
            broken, self._log = self._log, None
            with contextlib.suppress(OSError):
                broken.close()
            self.note(f"the log file cannot be written any more ({error.strerror})")


def shortened(text: str) -> str:
    """Return a message as one printable line of at most `LONGEST_MESSAGE` characters: its beginning and its end."""
    line = printable(" ".join(text[: 100 * LONGEST_MESSAGE].split()))
    if len(line) <= LONGEST_MESSAGE and len(text) <= 100 * LONGEST_MESSAGE:
        return line
    end = printable(" ".join(text[-2 * _END :].split()))[-_END:]
    mark = f" [... {len(text)} characters, --log FILE keeps them ...] "
    return line[: LONGEST_MESSAGE - _END - len(mark)] + mark + end


def open_streams() -> None:
    """Make the three standard streams usable whatever the caller closed, and never fail on a character.

    A file opened later must not get the number of a closed stream: what a library prints would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Write out what is left; a reader that has gone away (`| head`) is no error."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with _reader_may_leave(stream):
                stream.flush()


def _print(line: str, stream: TextIO | None, colour: str | None = None) -> None:
    if stream is None:  # closed by whoever started us
        return
    with _reader_may_leave(stream):
        typer.echo(typer.style(line, fg=colour) if colour else line, file=stream)
        stream.flush()


@contextlib.contextmanager
def _reader_may_leave(stream: TextIO) -> Iterator[None]:
    """Let a stream fail: quietly when nobody reads it any more, as an error when a result cannot be written.

    Raises
    ------
    ComirError
        If what belongs on stdout cannot be written, e.g. to a file on a full disk.
    """
    try:
        yield
    except OSError as error:
        # What is still in the buffer goes nowhere: Python would try again at its end, and complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError) and stream is sys.stdout:
            raise ComirError(
                f"the result cannot be printed ({error.strerror}); it is on disk if the verb writes one"
            ) from error
