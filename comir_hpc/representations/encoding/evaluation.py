"""Evaluate windows: on a CPU one on each thread, on a GPU in batches of one shape. Results keep the order given.

The arithmetic of one window must not depend on the windows that are evaluated beside it. On a CPU, convolutions in
fp32 give other last bits for another number of threads or another batch (measured: 1e-6). So there, every window is a
batch of its own on one thread, and as many threads work as torch has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.representations.encoding.grid import Window

Array = NDArray[np.float32]
Cut = tuple[Window, Array]
Evaluate = Callable[[Array], Array]
Item = TypeVar("Item")


def on_threads(evaluate: Evaluate, cuts: Iterable[Cut]) -> Iterator[Cut]:
    """Evaluate windows one by one, each on one thread, and as many at once as torch has threads."""

    def one(window: Window, cut: Array) -> Cut:
        try:
            return window, evaluate(np.ascontiguousarray(cut)[None])[0]
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                raise
            raise VolumeError(
                f"a window of {cut.shape[1:]} voxels does not fit into memory; run `comir-hpc infer` with a "
                "smaller --window"
            ) from error

    count = torch.get_num_threads()
    # PyTorch releases Python's lock while it computes, so threads suffice and share the weights.
    with _single_threaded() as initialise, ThreadPoolExecutor(count, initializer=initialise) as pool:
        yield from _in_order(pool, one, iter(cuts), ahead=2 * count)


@contextmanager
def _single_threaded() -> Iterator[Callable[[], None]]:
    """Give a function that makes torch use one thread inside the thread that calls it.

    Afterwards, new threads use all of them again.
    """
    before = torch.get_num_threads()
    try:
        yield lambda: torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[..., Item], items: Iterator[tuple[Any, ...]], ahead: int
) -> Iterator[Item]:
    """Give the results in the order of the items; at most `ahead` of them are begun and not yet taken."""
    running: deque[Future[Item]] = deque(pool.submit(work, *item) for item in islice(items, ahead))
    while running:
        result = running.popleft().result()
        running.extend(pool.submit(work, *item) for item in islice(items, 1))
        yield result


def in_batches(evaluate: Evaluate, cuts: Iterable[Cut], size: int) -> Iterator[Cut]:
    """Evaluate windows together on a GPU; batches have one shape, the last one filled up with zeros."""
    waiting = iter(cuts)
    pending: list[Cut] = []
    while pending := pending or list(islice(waiting, size)):
        # Filled up with zeros: on a GPU the shape of a batch may change last bits, and the last batch is rarely full.
        batch = np.zeros((size, *pending[0][1].shape), dtype=np.float32)
        for place, (_, cut) in enumerate(pending[:size]):
            batch[place] = cut
        try:
            encoded = evaluate(batch)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            # Half as many windows at a time are tried next. The shape of a batch changes with it, but a GPU has to
            # give a result at all.
            if size == 1:
                raise VolumeError(
                    f"a window of {pending[0][1].shape[1:]} voxels does not fit into the memory of the GPU; "
                    "run `comir-hpc infer` with a smaller --window"
                ) from error
            size //= 2
            continue
        for (window, _), one in zip(pending[:size], encoded, strict=False):
            yield window, one
        pending = pending[size:]
