"""How far the work is: bars on a terminal, a line every tenth in a batch log and in the log file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from comir_hpc.commands.terminal import Terminal
from comir_hpc.errors import printable
from comir_hpc.host.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars


@contextmanager
def progress_on(terminal: Terminal) -> Iterator[Progress]:
    """Give a callable `progress(what, done, total)` that shows how far the work is."""
    lines = _Tenths(terminal)
    if terminal.quiet or sys.stderr is None or not sys.stderr.isatty():
        yield lines
        return
    from rich.console import Console
    from rich.progress import Progress as NewBars

    # The bars go when the work is done: what stays in the terminal is the result.
    with NewBars(console=Console(stderr=True), transient=True) as bars:
        yield _Bars(bars, lines)


class _Tenths:
    """A line whenever another tenth of something is done."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._tenths: dict[str, int] = {}

    def due(self, what: str, done: int, total: int) -> bool:
        """Return whether another tenth is done since the last call."""
        tenth = 10 * done // max(total, 1)
        due = tenth > self._tenths.get(what, -1)
        if due:
            self._tenths[what] = tenth
        return due

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.due(what, done, total):
            self._terminal.progress(f"{what}: {done}/{total}")

    def record(self, what: str, done: int, total: int) -> None:
        """Write the line to the log file only: the terminal has a bar."""
        if self.due(what, done, total):
            self._terminal.record("progress", f"{what}: {done}/{total}")


class _Bars:
    """A bar for everything that is counted."""

    def __init__(self, bars: Bars, lines: _Tenths) -> None:
        self._bars, self._lines = bars, lines
        self._tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            from rich.markup import escape

            # A file's name may hold what rich would take for a style, or characters that move the cursor.
            self._tasks[what] = self._bars.add_task(escape(printable(what)), total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)
        self._lines.record(what, done, total)
