"""Requests to stop: the scheduler's signals as a flag that long work looks at."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Schedulers send one of these before they kill. USR1 is left alone: NCCL uses it.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Turn SIGTERM and SIGUSR2 into a flag while the ``with`` lasts.

    Signals reach the main thread only. In any other thread the flag is never set, since the main thread belongs to
    whoever called us.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    asked = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        del number, frame
        # Schedulers send a signal more than once, and the next may come while `set` holds the event's lock. The same
        # thread would then wait for itself for ever.
        if not asked:
            asked = True
            stop.set()

    before = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
