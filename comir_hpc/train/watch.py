"""The loop's clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Elapsed:
    """Steps done, and seconds that they and the waiting for their data took."""

    steps: int
    seconds: float


class Clock:
    """Seconds spent in steps and in waiting for data since the last line of metrics, and since the last save."""

    def __init__(self) -> None:
        self._reset()
        self.saved()

    def _reset(self) -> None:
        self._steps, self._work, self._wait = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    @contextmanager
    def working(self) -> Iterator[None]:
        """Time spent inside is one step."""
        start = time.perf_counter()
        yield
        self._work += time.perf_counter() - start
        self._steps += 1

    def read(self) -> tuple[Elapsed, float]:
        """Steps and seconds, and seconds of waiting among them, since the last call."""
        elapsed, waited = Elapsed(self._steps, self._work + self._wait), self._wait
        self._reset()
        return elapsed, waited

    def saved(self) -> None:
        """Say that a checkpoint was written now."""
        self._save = time.monotonic()

    def since_save(self) -> float:
        """Seconds since the last checkpoint, or since the start."""
        return time.monotonic() - self._save
