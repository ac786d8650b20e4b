"""Ctrl-C: the work ends where it is, with a word and exit code 130; all that is written is written whole."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED = 130
INTERRUPTED = "interrupted; the same command continues"


class Interrupt:
    """Remember that Ctrl-C was pressed: a library that is interrupted while it loads reports some other error.

    Attributes
    ----------
    requested : bool
        Whether the user has pressed Ctrl-C.
    """

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Take SIGINT from now on, unless whoever started us wants it ignored (nohup, a job in the background)."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupted)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.leave()  # who asks twice does not want to wait until threads are at rest
        self.requested = True
        raise KeyboardInterrupt

    @staticmethod
    def leave() -> NoReturn:
        """End this process at once, with the word.

        Python's own way out would wait for threads, and may replace the exit code by death of SIGINT.
        """
        try:
            os.write(2, f"{INTERRUPTED}\n".encode())
        finally:
            os._exit(EXIT_INTERRUPTED)
