"""Where the work on blocks runs: in this process, on several, on Dask's, or as one part of an array job.

What is sent around is the number of a block, never voxels: whoever computes a block reads what it needs and writes
its own shards. Every path makes the same calls in the same order within a block, so a result cannot depend on which
of them ran, and what is done is in the ledger, so it cannot depend on how often they were stopped.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TypedDict, Unpack

from comir_hpc.cluster.carry import BlockResult, Carrier, Work, pack
from comir_hpc.cluster.coarse import build_pyramid
from comir_hpc.cluster.outputs import complete_output, open_output
from comir_hpc.cluster.prediction import Figures, measured, side_by_side
from comir_hpc.cluster.processes import Settle, run_in_processes
from comir_hpc.cluster.scheduler import run_with_dask
from comir_hpc.errors import StopRequested, VolumeError
from comir_hpc.geometry import BlockPlan
from comir_hpc.ledger import Ledger
from comir_hpc.volume import Volume

__all__ = [
    "BlockResult",
    "BlockRun",
    "Figures",
    "Filled",
    "Progress",
    "Work",
    "build_pyramid",
    "complete_output",
    "fill_output",
    "open_output",
    "run_blocks",
    "side_by_side",
]

Progress = Callable[[str, int, int], None]

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class BlockRun:
    """What one call of `run_blocks` did."""

    blocks: int
    computed: int
    seconds: float

    @property
    def skipped(self) -> int:
        """Blocks that were done already."""
        return self.blocks - self.computed


@dataclass(frozen=True)
class Filled:
    """What one call of `fill_output` did.

    Attributes
    ----------
    blocks, computed, missing : int
        Blocks of this part; those it computed; those of all parts that are still to be done.
    seconds : float
        Since `begun`.
    predicted, measured : Figures
        What the call was expected to need, and what it needed.
    """

    blocks: int
    computed: int
    missing: int
    seconds: float
    predicted: Figures
    measured: Figures


@dataclass
class _Outcome:
    """Failures gathered while the other blocks go on."""

    failed: dict[int, str] = field(default_factory=dict)
    done: int = 0


class Running(TypedDict, total=False):
    """How blocks are done; `run_blocks` says what each of these means."""

    workers: int
    cluster: str | None
    verify: bool
    progress: Progress | None
    what: str


def run_blocks(
    plan: BlockPlan,
    indices: Iterable[int],
    work: Work,
    ledger: Ledger,
    *,
    workers: int = 1,
    cluster: str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
    what: str = "blocks",
) -> BlockRun:
    """Compute and write the blocks of `indices` that are not done yet.

    Parameters
    ----------
    plan : BlockPlan
        Of the output volume, which exists at ``ledger.store``.
    indices : iterable of int
        Block numbers: all of them, or ``plan.part(i, n)`` in an array job.
    work : Work
        Called with a `Block`, returns its voxels; picklable if `workers` > 1 or a cluster is given.
    workers : int
        Processes (spawned), on this machine unless `cluster` says otherwise.
    cluster : str, optional
        ``dask://HOST:PORT`` for a scheduler that runs already; ``slurm`` for workers as SLURM jobs (dask-jobqueue,
        with the site's settings from ``~/.config/dask/jobqueue.yaml``).
    verify : bool
        Check the content of those of them that are finished first, and do the damaged ones again.
    progress : callable, optional
        ``progress(what, done, total)``.

    Raises
    ------
    StopRequested
        After SIGTERM or SIGUSR2, when the blocks in hand are finished. The same call goes on.
    VolumeError
        When a block failed twice: every such block with its box, and their number, after all others were done. At once
        when the disk is full.
    """
    start = time.monotonic()
    wanted = list(indices)
    if verify:
        ledger.forget(ledger.verify(wanted))
    done = ledger.done()
    todo = [index for index in wanted if index not in done]
    outcome = _Outcome(done=len(wanted) - len(todo))

    def settle(index: int, failure: str | None) -> None:
        if failure:
            outcome.failed[index] = failure
            return
        outcome.done += 1
        if progress is not None:
            progress(what, outcome.done, len(wanted))

    if progress is not None and wanted:
        progress(what, outcome.done, len(wanted))
    if todo:
        _reopen(ledger.store)
        with _stop_flag() as stop:
            if cluster is not None:
                payload = pack(plan, work, ledger)
                run_with_dask(payload, todo, ledger.attempts, workers, stop, settle, cluster)
            elif workers > 1:
                run_in_processes(pack(plan, work, ledger), todo, ledger.attempts, workers, stop, settle)
            else:
                _run_here(Carrier(plan, work, ledger), todo, stop, settle)
        _report(plan, outcome, len(wanted), stop)
    return BlockRun(len(wanted), len(todo), time.monotonic() - start)


def fill_output(
    out: Volume,
    plan: BlockPlan,
    work: Work,
    ledger: Ledger,
    *,
    part: tuple[int, int],
    predict: Callable[[int], Figures],
    require_unchanged: Callable[[], None],
    finish: Callable[[], None],
    begun: float,
    **running: Unpack[Running],
) -> Filled:
    """Do one part of the blocks of an output, and complete it if they were the last: what all stages end with.

    Parameters
    ----------
    part : (i, n)
        Part i of n.
    predict : callable
        What so many blocks are expected to need; kept in the metadata beside what they needed.
    require_unchanged : callable
        Raises if what was read is not what it was in the beginning; called when blocks were computed.
    finish : callable
        See `complete_output`.
    begun : float
        ``time.perf_counter()`` of the beginning.
    **running
        See `run_blocks`, which says what is raised.
    """
    indices = plan.part(*part)
    predicted = predict(len(set(indices) - ledger.done().keys()))
    ran = run_blocks(plan, indices, work, ledger, **running)
    if ran.computed:
        require_unchanged()
    missing = complete_output(out, plan, ledger, finish, parts=part[1])
    seconds = time.perf_counter() - begun
    actual = measured(ledger.store, ledger, blocks=ran.computed, seconds=seconds, complete=not missing)
    if ran.computed and not missing:
        out.update_metadata(predicted=predicted.record(), needed=actual.record())
    return Filled(ran.blocks, ran.computed, missing, seconds, predicted, actual)


def _reopen(store: Path) -> None:
    """Withdraw the word that a volume is complete before blocks of it are done again."""
    volume = Volume.open(store, writable=True)
    if volume.complete:
        volume.update_metadata(complete=False)


def _run_here(carrier: Carrier, todo: Sequence[int], stop: threading.Event, settle: Settle) -> None:
    """Compute one block while the one before it is compressed and written."""
    with ThreadPoolExecutor(1) as writer:
        writing: tuple[int, Future[str | None]] | None = None
        for index in todo:
            if stop.is_set():
                break
            result = carrier.compute(index)
            if writing is not None:
                settle(writing[0], writing[1].result())
                writing = None
            if isinstance(result, str):
                settle(index, result)
            else:
                writing = index, writer.submit(carrier.store, index, result)
            del result  # the writer drops it when it is written
        if writing is not None:
            settle(writing[0], writing[1].result())


def _report(plan: BlockPlan, outcome: _Outcome, total: int, stop: threading.Event) -> None:
    if stop.is_set() and outcome.done + len(outcome.failed) < total:
        raise StopRequested(
            f"stopped on request with {outcome.done} of {total} blocks done; the same command goes on"
        )
    if outcome.failed:
        listed = [f"block {i}, {plan[i].write}: {why}" for i, why in sorted(outcome.failed.items())[:5]]
        more = len(outcome.failed) - len(listed)
        raise VolumeError(
            f"{len(outcome.failed)} of {total} blocks failed twice; the others are done and the same command tries "
            f"these again. {'; '.join(listed)}" + (f"; and {more} more" if more else "")
        )


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGUSR2 set while the ``with`` lasts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals can be received by the main thread only
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in _STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
