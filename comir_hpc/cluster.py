"""Where the work on blocks runs: in this process, on many processes through Dask, or as one part of an array job.

What is sent around is the number of a block, never voxels: whoever computes a block reads what it needs and writes
its own shards. The serial path and the Dask path do the same calls in the same order within a block, so a result
cannot depend on which of them ran, and what is done is in the ledger, so it cannot depend on how often either was
stopped.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import CheckpointError, ConfigError, StopRequested, VolumeError
from comir_hpc.geometry import Block, BlockPlan
from comir_hpc.ledger import Ledger
from comir_hpc.volume import Volume

Progress = Callable[[str, int, int], None]

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
_STORAGE_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_ATTEMPTS = 2


@dataclass
class BlockResult:
    """The voxels of one block, and figures about it that are kept in the ledger.

    Parameters
    ----------
    values : (c, z, y, x) array
        Of the output volume's dtype, filling the block's written box.
    note : mapping, optional
        JSON-ready, small; `Ledger.notes` gives them all back, those of an earlier, interrupted run too.
    """

    values: NDArray[Any]
    note: Mapping[str, Any] | None = None


class Work(Protocol):
    """Computes blocks; pickled once for every process, so it opens what it needs when first called."""

    def __call__(self, block: Block) -> BlockResult:
        """Read what the block needs and return its voxels."""


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
        Check the content of every finished block first and do the damaged ones again.
    progress : callable, optional
        ``progress(what, done, total)``.

    Raises
    ------
    StopRequested
        After SIGTERM or SIGUSR2, when the block in hand is finished. The same call goes on.
    VolumeError
        When a block failed twice: every such block with its box, and their number, after all others were done. At once
        when the disk is full.
    """
    start = time.monotonic()
    wanted = list(indices)
    if verify:
        ledger.forget(ledger.verify())
    done = ledger.done()
    todo = [index for index in wanted if index not in done]
    outcome = _Outcome(done=len(wanted) - len(todo))

    def advance() -> None:
        outcome.done += 1
        if progress is not None:
            progress(what, outcome.done, len(wanted))

    if progress is not None and wanted:
        progress(what, outcome.done, len(wanted))
    if todo:
        _reopen(ledger.store)
        distributed = workers > 1 or cluster is not None
        with _stop_flag() as stop:
            if distributed:
                _run_with_dask(plan, todo, work, ledger, workers, cluster, stop, outcome, advance)
            else:
                _run_here(plan, todo, work, ledger, stop, outcome, advance)
        _report(plan, outcome, len(wanted), stop)
    return BlockRun(len(wanted), len(todo), time.monotonic() - start)


def _reopen(store: Path) -> None:
    """Withdraw the word that a volume is complete before blocks of it are done again."""
    volume = Volume.open(store, writable=True)
    if volume.complete:
        volume.update_metadata(complete=False)


# ---------------------------------------------------------------------------------------------- in this process


def _run_here(
    plan: BlockPlan,
    todo: Sequence[int],
    work: Work,
    ledger: Ledger,
    stop: threading.Event,
    outcome: _Outcome,
    advance: Callable[[], None],
) -> None:
    volume = Volume.open(ledger.store, writable=True)
    for index in todo:
        if stop.is_set():
            return
        failure = _carry_out(plan[index], work, ledger, volume)
        if failure:
            outcome.failed[index] = failure
        else:
            advance()


def _carry_out(block: Block, work: Work, ledger: Ledger, volume: Volume) -> str | None:
    """Compute and write one block, twice if need be; return why it failed, or None."""
    reason = ""
    for _ in range(_ATTEMPTS):
        try:
            result = work(block)
            values = np.ascontiguousarray(result.values)
            with ledger.writing(block.index, volume.shard_files(block.write), result.note):
                volume.write(block.write, values)
        except (ConfigError, CheckpointError, StopRequested):
            raise  # meant for the whole run
        except Exception as error:  # one bad block must not cost the others; all are reported at the end
            if isinstance(error, OSError) and error.errno in _STORAGE_FULL:
                raise VolumeError(
                    f"{ledger.store}: block {block.index}, {block.write}, cannot be written "
                    f"({error.strerror}); make room or get access, and run the same command again: it goes on there"
                ) from error
            reason = f"{type(error).__name__}: {error}"
        else:
            return None
    return reason


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


# ------------------------------------------------------------------------------------------------- through Dask


def _run_with_dask(
    plan: BlockPlan,
    todo: Sequence[int],
    work: Work,
    ledger: Ledger,
    workers: int,
    cluster: str | None,
    stop: threading.Event,
    outcome: _Outcome,
    advance: Callable[[], None],
) -> None:
    from distributed import as_completed

    payload = pickle.dumps((plan, work, ledger))
    waiting = iter(todo)
    with _client(workers, cluster) as client:
        slots = max(1, sum(client.nthreads().values()), workers)

        def submit(index: int) -> Any:
            # pure=False: a block that another run of this process computed is still to be computed.
            return client.submit(
                _carry_out_remotely, payload, index, ledger.attempts(index), key=f"block-{index}", pure=False
            )

        # Two blocks a slot keep every worker busy; the graph never grows with the volume.
        running = as_completed([submit(i) for _, i in zip(range(2 * slots), waiting, strict=False)])
        for future in running:
            index = int(future.key.removeprefix("block-"))
            failure = _failure_of(future)
            if failure:
                outcome.failed[index] = failure
            else:
                advance()
            following = None if stop.is_set() else next(waiting, None)
            if following is not None:
                running.add(submit(following))


