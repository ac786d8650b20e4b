"""Some blocks of an output carried out, wherever: in this process, on several, or on Dask's workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from comir_hpc.blocks.block import Carrier, Orders, Settle, Work, pack
from comir_hpc.blocks.ledger import Ledger
from comir_hpc.errors import StopRequested, VolumeError
from comir_hpc.host.locks import Permit
from comir_hpc.host.progress import Progress
from comir_hpc.host.signals import stop_signals
from comir_hpc.space.plan import BlockPlan
from comir_hpc.volumes.volume import Volume


@dataclass(frozen=True)
class BlockRun:
    """What one call of `run_blocks` did."""

    blocks: int
    computed: int
    seconds: float

    @property
    def skipped(self) -> int:
        """Number of blocks that were done before this call."""
        return self.blocks - self.computed


@dataclass
class _Outcome:
    """Failures gathered while the other blocks go on."""

    failed: dict[int, str] = field(default_factory=dict)
    done: int = 0


def run_blocks(
    plan: BlockPlan,
    indices: Iterable[int],
    work: Work,
    ledger: Ledger,
    *,
    workers: int = 1,
    cluster: str | None = None,
    verify: bool = False,
    permit: Permit | None = None,
    progress: Progress | None = None,
    what: str = "blocks",
) -> BlockRun:
    """Compute and write the blocks of `indices` that are not done yet.

    Parameters
    ----------
    plan : BlockPlan
        Blocks of the output volume, which exists at ``ledger.store``.
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
    permit : Permit, optional
        Permit of the holder of the output's lock (`host.locks.writer`), which is shown before writing.
    progress : callable, optional
        Function that is called as ``progress(what, done, total)``.

    Raises
    ------
    StopRequested
        After SIGTERM or SIGUSR2, when the blocks in hand are finished. The same call, made again, continues.
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

    # Said before the first block, so that a run that goes on shows at once how far it is.
    if progress is not None and wanted:
        progress(what, outcome.done, len(wanted))
    if todo:
        _reopen(ledger)
        with stop_signals() as stop:
            if cluster is None and workers <= 1:
                _run_here(Carrier(plan, work, ledger, permit), todo, stop, settle)
            else:
                payload = pack(plan, work, ledger, permit)
                _hand_out(Orders(payload, todo, ledger.attempts, stop, settle), workers, cluster)
        _report(plan, outcome, len(wanted), stop)
    return BlockRun(len(wanted), len(todo), time.monotonic() - start)


def _reopen(ledger: Ledger) -> None:
    """Take back the word that a volume is complete, and then that its pyramid is, before blocks are done again."""
    volume = Volume.open(ledger.store, writable=True)
    if volume.complete:
        volume.withdraw()
    ledger.forget(-level for level in ledger.levels())


def _hand_out(orders: Orders, workers: int, cluster: str | None) -> None:
    """Let other processes compute, of this machine or of a cluster."""
    if cluster is None:
        from comir_hpc.blocks.processes import run_in_processes

        run_in_processes(orders, workers)
    else:
        from comir_hpc.blocks.dask_workers import run_with_dask

        run_with_dask(orders, workers, cluster)


def _run_here(carrier: Carrier, todo: Sequence[int], stop: threading.Event, settle: Settle) -> None:
    """Compute one block while the one before it is compressed and written."""
    with ThreadPoolExecutor(1) as writer:
        writing: tuple[int, Future[str | None]] | None = None
        for index in todo:
            if stop.is_set():
                break
            # Two blocks are in memory at the most: this one, and the one before it, which is being written.
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
    # A stop comes before failures: the same command tries the failed blocks again anyway.
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
