"""Blocks on several processes of this machine, each of which may die without costing more than its block.

`concurrent.futures` takes every worker down with the first that is killed, and Dask's local cluster brings a
scheduler, watchers and sockets for what is a queue of numbers. With a pipe to each process it is known which block
one died on.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from comir_hpc.blocks.block import ATTEMPTS, Carrier, Orders, Settle
from comir_hpc.errors import ComirError, ConfigError

# zarrs, torch and ITK do not survive a fork while their threads run.
_SPAWN = multiprocessing.get_context("spawn")
_THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "BLOSC_NTHREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)
_READY = "ready"


class _Queue:
    """Blocks not yet given out. A worker gets the one after its last, which shares most with it, while there is one."""

    def __init__(self, todo: Sequence[int], workers: int) -> None:
        # Reversed, so that the next one of each run is at its end.
        cuts = [len(todo) * n // workers for n in range(workers + 1)]
        self._runs = [list(todo[a:b])[::-1] for a, b in itertools.pairwise(cuts)]

    def take(self, last: int | None) -> int | None:
        """Take the next block for a worker whose last one was `last`."""
        runs = [run for run in self._runs if run]
        if not runs:
            return None
        for run in runs:
            # Neighbours share windows and chunks, so a worker goes on where it was.
            if run[-1] - 1 == last:
                return run.pop()
        longest = max(runs, key=len)
        if last is not None and len(longest) > 1:
            # Leave the first half to the worker that is in it.
            half = len(longest) // 2
            self._runs.append(longest[:half])
            del longest[:half]
            longest = self._runs[-1]
        return longest.pop()

    def put_back(self, block: int) -> None:
        """Take a block back from a worker that died."""
        self._runs.append([block])


class _Worker:
    """One process, the pipe to it and the block in its hands."""

    def __init__(self, payload: bytes) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, payload), daemon=True)
        with _interrupts_held():
            self.process.start()
        # With our copy of the far end open, `recv` would never learn that the process has died.
        theirs.close()
        self.ready = False
        self.block: int | None = None
        self.last: int | None = None

    @property
    def idle(self) -> bool:
        return self.ready and self.block is None

    def give(self, block: int, attempts: int) -> None:
        self.block = self.last = block
        self.pipe.send((block, attempts))

    def dismiss(self) -> None:
        self.pipe.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def run_in_processes(orders: Orders, workers: int) -> None:
    """Carry out blocks on spawned processes of this machine.

    Parameters
    ----------
    orders : Orders
        Blocks that are to be done, and what a worker needs for them.
    workers : int
        Number of processes.

    Raises
    ------
    ComirError
        If a worker could not start, or raised an error that ends the whole run.
    """
    workers = min(workers, len(orders.todo))
    queue, deaths = _Queue(orders.todo, workers), Counter[int]()
    with _threads_shared_by(workers):
        team = [_Worker(orders.payload) for _ in range(workers)]
        try:
            while True:
                for worker in team:
                    free = worker.idle and not orders.stop.is_set()
                    block = queue.take(worker.last) if free else None
                    if block is not None:
                        worker.give(block, orders.attempts(block) + deaths[block])
                busy = {worker.pipe: place for place, worker in enumerate(team) if not worker.idle}
                if not busy:
                    return
                for pipe in wait(list(busy)):
                    place = busy[pipe]  # type: ignore[index]
                    if not _listen(team[place], orders.settle):
                        _replace_dead(team[place], queue, deaths, orders.settle)
                        team[place] = _Worker(orders.payload)
        finally:
            for worker in team:
                worker.dismiss()


def _listen(worker: _Worker, settle: Settle) -> bool:
    """Take one message; False when the process is dead."""
    try:
        message: Any = worker.pipe.recv()
    except (EOFError, OSError):
        return False
    if message == _READY:
        worker.ready = True
    elif isinstance(message, BaseException):
        raise message
    else:
        block, worker.block = worker.block, None
        assert block is not None
        settle(block, message[0])
    return True


def _replace_dead(worker: _Worker, queue: _Queue, deaths: Counter[int], settle: Settle) -> None:
    """Dismiss a worker that has died, and give its block to another one, or give it up after several deaths."""
    worker.dismiss()
    how = _how_it_ended(worker.process.exitcode)
    # It died while it unpacked the work. The next one would do the same, so the run ends.
    if worker.block is None:
        raise ConfigError(
            f"a worker process {how} before its first block; if this is a script, "
            "call us under `if __name__ == '__main__':`"
        )
    deaths[worker.block] += 1
    if deaths[worker.block] < ATTEMPTS:
        queue.put_back(worker.block)
    else:
        settle(worker.block, f"the worker process {how} each time (out of memory?)")


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _serve(pipe: Connection, payload: bytes) -> None:
    """Carry out the blocks that come through the pipe until it closes."""
    # The scheduler signals every process of a job, the terminal every one of a group: only the first process
    # answers, by handing out no more blocks.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        carrier = Carrier.unpack(payload)
        pipe.send(_READY)
        while True:
            index, attempts = pipe.recv()
            pipe.send((carrier(index, attempts),))
    except ComirError as error:
        pipe.send(error)
    except (EOFError, ConnectionError):
        return


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C from the processes started meanwhile, from their first moment on; we get it afterwards."""
    resource_tracker.ensure_running()  # started later, it would let interrupts through again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Were it to go on after its parent was killed, it would meet the next run in the same block.
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _threads_shared_by(workers: int) -> Iterator[None]:
    """Have the processes started meanwhile share the cores, unless the user said how many threads to use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    missing = [name for name in _THREAD_LIMITS if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, str(max(1, cores // workers))))
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
