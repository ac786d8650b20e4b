"""Measure the time that the training loop spends in steps and in waiting for data, and the memory that it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from comir_hpc.host.memory import peak_bytes


@dataclass(frozen=True)
class Elapsed:
    """Number of steps done, and seconds that they took, with the waiting for their data."""

    steps: int
    seconds: float


class Clock:
    """Measure seconds spent in steps and in waiting since the last line of metrics, and since the last save.

    Waiting is kept apart from work, since it is what more reader processes can shorten.
    """

    def __init__(self) -> None:
        self._reset()
        self.saved()

    def _reset(self) -> None:
        self._steps, self._work, self._wait = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the time spent inside as one step."""
        start = time.perf_counter()
        yield
        self._work += time.perf_counter() - start
        self._steps += 1

    def read(self) -> tuple[Elapsed, float]:
        """Return steps and seconds since the last call, and how many of the seconds were spent waiting."""
        elapsed, waited = Elapsed(self._steps, self._work + self._wait), self._wait
        self._reset()
        return elapsed, waited

    def saved(self) -> None:
        """Note that a checkpoint was written now."""
        self._save = time.monotonic()

    def since_save(self) -> float:
        """Return the seconds since the last checkpoint, or since the start."""
        return time.monotonic() - self._save


def peak_memory_mib(device: torch.device) -> float:
    """Measure the most memory used so far, in MiB: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_bytes() / 2**20
