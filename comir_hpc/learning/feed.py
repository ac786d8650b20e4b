"""Feed a training with draws and with the boxes that they need, which other processes read ahead."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from comir_hpc.learning.sampler import Draw, Sampler


class _Boxes(Dataset[list[Tensor]]):
    """Open the volumes once in a reader process, then read the box of one sample at a time."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __getitem__(self, key: tuple[int, int]) -> list[Tensor]:
        return self.sampler.read(self.sampler.draw(*key))


def _ignore_signals(worker: int) -> None:
    # The scheduler sends its signals to every process of the job. The main process saves, and then ends its readers.
    del worker
    for name in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def feed(
    sampler: Sampler, steps: range, indices: Sequence[int], *, workers: int
) -> Iterator[tuple[list[Draw], list[list[Tensor]]]]:
    """Give, step by step, the draws of the samples `indices` and the source boxes read for them.

    Parameters
    ----------
    sampler : Sampler
        Draws the samples, and reads or makes their voxels.
    steps : range
        Numbers of the optimiser steps.
    indices : sequence of int
        Numbers of this rank's samples in each step.
    workers : int
        Number of processes that read ahead. With 0, or when all volumes are in memory, this process reads.
    """
    ahead = workers > 0 and not sampler.cached
    boxes = iter(_readers(sampler, steps, indices, workers)) if ahead else None
    for step in steps:
        draws = [sampler.draw(step, index) for index in indices]
        if boxes is None:
            yield draws, [sampler.read(draw) for draw in draws]
        else:
            yield draws, [next(boxes) for _ in draws]


def _readers(
    sampler: Sampler, steps: range, indices: Sequence[int], workers: int
) -> DataLoader[list[Tensor]]:
    return DataLoader(
        _Boxes(sampler),
        sampler=((step, index) for step in steps for index in indices),
        # One sample a message: a batch is made on the device, from draws that this process knows anyway.
        batch_size=None,
        num_workers=workers,
        # Two steps are read ahead, spread over the workers.
        prefetch_factor=max(2, -(-2 * len(indices) // workers)),
        # A new process, and not a fork: the threads of tensorstore and torch do not survive a fork.
        multiprocessing_context="spawn",
        worker_init_fn=_ignore_signals,
    )