def _failure_of(future: Any) -> str | None:
    """Why a remote block failed; errors that end the run are raised."""
    error = future.exception()
    if error is None:
        reason: str | None = future.result()
        return reason
    if type(error).__name__ == "KilledWorker":
        return "the worker died each time it was tried (out of memory?)"
    raise error


_opened = threading.local()


def _carry_out_remotely(payload: bytes, index: int, attempts: int) -> str | None:
    """One block on a worker; each of its threads keeps what it opened from one block to the next."""
    if getattr(_opened, "payload", None) != payload:
        plan, work, ledger = pickle.loads(payload)
        _opened.parts = plan, work, ledger, Volume.open(ledger.store, writable=True)
        _opened.payload = payload
    plan, work, ledger, volume = _opened.parts
    ledger.attempt_after(attempts, index)
    return _carry_out(plan[index], work, ledger, volume)


@contextmanager
def _client(workers: int, cluster: str | None) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    if cluster is not None and cluster.startswith("dask://"):
        address = "tcp://" + cluster.removeprefix("dask://")
        try:
            client = Client(address, timeout="20s")
        except OSError as error:
            raise ConfigError(
                f"no Dask scheduler answers at {cluster}; start one with `dask scheduler`, or leave --cluster out"
            ) from error
        with client:
            yield client
        return
    if cluster == "slurm":
        with _slurm_cluster() as jobs, Client(jobs) as client:
            jobs.scale(jobs=workers)
            yield client
        return
    if cluster is not None:
        raise ConfigError(f"cluster {cluster!r} is unknown; expected dask://HOST:PORT or slurm")
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    options = {
        "distributed.nanny.pre-spawn-environ": environment,
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.scheduler.allowed-failures": _ATTEMPTS - 1,
        # A worker that goes near its share is for the work to handle, not to be paused half way.
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.terminate": False,
    }
    with (
        dask.config.set(options),
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as local,
        Client(local) as client,
    ):
        yield client


def _slurm_cluster() -> Any:
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ConfigError(
            "--cluster slurm needs dask-jobqueue: pip install 'comir-hpc[slurm]'; or use --part in an array job"
        ) from error
    return SLURMCluster()


# ------------------------------------------------------------------------------------------- an output's life


def open_output(
    path: Path,
    ledger: Ledger,
    make: Callable[[Path], Volume],
    *,
    overwrite: bool = False,
    parts: int = 1,
) -> Volume:
    """Open the output that an earlier or parallel run of the same command made, or make it.

    The store appears under its name by one rename, with the ledger's fingerprint in its metadata, so parts that
    start at the same moment agree on one store and nobody meets half of one.

    Parameters
    ----------
    make : callable
        Creates the (incomplete) volume at the path that it is given and returns it.
    overwrite : bool
        Replace a store of another fingerprint. One of the same fingerprint is gone on with.
    parts : int
        How many runs may do this at once.

    Raises
    ------
    VolumeError
        If something else is at `path`: a result of other inputs, model or parameters (unless `overwrite`), or no
        volume of ours (never replaced).
    """
    with ledger.exclusive(needed=parts > 1):
        if path.exists():
            found = _fingerprint_of(path)
            if found == ledger.fingerprint:
                return Volume.open(path, writable=True)
            if not overwrite:
                raise VolumeError(
                    f"{path} exists and was made from another input, model or parameters, or by another version "
                    f"(fingerprint {found}, this command's is {ledger.fingerprint}); choose another --out, or pass "
                    "--overwrite"
                )
            # By one rename, so that a stop here leaves the old store whole or gone, not in pieces.
            path.replace(_new_folder(ledger) / "replaced")
        ledger.clear()
        spare = _new_folder(ledger) / path.name
        make(spare).update_metadata(fingerprint=ledger.fingerprint)
        spare.replace(path)
        spare.parent.rmdir()
        return Volume.open(path, writable=True)


def complete_output(
    volume: Volume,
    plan: BlockPlan,
    ledger: Ledger,
    finish: Callable[[], None],
    *,
    parts: int = 1,
) -> int:
    """Call `finish` once, in whichever run finds every block done; return how many blocks are still missing.

    `finish` builds the pyramid and ends with `Volume.finish`. A run that is killed inside it leaves the volume
    incomplete, and the next run of any part does it again.
    """
    missing = len(plan) - len(ledger.done())
    if missing:
        return missing
    with ledger.exclusive(needed=parts > 1):
        if not Volume.open(volume.path, allow_incomplete=True).complete:
            finish()
    return 0


def _fingerprint_of(path: Path) -> str:
    found = Volume.open(path, allow_incomplete=True).metadata.get("fingerprint", "none")
    return str(found)


def _new_folder(ledger: Ledger) -> Path:
    folder = ledger.folder / f"new-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    return folder
